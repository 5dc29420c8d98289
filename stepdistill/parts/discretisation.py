"""Grids of consistency methods: how many intervals at a step, and at which times they end.

Values to put into an objective's fields.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.schedule import Schedule


@dataclass(frozen=True)
class Doubling:
    """Numbers of intervals that double in equal stages (iCT, arXiv:2310.14189 sec. 3.4)."""

    start: int = 10
    """Intervals at the start; few make the target travel far, many make it exact."""
    end: int = 1280
    """Intervals at the end."""
    until: int = 400_000
    """Steps over which it doubles; the last of the stages has ``end`` intervals."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not 1 <= self.start <= self.end:
            raise ValueError(f"a grid needs 1 <= start <= end intervals; got {self.start} and {self.end}")

    def at(self, index: int) -> int:
        """Intervals at step ``index``."""
        stages = 1 + math.ceil(math.log2(self.end / self.start))
        stage = min(stages * index // max(self.until, 1), stages - 1)
        return min(self.start << stage, self.end)


def noise_level(schedule: Schedule, t: Tensor) -> Tensor:
    """``sigma / alpha`` at times ``t``, EDM's sigma on any path: 0 at the data, inf where alpha = 0. Float64."""
    return torch.exp(-schedule.logsnr(t) / 2)


def time_of(schedule: Schedule, level: Tensor) -> Tensor:
    """The time at which ``sigma / alpha`` is ``level``; exactly 0 at 0. Float64."""
    return torch.where(level > 0, schedule.t_from_logsnr(-2 * level.log()), 0.0)


class Spacing(ABC):
    """Where the ends of the intervals lie."""

    @abstractmethod
    def ends(self, schedule: Schedule, top: Tensor, n: int) -> Tensor:
        """``n + 1`` rising times, (n + 1,) float64; the first and the last will be 0 and ``top`` whatever they are."""

    def grid(self, schedule: Schedule, own: tuple[float, ...], n: int) -> Tensor:
        """Times from the data to where the student starts, with all of the student's own times among them.

        Each of its times takes the place of the nearest end that is free, so it is trained where it will be called.

        Args:
            schedule: the noise path.
            own: the student's times as fractions of t_max, falling, at most ``n`` of them.
            n: number of intervals.

        Returns:
            (n + 1,), strictly rising, float64, on the CPU.
        """
        mine = torch.tensor(own, dtype=torch.float64) * schedule.t_max
        ends = self.ends(schedule, mine[0], n)
        ends[0], ends[n] = 0.0, mine[0]
        grid, above = ends.clone(), n
        for k in range(1, len(own)):
            # below the place of the time before, and with room for those that follow
            above = max(min(int((ends - mine[k]).abs().argmin()), above - 1), len(own) - k)
            grid[above] = mine[k]
        return grid


@dataclass(frozen=True)
class Even(Spacing):
    """Equal in time."""

    def ends(self, schedule: Schedule, top: Tensor, n: int) -> Tensor:
        """See ``Spacing``."""
        return torch.arange(n + 1, dtype=torch.float64) / n * top


@dataclass(frozen=True)
class Karras(Spacing):
    """Equal in ``(sigma / alpha)^(1 / rho)`` (EDM, arXiv:2206.00364 eq. 5): the same noise levels on every path."""

    sigma_min: float = 0.002
    """Where the grid would begin; this end is the data themselves."""
    sigma_max: float = 80.0
    """Where it ends, or lower where the path does. The last end stands at the student's first time, also where
    nothing is left of the data there, and counts as this level."""
    rho: float = 7.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.sigma_min < self.sigma_max < math.inf or not self.rho > 0:
            raise ValueError(
                f"spacing needs 0 < sigma_min < sigma_max and rho above 0; got {self.sigma_min}, {self.sigma_max} and "
                f"{self.rho}"
            )

    def ends(self, schedule: Schedule, top: Tensor, n: int) -> Tensor:
        """See ``Spacing``."""
        highest = min(self.sigma_max, float(noise_level(schedule, top)))
        low, high = self.sigma_min ** (1 / self.rho), highest ** (1 / self.rho)
        return time_of(schedule, torch.linspace(low, high, n + 1, dtype=torch.float64) ** self.rho)

    def levels(self, schedule: Schedule, grid: Tensor) -> Tensor:
        """``sigma / alpha`` at the ends of a grid, finite and above 0: the first and the last are nominal.

        Raises:
            ValueError: if they do not rise, since a time of the student's lies above ``sigma_max``.
        """
        levels = noise_level(schedule, grid)
        low, high = float(levels[1]), float(levels[-2])  # the outermost but the ends
        if not self.sigma_min < low <= high < self.sigma_max:
            raise ValueError(
                f"spacing.sigma_min {self.sigma_min:g} and sigma_max {self.sigma_max:g} must enclose all of the "
                f"student's later times; sigma / alpha is {low:g} to {high:g} there"
            )
        return levels.clamp(self.sigma_min, self.sigma_max)
