"""Recipes on the bundled digits teacher: minutes on one core of a laptop's CPU.

``stepdistill distill digits_kd@4`` asks for four steps.
"""

from __future__ import annotations

from stepdistill.data import Data, DigitsData, TeacherPairs
from stepdistill.functional.distances import Huber
from stepdistill.objective import Objective
from stepdistill.objectives import CD, DMD2, KD, LADD, TSCD
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim, OneStep
from stepdistill.parts.segments import Segments
from stepdistill.parts.times import LogNormal
from stepdistill.recipe import Evaluation, Recipe, Teacher
from stepdistill.sampling import Ddim, DpmPP2M, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.trainer import AdamW, Run

PAIRS = TeacherPairs(solver=Sampler(trailing(32), DpmPP2M()))

STUDENT = AdamW(8e-4, decay="linear")
"""For targets that move with the student."""
REGRESSION = AdamW(2e-3, decay="linear")
"""For targets that stand still."""
GAME = {
    "student": AdamW(1e-4, betas=(0.0, 0.999), decay="linear"),
    "critic": AdamW(5e-4, betas=(0.0, 0.999), decay="linear"),
    "disc": AdamW(1e-3, betas=(0.0, 0.99)),
}
"""Players that chase each other: no momentum, the critic five times as fast as the student."""


def _on_digits(
    objective: Objective,
    optim: dict[str, AdamW],
    steps: int,
    sampler: Sampler,
    data: Data | None = None,
    *,
    clip: float = 1.0,
    warm_start: Recipe | None = None,
) -> Recipe:
    return Recipe(
        teacher=Teacher("bundled:digits"),
        objective=objective,
        data=data or DigitsData(),
        optim=optim,
        sampler=sampler,
        run=Run(steps=steps, ema=0.99, clip=clip, threads=1),
        evaluation=Evaluation(),
        warm_start=warm_start,
    )


def _grid(steps: int, rule: StepRule = Ddim()) -> Sampler:  # noqa: B008 (frozen)
    return Sampler(trailing(steps), rule)


# Trajectory


def digits_kd(steps: int = 1) -> Recipe:
    """Regression onto the teacher's own path; at one step onto noise-image pairs."""
    return _on_digits(KD(distance=Huber(0.03)), {"student": REGRESSION}, 1200, _grid(steps), PAIRS)


def digits_kd_4step() -> Recipe:
    """The same at four steps."""
    return digits_kd(4)


def digits_tscd(steps: int = 1) -> Recipe:
    """Trajectory segments 4, 2, 1 (or from 8), each stage kept and serving as many steps."""
    recipe = None
    for segments in (k for k in (8, 4, 2, 1) if steps <= k <= max(steps, 4)):
        objective = TSCD(segments=Segments(segments, 16), to_edge=0.5)
        updates = 700 if recipe is None else 500
        sampler = _grid(segments, Tcd(0.0))
        recipe = _on_digits(objective, {"student": STUDENT}, updates, sampler, warm_start=recipe)
    if recipe is None or recipe.sampler.steps != steps:
        raise ValueError(f"steps must be 1, 2, 4 or 8; got {steps}")
    return recipe


# Score distillation


def digits_dmd2(steps: int = 1) -> Recipe:
    """Distribution matching with a GAN, from the teacher's weights; several steps by backward simulation."""
    optim = GAME | {"student": AdamW(2e-4, betas=(0.0, 0.999), decay="linear")}
    rollout = OneStep() if steps == 1 else BackwardSim(last_only=True)
    return _on_digits(_dmd2(rollout), optim, 800 if steps == 1 else 600, _grid(steps), clip=10.0)


def digits_dmd2_4step() -> Recipe:
    """The same at four steps."""
    return digits_dmd2(4)


# Consistency


def digits_cd(steps: int = 2) -> Recipe:
    """Consistency distillation; fresh noise between the steps."""
    objective = CD(grid_start=4, grid_end=8, grow_until=600)
    return _on_digits(objective, {"student": STUDENT}, 1200, _grid(steps, Renoise()))


# Adversarial


def digits_ladd(steps: int = 1) -> Recipe:
    """Adversarial heads on the frozen teacher's features, nothing else."""
    rollout = OneStep() if steps == 1 else BackwardSim(last_only=True)
    objective = LADD(rollout=rollout, gan=Gan(weight=1.0, loss="softplus", times=LogNormal(-1.0, 1.0)))
    optim = {
        "student": AdamW(2e-4, betas=(0.0, 0.99), decay="linear"),
        "disc": AdamW(1e-3, betas=(0.0, 0.99), decay="linear"),
    }
    return _on_digits(objective, optim, 800, _grid(steps), clip=10.0)


# Quickstart


def digits_quickstart_1step() -> Recipe:
    """The quickstart's one-step generator: regression as warm-up, then DMD2."""
    return _on_digits(_dmd2(OneStep()), GAME, 400, _grid(1), clip=10.0, warm_start=digits_kd())


def digits_quickstart_4step() -> Recipe:
    """The quickstart's four-step generator: regression along the path, then DMD2 by backward simulation."""
    objective = _dmd2(BackwardSim(last_only=True))
    return _on_digits(objective, GAME, 300, _grid(4), clip=10.0, warm_start=digits_kd_4step())


def _dmd2(rollout: OneStep | BackwardSim) -> DMD2:
    # The critic is small and near its student from the start, so two updates per student update do.
    return DMD2(rollout=rollout, gan=Gan(weight=1.0), student_every=2)
