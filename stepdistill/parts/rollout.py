"""How the student makes the samples it is trained on. Values to put into an objective's ``rollout`` field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.objective import Batch, Step
from stepdistill.sampling import Sampler, at
from stepdistill.student import Student


class Rollout(ABC):
    """Makes student samples."""

    @abstractmethod
    def __call__(self, student: Student, batch: Batch, step: Step) -> Tensor:
        """Clean samples (B, ...) for ``batch.cond``, with a graph if gradients are enabled."""


@dataclass(frozen=True)
class OneStep(Rollout):
    """From pure noise in one call, at the first time of the student's grid."""

    def __call__(self, student: Student, batch: Batch, step: Step) -> Tensor:
        """See ``Rollout``."""
        x = step.randn(batch.shape) * student.schedule.prior_std
        return student(x, at(student.sampler.times[0] * student.schedule.t_max, x), batch.cond)


@dataclass(frozen=True)
class FromData(Rollout):
    """From real data noised to a random time of the student's grid, one call (LADD; FastGen's multi-step default).

    What the student meets in training is not quite what it meets when it samples: see ``BackwardSim``. At the first,
    noisiest time the state is noise plus whatever signal the schedule leaves there.
    """

    def __call__(self, student: Student, batch: Batch, step: Step) -> Tensor:
        """See ``Rollout``; needs ``batch.x0``."""
        if batch.x0 is None:
            raise ValueError("objective.rollout FromData needs data with x0; use BackwardSim(), or data with images")
        grid = torch.tensor(student.sampler.times, dtype=torch.float64, device=step.rng.device)
        t = grid[step.integers(len(grid), len(batch))] * student.schedule.t_max
        return student(student.schedule.add_noise(batch.x0, step.randn(batch.shape), t), t, batch.cond)


@dataclass(frozen=True)
class BackwardSim(Rollout):
    """From the student's own states (DMD2, arXiv:2405.14867 sec. 4.5): draw a stop, sample down to it without a
    graph by the very sampler that inference uses, then call the network once with a graph.

    One stop for the whole batch. With a one-step sampler this is ``OneStep``. A critic that sees samples of all stops
    matches their *mixture*: stops that still blur are made up for by a last step that scatters.
    """

    last_only: bool = False
    """Always stop at the last step, whose output is the sample; earlier steps stay as a warm start left them."""

    def __call__(self, student: Student, batch: Batch, step: Step) -> Tensor:
        """See ``Rollout``."""
        steps = student.sampler.steps
        stop = steps - 1 if self.last_only else step.shared_integer(steps)
        noise = step.randn(batch.shape)
        with torch.no_grad():
            x = student.sampler.run(student, noise, batch.cond, step.rng, stop=stop)
        return student(x, at(student.sampler.times[stop] * student.schedule.t_max, x), batch.cond)


def refuse_one_step(rollout: Rollout, sampler: Sampler) -> None:
    """``OneStep`` never visits the later times of a longer grid.

    Raises:
        ValueError: if that is what is asked for.
    """
    if isinstance(rollout, OneStep) and sampler.steps > 1:
        raise ValueError(
            f"objective.rollout OneStep trains the first of the sampler's {sampler.steps} steps only; "
            "use BackwardSim, or a one-step sampler"
        )
