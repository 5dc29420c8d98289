"""What a recipe will cost, before it runs: network evaluations, parameters, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import nn

from stepdistill.build import build, open_teacher
from stepdistill.data import Data, Setting
from stepdistill.data.base import to_device
from stepdistill.models.families import Opened
from stepdistill.models.lora import network_of
from stepdistill.objective import Batch, Step
from stepdistill.profiling import cost, saved_bytes
from stepdistill.recipe import Recipe
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
    """Held in all roles together, each counted once."""
    bytes_per_sample: int
    """Most that autograd holds at once for a sample."""

    @property
    def evaluations(self) -> int:
        """Network evaluations of the whole stage."""
        return round(self.updates * self.batch * self.per_update) + self.data


@dataclass(frozen=True)
class _Noise(Data):
    """Noise under a data source's conditions: costs nothing to make."""

    source: Data

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """The source's."""
        return self.source.provides

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        cond = to_device(self.source.examples(setting.opened, setting.batch), setting.device)
        shape = (setting.batch, *setting.opened.sample_shape)

        def batch(step: Step) -> Batch:
            path = step.randn((shape[0], setting.sampler.steps + 1, *shape[1:])).to(setting.device)
            return Batch(cond, shape, x0=path[:, -1], path=path)

        return batch


def plan(recipe: Recipe, opened: Opened | None = None) -> list[StagePlan]:
    """Take a few updates of every stage on noise, and count.

    Args:
        recipe: what is asked about; nothing is written and nothing of it is trained.
        opened: its teacher, where it is open already.

    Returns:
        One plan for each stage, in the order they run.

    Raises:
        ValueError: as ``build``.
    """
    opened = opened or open_teacher(recipe.teacher)
    found: list[StagePlan] = []
    start: Student | None = None
    for stage in recipe.stages():
        run = replace(stage.run, batch=BATCH, accumulate=1)
        trainer = build(replace(stage, data=_Noise(stage.data), run=run), opened=opened, start=start).trainer
        per_update, held = _average(trainer, stage.run.steps)
        guided = 2 if stage.teacher.guidance != 1 and not trainer.nets.teacher.told else 1
        found.append(
            StagePlan(
                type(stage.objective).__name__,
                stage.sampler.steps,
                stage.run.steps,
                stage.run.batch * stage.run.accumulate,
                per_update,
                stage.data.evaluations * guided,
                parameters(trainer.nets.values()),
                held,
            )
        )
        start = trainer.nets.student
    return found


def parameters(nets: Iterable[nn.Module]) -> int:
    """Parameters of all networks, and of those they adapt, each counted once."""
    seen: dict[int, int] = {}
    for net in nets:
        for module in net.modules():
            for part in (module, network_of(module)):
                seen |= {id(p): p.numel() for p in part.parameters()}
    return sum(seen.values())


def _average(trainer: Trainer, steps: int) -> tuple[float, int]:
    """Evaluations per sample and update over ``steps`` steps, and the most bytes held for a sample."""
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for index in range(steps):
        kinds.setdefault(tuple(turn.due(index) for turn in trainer.turns), []).append(index)
    total = held = 0.0
    for indices in kinds.values():
        total += len(indices) * cost(trainer, indices[:LOOKED_AT])
        with saved_bytes() as books:
            trainer.step(indices[0])
        held = max(held, books.peak / BATCH)
    return total / steps, round(held)
