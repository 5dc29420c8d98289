"""A denoiser that remembers the few-step sampler it was trained for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond, Denoiser, plain_call
from stepdistill.sampling import Sampler, sample
from stepdistill.schedule import Kind, Schedule


class Student(Denoiser):
    """A ``Denoiser`` and its grid: sampling it on any other grid is an error, not a bad picture.

    Args:
        sampler: times and rule it is trained for, and exported with.
        net: see ``Denoiser``, as all the others.
    """

    def __init__(
        self,
        sampler: Sampler,
        net: nn.Module,
        schedule: Schedule,
        kind: Kind,
        call: Call = plain_call,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(net, schedule, kind, call, dtype)
        self.sampler = sampler

    def sample(
        self, shape: Sequence[int], cond: Cond, *, steps: int | None = None, seed: int = 0, first: int = 0
    ) -> Tensor:
        """Few-step samples, (N, ...); see ``stepdistill.sampling.sample``.

        Args:
            shape: (N, ...).
            cond: conditions, each (N, ...).
            steps: number of steps, for callers that want to be sure; None is what it was trained for.
            seed: the run's seed.
            first: number of the first sample.

        Raises:
            ValueError: if ``steps`` is not what the student was trained for.
        """
        if steps is not None and steps != self.sampler.steps:
            grid = ", ".join(f"{t:g}" for t in self.sampler.times)
            raise ValueError(
                f"steps {steps}: this student was trained for {self.sampler.steps} (times {grid}); "
                f"use steps {self.sampler.steps}, or distil one for {steps}"
            )
        device = next(self.parameters()).device
        return sample(self, shape, cond, self.sampler, seed=seed, first=first, device=device)
