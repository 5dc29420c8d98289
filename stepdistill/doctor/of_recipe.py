"""What a recipe alone gives away."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from stepdistill.doctor.run import Check, Examined
from stepdistill.parts.rollout import BackwardSim, FromData, Rollout
from stepdistill.recipe import Recipe
from stepdistill.symptoms import Finding

START_LEFT = 0.1
"""Weight of the student's start in its final average from which the average is too slow."""


def no_backward_simulation(run: Examined) -> Iterator[Finding]:
    """A student of several steps that is trained by score differences on states it will never be in."""
    recipe, steps = run.recipe, run.recipe.sampler.steps
    if recipe.objective.family != "score" or steps == 1:
        return
    for rollout in _rollouts(recipe.objective):
        if isinstance(rollout, FromData):
            yield Finding(
                "no_backward_simulation",
                "no backward simulation",
                f"the student has {steps} steps, and objective.rollout is FromData: noised real images",
                "at inference its later steps start from its own samples, which it has never seen",
                "objective.rollout BackwardSim (DMD2 sec. 4.5)",
            )
        if isinstance(rollout, BackwardSim) and rollout.last_only and recipe.warm_start is None:
            yield Finding(
                "no_backward_simulation",
                "the first steps are not trained",
                f"the student has {steps} steps, objective.rollout trains the last alone, and there is no warm start",
                "rollout.last_only is for students whose other steps are good already",
                "objective.rollout BackwardSim(last_only=False), or a warm start",
            )


def stands_still(run: Examined) -> Iterator[Finding]:
    """A player whose optimizer cannot move it."""
    turns, steps = run.recipe.objective.turns(), run.recipe.run.steps
    for name, spec in run.recipe.players.items():
        if spec.lr == 0:
            yield Finding(
                f"{name}_stands_still",
                f"the {name} never moves",
                f"optim.{name}.lr is 0",
                "a learning rate that was switched off",
                f"set optim.{name}.lr; a critic's is usually several times the student's",
            )
        elif spec.warmup >= steps:
            yield Finding(
                f"{name}_warms_up",
                f"the {name} never leaves its warm-up",
                f"optim.{name}.warmup is {spec.warmup}, run.steps {steps}",
                "a warm-up that was meant for a longer run",
                f"optim.{name}.warmup of a few hundredths of run.steps",
            )
        if not any(turn.taken(steps) for turn in turns if name in turn.moves):
            yield Finding(
                f"{name}_has_no_turn",
                f"the {name} never moves",
                f"none of its turns is due within run.steps {steps}",
                "an objective whose phases are longer than the run",
                "a longer run, or shorter phases in the objective's settings",
            )


def average_too_slow(run: Examined) -> Iterator[Finding]:
    """A running average that still holds the student's start at the end."""
    updates, decay = student_updates(run.recipe), run.recipe.run.ema
    left = decay**updates
    if updates and left > START_LEFT:
        yield Finding(
            "average_too_slow",
            "the running average is too slow",
            f"with run.ema {decay} the student's start still has weight {left:.2f} after its {updates} updates",
            "a decay that was meant for a longer run; the average is what is exported",
            f"run.ema {max(1 - 5 / updates, 0.0):.4g} or less",
        )


def guidance_below_one(run: Examined) -> Iterator[Finding]:
    """A scale that counts from 0, where pipelines count from 1."""
    scale = run.recipe.teacher.guidance
    if run.recipe.teacher.guidance_range is None and scale < 1:
        yield Finding(
            "guidance_below_one",
            "guidance is counted from another zero",
            f"teacher.guidance is {scale:g}: at 1 the teacher is not guided, at 0 it ignores its conditions",
            "a scale w of the literature, which is guidance_scale - 1",
            f"teacher.guidance {scale + 1:g}",
        )


def student_updates(recipe: Recipe) -> int:
    """Turns of the student within a whole run."""
    return sum(turn.taken(recipe.run.steps) for turn in recipe.objective.turns() if "student" in turn.moves)


def _rollouts(value: Any) -> Iterator[Rollout]:
    """All rollouts of an objective, also of one that it contains."""
    if isinstance(value, Rollout):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _rollouts(getattr(value, field.name))


CHECKS: tuple[Check, ...] = (no_backward_simulation, stands_still, average_too_slow, guidance_below_one)
