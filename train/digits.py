"""Recipes on the bundled digits teacher: minutes on a laptop's CPU."""

from __future__ import annotations

from stepdistill.data import TeacherPairs
from stepdistill.functional.distances import Huber
from stepdistill.objectives import KD
from stepdistill.recipe import Evaluation, Recipe, Teacher
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.trainer import AdamW, Run

DIGITS = Teacher("bundled:digits")
ONE_STEP = Sampler(trailing(1), Ddim())
FOUR_STEPS = Sampler(trailing(4), Ddim())


def digits_kd() -> Recipe:
    """Noise-image regression: one step."""
    return Recipe(
        teacher=DIGITS,
        objective=KD(distance=Huber(0.03)),
        data=TeacherPairs(),
        optim={"student": AdamW(8e-4, decay="linear")},
        sampler=ONE_STEP,
        run=Run(steps=1200, ema=0.99),
        evaluation=Evaluation(),
    )
