"""A denoiser that remembers the few-step sampler it was trained for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond, Denoiser, plain_call
from stepdistill.models.two_time import TwoTime
from stepdistill.sampling import Sampler, sample
from stepdistill.schedule import Kind, Schedule


class Student(Denoiser):
    """A ``Denoiser`` and its grid: sampling it on any other grid is an error, not a bad picture.

    Args:
        sampler: times and rule it is trained for, and exported with.
        net: see ``Denoiser``, as all the others.
        serves: all samplers it is trained for, where there are more than one; see ``serving``.
    """

    def __init__(
        self,
        sampler: Sampler,
        net: nn.Module,
        schedule: Schedule,
        kind: Kind,
        call: Call = plain_call,
        dtype: torch.dtype = torch.float32,
        *,
        serves: tuple[Sampler, ...] = (),
    ):
        super().__init__(net, schedule, kind, call, dtype)
        self.sampler = sampler
        self.serves = serves or (sampler,)

    def serving(self, steps: int) -> Student:
        """This student, with the same network, under that of its samplers which has ``steps``.

        Whatever takes a student, to sample, measure or export it, then works at that many steps.

        Raises:
            ValueError: if it is not trained for that many.
        """
        for sampler in (self.sampler, *self.serves):
            if sampler.steps == steps:
                args = self.net, self.schedule, self.kind, self.call, self.dtype
                return self if sampler is self.sampler else Student(sampler, *args, serves=self.serves)
        trained = " or ".join(dict.fromkeys(str(s.steps) for s in (self.sampler, *self.serves)))
        grid = ", ".join(f"{t:g}" for t in self.sampler.times)
        raise ValueError(
            f"steps {steps}: this student was trained for {trained} (times {grid}); "
            f"use steps {trained}, or distil one for {steps}"
        )

    def next_time(self, t: Tensor) -> Tensor:
        """Where a step of its sampler from ``t`` (B,) jumps to: the grid's next time, 0 behind the last; (B,)."""
        t_max = self.schedule.t_max
        grid = torch.tensor((*self.sampler.times, 0.0), dtype=torch.float64, device=t.device) * t_max
        below = torch.where(grid < t.double()[:, None] - 1e-6 * t_max, grid, 0.0).amax(1)
        return self.sampler.rule.lands(below, t_max)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0", s: Tensor | None = None) -> Tensor:
        """See ``Denoiser.forward``; without ``s`` a network of two times heads for ``next_time(t)``."""
        if s is None and isinstance(self.net, TwoTime):
            s = self.next_time(t)
        return super().forward(x_t, t, cond, want=want, s=s)

    def sample(
        self, shape: Sequence[int], cond: Cond, *, steps: int | None = None, seed: int = 0, first: int = 0
    ) -> Tensor:
        """Few-step samples, (N, ...); see ``stepdistill.sampling.sample``.

        Args:
            shape: (N, ...).
            cond: conditions, each (N, ...).
            steps: number of steps, for callers that want to be sure or have a choice; None is its own sampler's.
            seed: the run's seed.
            first: number of the first sample.

        Raises:
            ValueError: if ``steps`` is not what the student was trained for.
        """
        sampler = self.sampler if steps is None else self.serving(steps).sampler
        device = next(self.parameters()).device
        return sample(self, shape, cond, sampler, seed=seed, first=first, device=device)
