"""How training times are drawn. Values to put into an objective's fields; all in fractions of the schedule's t_max."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.objective import Step
from stepdistill.schedule import Schedule


class Times(ABC):
    """A law of training times."""

    @abstractmethod
    def fractions(self, schedule: Schedule, n: int, step: Step) -> Tensor:
        """``n`` draws in [0, 1], as fractions of ``schedule.t_max``, float64."""

    def __call__(self, schedule: Schedule, n: int, step: Step) -> Tensor:
        """``n`` times of ``schedule``, (n,), float64."""
        return self.fractions(schedule, n, step) * schedule.t_max


@dataclass(frozen=True)
class Uniform(Times):
    """Uniform between two fractions, stratified over the batch: one draw in each of n equal cells, so that the losses
    of different steps compare; every single time is still uniform.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times need 0 <= low < high <= 1; got low {self.low}, high {self.high}")

    def fractions(self, schedule: Schedule, n: int, step: Step) -> Tensor:
        """See ``Times``."""
        return self.low + (self.high - self.low) * step.stratified(n)


@dataclass(frozen=True)
class LogitNormal(Times):
    """``sigmoid(mean + std z)`` (arXiv:2403.03206 sec. 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        _positive(self.std)

    def fractions(self, schedule: Schedule, n: int, step: Step) -> Tensor:
        """See ``Times``."""
        return torch.sigmoid(self.mean + self.std * step.randn((n,)).double())


@dataclass(frozen=True)
class LogNormal(Times):
    """``log(sigma / alpha) ~ N(mean, std^2)`` (EDM, arXiv:2206.00364): the same noise levels on every schedule."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        """Check the range."""
        _positive(self.std)

    def fractions(self, schedule: Schedule, n: int, step: Step) -> Tensor:
        """See ``Times``."""
        log_sigma = self.mean + self.std * step.randn((n,)).double()
        return (schedule.t_from_logsnr(-2 * log_sigma) / schedule.t_max).clamp(0.0, 1.0)


@dataclass(frozen=True)
class UShaped(Times):
    """Density proportional to ``exp(a t) + exp(a (1 - t))``, so both ends come more often than the middle, by
    ``cosh(a / 2)`` (arXiv:2405.20320 sec. 4.1; its print lacks the 1, its code has it). Stratified as ``Uniform``.
    """

    a: float = 4.0
    """How deep the U is."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.a < 100:
            raise ValueError(f"times need 0 < a < 100; got {self.a}")

    def fractions(self, schedule: Schedule, n: int, step: Step) -> Tensor:
        """See ``Times``; by the inverse of ``1/2 + sinh(a (t - 1/2)) / (2 sinh(a / 2))``."""
        u = Uniform().fractions(schedule, n, step)
        return (0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a).clamp(0.0, 1.0)


def _positive(std: float) -> None:
    if not 0 < std < math.inf:
        raise ValueError(f"times need a standard deviation above 0; got {std}")


@dataclass(frozen=True)
class OnGrid(Times):
    """One of the given times, all equally likely."""

    times: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ValueError(f"times must be fractions of t_max, within [0, 1]; got {list(self.times)}")

    def fractions(self, schedule: Schedule, n: int, step: Step) -> Tensor:
        """See ``Times``."""
        grid = torch.tensor(self.times, dtype=torch.float64, device=step.rng.device)
        return grid[step.integers(len(grid), n)]


def renoise(schedule: Schedule, x0: Tensor, times: Times, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Noise samples to freshly drawn times.

    Args:
        schedule: the noise path.
        x0: samples, (B, ...); gradients flow through.
        times: law of the times.
        step: source of randomness.

    Returns:
        x_t (B, ...), t (B,), eps (B, ...).
    """
    t, eps = times(schedule, len(x0), step), step.randn(x0.shape)
    return schedule.add_noise(x0, eps, t), t, eps
