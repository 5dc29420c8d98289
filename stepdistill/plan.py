"""What a recipe will cost, before it runs: network evaluations, parameters, memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import nn

from stepdistill.build import build, open_teacher
from stepdistill.fitting import Fit, fit
from stepdistill.known_teachers import known_name, open_known
from stepdistill.memory import Memory, Noise, held_by, rehearse
from stepdistill.models.families import Opened
from stepdistill.models.nets import is_weight
from stepdistill.profiling import cost, saved_bytes
from stepdistill.recipe import Recipe, Teacher
from stepdistill.rehearsal import rehearsal
from stepdistill.student import Student
from stepdistill.trainer import Trainer

BATCH = 4
"""Samples that the costs are measured with; they are proportional to the batch."""
LOOKED_AT = 4
"""Updates of each kind that are averaged: rollouts may stop at random."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a recipe. An evaluation is that of one sample, forward; a backward pass counts as two more."""

    method: str
    steps: int
    """Of the student's sampler."""
    updates: int
    batch: int
    """Samples of an update, accumulation included."""
    per_update: float
    """Network evaluations for each sample of an update, on average over the stage."""
    data: int
    """Network evaluations that making the data takes."""
    parameters: int
    """Held in all roles together, each counted once; frozen ones too."""
    bytes_per_sample: int
    """Most that autograd holds at once for a sample."""
    memory: Memory | None = None
    """Of the run's device; only where it is asked for."""

    @property
    def evaluations(self) -> int:
        """Network evaluations of the whole stage."""
        return round(self.updates * self.batch * self.per_update) + self.data


def open_for_plan(teacher: Teacher) -> Opened:
    """A recipe's teacher: without weights if it is a known one, which takes no download, otherwise as it is."""
    name = known_name(teacher.source)
    return open_known(name, teacher.size) if name else open_teacher(teacher)


def plan(recipe: Recipe, opened: Opened | None = None, *, memory: bool = False, devices: int = 1) -> list[StagePlan]:
    """Take a few updates of every stage on noise, and count.

    Args:
        recipe: what is asked about; nothing is written and nothing of it is trained.
        opened: its teacher, where it is open already; on the meta device the updates are rehearsed on fake tensors.
        memory: rehearse each stage for its peak memory besides.
        devices: that share the batch, and the networks if the recipe shards them; memory is that of one.

    Returns:
        One plan for each stage, in the order they run.

    Raises:
        ValueError: as ``build``.
    """
    opened = opened or open_for_plan(recipe.teacher)
    imagined = next(opened.denoiser.parameters()).is_meta
    found: list[StagePlan] = []
    start: Student | None = None
    for stage in recipe.stages():
        noise = Noise(stage.data, stage.data.examples(opened, BATCH))
        run = replace(stage.run, batch=BATCH, accumulate=1, device="cpu")  # a card is only planned for
        with rehearsal() if imagined else nullcontext():
            teacher = replace(opened, denoiser=copy.deepcopy(opened.denoiser)) if imagined else opened
            trainer = build(replace(stage, data=noise, run=run), opened=teacher, start=start).trainer
            per_update, held = _average(trainer, stage.run.steps, 1 if imagined else LOOKED_AT)
            start = None if imagined else trainer.nets.student
        guided = 2 if stage.teacher.guidance != 1 and not trainer.nets.teacher.told else 1
        found.append(
            StagePlan(
                type(stage.objective).__name__,
                stage.sampler.steps,
                stage.run.steps,
                stage.run.batch * stage.run.accumulate,
                per_update,
                stage.data.evaluations * guided,
                parameters(trainer.nets),
                held,
                rehearse(stage, opened, as_on_cuda=on_cuda(stage), devices=devices) if memory else None,
            )
        )
    return found


def propose(recipe: Recipe, opened: Opened, card: float, devices: int = 1) -> Fit | None:
    """The recipe's last stage with the least change under which it fits on a card of so many gigabytes (1e9 bytes)."""

    def peak_of(changed: Recipe, limit: float) -> float:
        return rehearse(changed, opened, as_on_cuda=on_cuda(changed), devices=devices, limit=limit).peak

    return fit(recipe, card, peak_of, devices)


def on_cuda(recipe: Recipe) -> bool:
    """Whether it runs on a card of that kind."""
    return recipe.run.device.startswith("cuda")


def parameters(nets: nn.ModuleDict) -> int:
    """Weights of all networks, of those they adapt and of those they read, each counted once; frozen ones too."""
    return sum(t.numel() for tensors in held_by(nets, is_weight).values() for t in tensors)


def _average(trainer: Trainer, steps: int, looked_at: int) -> tuple[float, int]:
    """Evaluations per sample and update over ``steps`` steps, and the most bytes held for a sample."""
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for index in range(steps):
        kinds.setdefault(tuple(turn.due(index) for turn in trainer.turns), []).append(index)
    total = held = 0.0
    for indices in kinds.values():
        with saved_bytes() as books:
            total += len(indices) * cost(trainer, indices[:looked_at])
        held = max(held, books.peak / BATCH)
    return total / steps, round(held)
