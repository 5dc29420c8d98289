"""Frechet distance extrapolated to infinitely many generated samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.evaluation.metrics import MeanCov, Moments, check_bank, frechet_distance

SIZES = 15
FIRST = 5000


class FrechetInfinity(NamedTuple):
    """The extrapolated value and what it was fitted to."""

    value: float  # the intercept: an estimate without the bias c / N, which may come out below 0
    slope: float  # c of FD_N = value + c / N
    sizes: list[int]
    distances: list[float]


def frechet_infinity(
    real: MeanCov | Moments, fake: Tensor, sizes: int = SIZES, first: int | None = None, seed: int = 0
) -> FrechetInfinity:
    """FD infinity, arXiv:1911.07023: a line through Frechet distances of subsets against 1/N, read at 1/N = 0.

    Subsets are drawn without replacement, one for each size, evenly spaced from ``first`` to all samples. The line
    holds well above N = D; below it FD_N bends, and KID is the better number. Only the generated side is extrapolated:
    the reference's own N stays in the value.

    Args:
        real: the reference's statistics.
        fake: features of generated samples, (N, D) float.
        sizes: how many subsets; the paper takes 15.
        first: the smallest; default: 5000, or N / 10 where that is less.
        seed: of the shuffling.

    Raises:
        ValueError: if the bank is not finite, fewer than two sizes fit between ``first`` and N, or dimensions differ.
    """
    check_bank("fake features", fake)
    n = len(fake)
    first = min(FIRST, n // 10) if first is None else first
    if not 2 <= first < n or sizes < 2:
        raise ValueError(
            f"FD infinity needs 2 <= first < N and at least 2 sizes; got first={first}, N={n}, {sizes} sizes"
        )
    rng = torch.Generator().manual_seed(seed)
    counts = torch.linspace(first, n, sizes, dtype=torch.float64).round().long().unique().tolist()
    distances = []
    for count in counts:
        rows = torch.randperm(n, generator=rng)[:count].to(fake.device)
        distances.append(frechet_distance(real, MeanCov.of(fake[rows])))
    inverse = 1 / torch.tensor(counts, dtype=torch.float64)
    design = torch.stack([torch.ones_like(inverse), inverse], 1)
    value, slope = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[:, 0]
    return FrechetInfinity(float(value), float(slope), counts, distances)
