"""Recipes on the bundled digits teacher: minutes on one core of a laptop's CPU."""

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
from stepdistill.sampling import Ddim, DpmPP2M, Renoise, Sampler, Tcd, trailing
from stepdistill.trainer import AdamW, Run

ONE_STEP = Sampler(trailing(1), Ddim())
FOUR_STEPS = Sampler(trailing(4), Ddim())
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


def digits_kd() -> Recipe:
    """Noise-image regression: one step."""
    return _on_digits(KD(distance=Huber(0.03)), {"student": REGRESSION}, 1200, ONE_STEP, PAIRS)


def digits_kd_4step() -> Recipe:
    """The same along the teacher's path: four steps."""
    return _on_digits(KD(distance=Huber(0.03)), {"student": REGRESSION}, 1200, FOUR_STEPS, PAIRS)


def digits_dmd2() -> Recipe:
    """Distribution matching with a GAN, from the teacher's weights: one step."""
    optim = GAME | {"student": AdamW(2e-4, betas=(0.0, 0.999), decay="linear")}
    return _on_digits(_dmd2(OneStep()), optim, 800, ONE_STEP, clip=10.0)


def digits_dmd2_4step() -> Recipe:
    """The same with backward simulation: four steps."""
    optim = GAME | {"student": AdamW(2e-4, betas=(0.0, 0.999), decay="linear")}
    return _on_digits(_dmd2(BackwardSim(last_only=True)), optim, 600, FOUR_STEPS, clip=10.0)


def digits_cd() -> Recipe:
    """Consistency distillation: two steps with fresh noise between."""
    objective = CD(grid_start=4, grid_end=8, grow_until=600)
    return _on_digits(objective, {"student": STUDENT}, 1200, Sampler(trailing(2), Renoise()))


def digits_tscd() -> Recipe:
    """Trajectory segments 4, 2, 1, each stage kept and serving as many steps."""
    recipe = None
    for segments, steps in ((4, 700), (2, 500), (1, 500)):
        objective = TSCD(segments=Segments(segments, 16), to_edge=0.5)
        sampler = Sampler(trailing(segments), Tcd(0.0))
        recipe = _on_digits(objective, {"student": STUDENT}, steps, sampler, warm_start=recipe)
    return recipe


def digits_ladd() -> Recipe:
    """Adversarial heads on the frozen teacher's features, nothing else: one step."""
    objective = LADD(rollout=OneStep(), gan=Gan(weight=1.0, loss="softplus", times=LogNormal(-1.0, 1.0)))
    optim = {
        "student": AdamW(2e-4, betas=(0.0, 0.99), decay="linear"),
        "disc": AdamW(1e-3, betas=(0.0, 0.99), decay="linear"),
    }
    return _on_digits(objective, optim, 800, ONE_STEP, clip=10.0)


def digits_quickstart_1step() -> Recipe:
    """The quickstart's one-step generator: regression as warm-up, then DMD2."""
    return _on_digits(_dmd2(OneStep()), GAME, 400, ONE_STEP, clip=10.0, warm_start=digits_kd())


def digits_quickstart_4step() -> Recipe:
    """The quickstart's four-step generator: regression along the path, then DMD2 by backward simulation."""
    objective = _dmd2(BackwardSim(last_only=True))
    return _on_digits(objective, GAME, 300, FOUR_STEPS, clip=10.0, warm_start=digits_kd_4step())


def _dmd2(rollout: OneStep | BackwardSim) -> DMD2:
    # The critic is small and near its student from the start, so two updates per student update do.
    return DMD2(rollout=rollout, gan=Gan(weight=1.0), student_every=2)
