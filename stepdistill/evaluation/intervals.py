"""Error bars that hold what they say: 95 % intervals that cover the truth 95 times in 100.

=====================================  ==========================================================================
metric of a set (FD, recall, CMMD ..)  ``t_interval`` over two or more generation seeds, at least three if you can
the same, A against B                  ``t_difference`` over the same seeds: the noise that both share drops out
KID of one set                         ``t_interval`` of ``mmd.kid_blocks``
mean over prompts (CLIP score ..)      ``bootstrap_mean``; A against B ``paired_bootstrap``
fraction of images (accuracy ..)       ``wilson_interval``
=====================================  ==========================================================================

The truth that an interval speaks of is the expectation at the given number of samples: FD_N, not FD infinity. A
bootstrap over images is no interval for a Frechet distance: duplicates lower the rank, and the distance rises
(measured: 0.278 for a value of 0.129, where fresh seeds give 0.149). Intervals over sampling seeds do not speak of
training again. ``eval/intervals.py`` measures how often each covers a known truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

RESAMPLES = 10_000
"""Of a bootstrap."""
AT_ONCE = 2**22
"""Drawn indices held together."""

Method = Literal["student-t", "bootstrap", "wilson"]


@dataclass(frozen=True)
class Interval:
    """An estimate and where the truth lies with the stated confidence."""

    value: float
    low: float
    high: float
    method: Method
    n: int
    """Independent values that it rests on: seeds, blocks, prompts or images."""

    @property
    def half_width(self) -> float:
        """The larger of the distances to the ends, what stands after a ±."""
        return max(self.high - self.value, self.value - self.low)

    @property
    def decides(self) -> bool:
        """Whether zero lies outside: for a difference, whether one side is better."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Mean of A minus B over prompts, and how often A has the larger value."""

    difference: Interval
    win_rate: float
    """Share of prompts at which A is larger, ties counted half."""


def t_interval(values: Sequence[float] | Tensor, level: float = 0.95) -> Interval:
    """Student-t interval ``mean ± t(m - 1) s / sqrt(m)`` of m independent values, such as those of m seeds.

    With two seeds t is 12.7, with three 4.3, with five 2.8: the interval of few seeds is wide because so little is
    known of the spread, and narrower ones (the standard error, ``1.96 s``) would miss far more often than they say. Two
    seeds that agree by chance, as fractions of few images may, give no width at all: take three.

    Raises:
        ValueError: if there are fewer than two values or one is not finite.
    """
    x = _values("values", values, level)
    if len(x) < 2:
        raise ValueError(f"an interval over seeds or blocks needs at least 2 values, got {len(x)}")
    half = float(stdtrit(len(x) - 1, (1 + level) / 2)) * float(x.std()) / math.sqrt(len(x))
    mean = float(x.mean())
    return Interval(mean, mean - half, mean + half, "student-t", len(x))


def t_difference(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, level: float = 0.95) -> Interval:
    """Student-t interval of A minus B, seed by seed: both must have been made with the same seeds, in one order.

    Raises:
        ValueError: if the counts differ, are below two, or a value is not finite.
    """
    x, y = _pair(a, b, level)
    return t_interval(x - y, level)


def bootstrap_mean(values: Sequence[float] | Tensor, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Bootstrap interval of a mean over prompts or images, such as a CLIP score.

    Args:
        values: (P,), or (P, S) with S seeds of each prompt: prompts are what is drawn, seeds are averaged first.
        level: of confidence.
        seed: of the 10,000 resamples.

    Raises:
        ValueError: if there are fewer than two prompts or a value is not finite.
    """
    x = _per_prompt(values, level)
    if len(x) < 2:
        raise ValueError(f"a bootstrap needs at least 2 prompts, got {len(x)}")
    rng = torch.Generator().manual_seed(seed)
    # Resampled means spread by the biased deviation; the factor makes up for it where there are few prompts.
    widen = math.sqrt(len(x) / (len(x) - 1))
    gaps, left = [], RESAMPLES
    while left:
        part = min(left, max(1, AT_ONCE // len(x)))
        rows = torch.randint(len(x), (part, len(x)), generator=rng)
        gaps.append(x[rows].mean(1) - x.mean())
        left -= part
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (x.mean() + widen * torch.cat(gaps).quantile(tail)).tolist()
    return Interval(float(x.mean()), low, high, "bootstrap", len(x))


def paired_bootstrap(
    a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, *, level: float = 0.95, seed: int = 0
) -> Comparison:
    """A minus B over the same prompts and the same noise, prompts resampled in pairs.

    Args:
        a: (P,) or (P, S), as ``bootstrap_mean``.
        b: as many, in the same order.
        level: of confidence.
        seed: of the resamples.

    Raises:
        ValueError: if the shapes differ, there are fewer than two prompts, or a value is not finite.
    """
    x, y = _pair(a, b, level)
    gap = _per_prompt(x - y, level)
    wins = ((gap > 0).double() + 0.5 * (gap == 0).double()).mean()
    return Comparison(bootstrap_mean(gap, level=level, seed=seed), float(wins))


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a fraction, such as accuracy; Wilson (1927).

    Unlike ``p ± 1.96 sqrt(p (1 - p) / n)`` it stays within [0, 1] and holds near 0 and 1.

    Args:
        successes: how many of n were right.
        n: images, drawn independently.
        level: of confidence.

    Raises:
        ValueError: if not 0 <= successes <= n and n >= 1.
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z, p = float(ndtri((1 + level) / 2)), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), "wilson", n)


def supported_digits(interval: Interval) -> int | None:
    """Digits behind the point that an interval supports: those down to the first digit of its half width.

    The half width is rounded up to that digit, as ``records.format_value`` does: 12.346 ± 0.0123 shows 2 digits
    (12.35 ± 0.02), 1234 ± 56 shows -1 (1230 ± 60).

    Returns:
        The number of decimals, negative for tens; None of an interval without width, which supports them all.
    """
    half = interval.half_width
    if half <= 0:
        return None
    place = math.floor(math.log10(half))
    # 0.097 rounds up to 0.1, whose digit is one place further left.
    return -(place + 1) if math.ceil(float(f"{half / 10.0**place:.6g}")) >= 10 else -place


def _values(name: str, values: Sequence[float] | Tensor, level: float) -> Tensor:
    _check_level(level)
    x = torch.as_tensor(values, dtype=torch.float64).cpu()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} hold NaN or infinity in {int((~x.isfinite()).sum())} of {x.numel()} places")
    return x


def _per_prompt(values: Sequence[float] | Tensor, level: float) -> Tensor:
    x = _values("values", values, level)
    if x.ndim not in (1, 2):
        raise ValueError(f"values must be (prompts,) or (prompts, seeds), got {tuple(x.shape)}")
    return x if x.ndim == 1 else x.mean(1)


def _pair(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, level: float) -> tuple[Tensor, Tensor]:
    x, y = _values("values of A", a, level), _values("values of B", b, level)
    if x.shape != y.shape:
        raise ValueError(
            f"A has {tuple(x.shape)} and B {tuple(y.shape)} values; a pair needs the same seeds or prompts"
        )
    return x, y


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
