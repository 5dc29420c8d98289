"""Recipes on the bundled text-to-image teachers, captioned shapes of 32x32 pixels: minutes on one core of a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from stepdistill.data import Data, ShapesData, ShapesPrompts, TeacherPairs
from stepdistill.functional.distances import Huber
from stepdistill.objective import Objective
from stepdistill.objectives import CD, DMD2, KD, TSCD
from stepdistill.parts.discretisation import Doubling
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim, OneStep
from stepdistill.parts.segments import Segments
from stepdistill.recipe import Evaluation, Recipe, Teacher, Weights
from stepdistill.sampling import Ddim, DpmPP2M, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.trainer import AdamW, Run

TeacherName = Literal["shapes-sd", "shapes-sd3"]

GUIDANCE = 3.0
PAIRS = TeacherPairs(count=4000, solver=Sampler(trailing(8), DpmPP2M()), prompts=ShapesPrompts())
SCENES = ShapesData()

STUDENT = AdamW(4e-4, decay="linear")
"""For targets that move with the student."""
REGRESSION = AdamW(1e-3, decay="linear")
"""For targets that stand still."""
GAME = {
    "student": AdamW(1e-4, betas=(0.0, 0.999), decay="linear"),
    "critic": AdamW(5e-4, betas=(0.0, 0.999), decay="linear"),
    "disc": AdamW(1e-3, betas=(0.0, 0.99)),
}
"""Players that chase each other: no momentum, the critic five times as fast as the student."""
ADAPTERS = Weights(form="lora", rank=32)


def _on_shapes(
    teacher: TeacherName,
    objective: Objective,
    data: Data,
    optim: dict[str, AdamW],
    steps: int,
    sampler: Sampler,
    *,
    clip: float = 1.0,
    student: Weights = Weights(),  # noqa: B008 (frozen)
    critic: Weights = Weights(),  # noqa: B008 (frozen)
    warm_start: Recipe | None = None,
) -> Recipe:
    return Recipe(
        teacher=Teacher(f"bundled:{teacher}", guidance=GUIDANCE),
        objective=objective,
        data=data,
        optim=optim,
        sampler=sampler,
        run=Run(steps=steps, batch=32, ema=0.99, clip=clip, threads=1),
        student=student,
        critic=critic,
        evaluation=Evaluation(n=1000, teacher_steps=(1, 4, 25)),
        warm_start=warm_start,
    )


def _grid(steps: int, rule: StepRule = Ddim()) -> Sampler:  # noqa: B008 (frozen)
    return Sampler(trailing(steps), rule)


def _kd(teacher: TeacherName, sampler: Sampler, student: Weights = Weights()) -> Recipe:  # noqa: B008 (frozen)
    objective, optim = KD(distance=Huber(0.03)), {"student": REGRESSION}
    return _on_shapes(teacher, objective, PAIRS, optim, 900, sampler, student=student)


def _dmd2(
    teacher: TeacherName,
    sampler: Sampler,
    student: Weights = Weights(),  # noqa: B008 (frozen)
    critic: Weights = Weights(),  # noqa: B008 (frozen)
) -> Recipe:
    """Regression, then a short DMD2; the critic starts near the student, so two updates per student update do."""
    rollout = OneStep() if sampler.steps == 1 else BackwardSim(last_only=True)
    objective = DMD2(rollout=rollout, gan=Gan(weight=1.0), student_every=2)
    start = _kd(teacher, sampler, student)
    return _on_shapes(
        teacher, objective, SCENES, GAME, 200, sampler, clip=10.0, student=student, critic=critic, warm_start=start
    )


def shapes_sd_kd(steps: int = 1) -> Recipe:
    """SD teacher, regression onto its noise-image pairs, or along its path at several steps."""
    return _kd("shapes-sd", _grid(steps))


def shapes_sd_dmd2(steps: int = 1) -> Recipe:
    """SD teacher, regression as warm-up, then DMD2; several steps by backward simulation."""
    return _dmd2("shapes-sd", _grid(steps))


def shapes_sd_dmd2_4step() -> Recipe:
    """The same at four steps."""
    return shapes_sd_dmd2(4)


def shapes_sd_lora() -> Recipe:
    """SD teacher, the one-step recipe with a student of LoRA adapters."""
    return _dmd2("shapes-sd", _grid(1), student=ADAPTERS)


def shapes_sd_shared() -> Recipe:
    """SD teacher, the one-step recipe with student and critic as adapters of the teacher's own network."""
    return _dmd2("shapes-sd", _grid(1), student=ADAPTERS, critic=ADAPTERS)


def shapes_sd_cd(steps: int = 4) -> Recipe:
    """SD teacher, consistency distillation, with fresh noise between steps."""
    objective = CD(intervals=Doubling(8, 16, 400))
    return _on_shapes("shapes-sd", objective, SCENES, {"student": STUDENT}, 800, _grid(steps, Renoise()))


def shapes_sd_tscd(steps: int = 4) -> Recipe:
    """SD teacher, as many trajectory segments as steps."""
    objective = TSCD(segments=Segments(steps, 16), to_edge=0.5)
    return _on_shapes("shapes-sd", objective, SCENES, {"student": STUDENT}, 800, _grid(steps, Tcd(0.0)))


def shapes_sd_keeps_guidance() -> Recipe:
    """SD teacher without guidance, and the empty prompt too: four steps that take guidance and negative prompts."""
    recipe = shapes_sd_tscd()
    return replace(recipe, teacher=replace(recipe.teacher, guidance=1.0), null_rate=0.15, evaluation=None)


def shapes_sd3_kd(steps: int = 1) -> Recipe:
    """SD3 teacher, regression onto its noise-image pairs, or along its path at several steps."""
    return _kd("shapes-sd3", _grid(steps))


def shapes_sd3_dmd2(steps: int = 1) -> Recipe:
    """SD3 teacher, regression as warm-up, then DMD2; several steps by backward simulation."""
    return _dmd2("shapes-sd3", _grid(steps))


def shapes_sd3_dmd2_4step() -> Recipe:
    """The same at four steps."""
    return shapes_sd3_dmd2(4)
