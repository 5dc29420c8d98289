"""What a recipe will cost, before it runs: network evaluations, parameters, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from stepdistill.build import build, open_teacher
from stepdistill.fitting import GIB, Fit, fit
from stepdistill.known_teachers import known_name, open_known
from stepdistill.memory import Memory, Noise, held_by, rehearse
from stepdistill.models.families import Opened
from stepdistill.models.nets import is_weight
from stepdistill.profiling import cost, saved_bytes
from stepdistill.recipe import Recipe, Teacher
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
        taken = None
        if imagined:
            counts, taken = _rehearsed(stage, opened, devices)
        else:
            counts, start = _tried(stage, opened, start)
        if memory:
            taken = taken or rehearse(stage, opened, as_on_cuda=on_cuda(stage), devices=devices)
        found.append(
            StagePlan(
                type(stage.objective).__name__,
                stage.sampler.steps,
                stage.run.steps,
                stage.run.batch * stage.run.accumulate,
                counts.per_update,
                stage.data.evaluations * counts.guided,
                counts.parameters,
                counts.bytes_per_sample,
                taken if memory else None,
            )
        )
    return found


@dataclass(frozen=True)
class _Counts:
    per_update: float
    bytes_per_sample: int
    parameters: int
    guided: int
    """Evaluations of one call of the teacher."""


def _counts(trainer: Trainer, recipe: Recipe, looked_at: int, devices: int = 1) -> _Counts:
    """Take updates of each kind, ``looked_at`` at most; one of ``devices`` sees its share of the samples."""
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for index in range(recipe.run.steps):
        kinds.setdefault(tuple(turn.due(index) for turn in trainer.turns), []).append(index)
    total = held = 0.0
    for indices in kinds.values():
        with saved_bytes() as books:
            total += len(indices) * cost(trainer, indices[:looked_at])
        held = max(held, devices * books.peak / trainer.run.batch)
    guided = 2 if recipe.teacher.guidance != 1 and not trainer.nets.teacher.told else 1
    return _Counts(devices * total / recipe.run.steps, round(held), parameters(trainer.nets), guided)


def _rehearsed(stage: Recipe, opened: Opened, devices: int) -> tuple[_Counts, Memory]:
    """On fake tensors, in the stage's own batches."""
    found: list[_Counts] = []

    def steps(trainer: Trainer) -> None:
        found.append(_counts(trainer, stage, 1, devices))

    memory = rehearse(stage, opened, as_on_cuda=on_cuda(stage), devices=devices, steps=steps)
    return found[0], memory


def _tried(stage: Recipe, opened: Opened, start: Student | None) -> tuple[_Counts, Student]:
    """On noise, in small batches on the CPU: a card is only planned for. Returns a start for the next stage too."""
    noise = Noise(stage.data, stage.data.examples(opened, BATCH))
    run = replace(stage.run, batch=BATCH, accumulate=1, device="cpu")
    trainer = build(replace(stage, data=noise, run=run), opened=opened, start=start).trainer
    return _counts(trainer, stage, LOOKED_AT), trainer.nets.student


def propose(recipe: Recipe, opened: Opened, card: float, planned: Memory, devices: int = 1) -> Fit | None:
    """The recipe's last stage, as ``planned``, with the least change under which it fits on a card of so many GiB."""
    standing: dict[str, int] = {}  # by all that it depends on: arithmetic, batches and recomputation do not change it

    def peak_of(changed: Recipe, limit: float) -> float:
        if changed == recipe:
            return planned.peak
        same = f"{changed.student} {changed.critic} {changed.placement.offload}"
        if standing.get(same, 0) > limit:
            return standing[same]
        found = rehearse(changed, opened, as_on_cuda=on_cuda(changed), devices=devices, limit=limit)
        standing[same] = found.standing
        return found.peak

    return fit(recipe, card, peak_of, devices)


def on_cuda(recipe: Recipe) -> bool:
    """Whether it runs on a card of that kind."""
    return recipe.run.device.startswith("cuda")


def parameters(nets: nn.ModuleDict) -> int:
    """Weights of all networks, of those they adapt and of those they read, each counted once; frozen ones too."""
    return sum(t.numel() for tensors in held_by(nets, is_weight).values() for t in tensors)


def table(stages: Sequence[StagePlan]) -> str:
    """What people read of plans: a line for each stage, then, where memory was asked for, what its peak is made of."""
    head = ("stage", "method", "steps", "updates", "samples", "evaluations", "for the data", "parameters")
    lines = [head] + [
        (str(i), s.method, str(s.steps), f"{s.updates:,}", str(s.batch), f"{s.per_update:.2f}", f"{s.data:,}",
         f"{s.parameters / 1e6:,.2f} M")
        for i, s in enumerate(stages, 1)
    ]  # fmt: skip
    total = f"{sum(s.evaluations for s in stages):,} network evaluations of one sample (a backward pass counts two)"
    text = f"{_columns(lines)}\n{total}\n"
    memories = [s.memory for s in stages if s.memory is not None]
    if not memories:
        return text
    roles = dict.fromkeys(role for m in memories for role in m.weights)
    parts = dict.fromkeys((*roles, *(part for m in memories for part in m.parts())))
    rows = [(part, *(_gib(m.parts().get(part, 0)) for m in memories)) for part in parts]
    rows += [("peak", *(_gib(m.peak) for m in memories))]
    away = sorted({role for m in memories for role in m.away})
    text += "\n" + _columns([("GiB on a device", *(f"stage {i}" for i in range(1, len(memories) + 1))), *rows]) + "\n"
    return text + (f"{', '.join(away)}: on the CPU between turns\n" if away else "")


def _gib(n: int) -> str:
    size = n / GIB
    return "-" if not n else f"{size:.3g}" if size >= 0.001 else "< 0.001"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
