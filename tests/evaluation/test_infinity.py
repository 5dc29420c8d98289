"""The extrapolated Frechet distance removes the bias of few samples."""

from __future__ import annotations

import statistics

import pytest
import torch

from stepdistill.evaluation.infinity import frechet_infinity
from stepdistill.evaluation.metrics import MeanCov, Moments, frechet_distance


def bank(n: int, dim: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_extrapolation_removes_the_bias():
    """Truth by closed form: N(0, I) against N(0, 1.44 I) in 16 dimensions is 16 * 0.2^2."""
    truth = 16 * 0.2**2
    real = Moments(torch.zeros(16).double(), torch.eye(16).double())
    plain, extrapolated = [], []
    for i in range(12):
        fake = bank(800, 16, i, 1.2)
        plain.append(frechet_distance(real, MeanCov.of(fake)))
        extrapolated.append(frechet_infinity(real, fake, first=80, seed=i).value)
    bias, error = statistics.mean(plain) - truth, statistics.mean(extrapolated) - truth
    assert bias > 0.1
    assert abs(error) < bias / 5


def test_the_line_is_the_least_squares_fit_of_what_it_reports():
    real = MeanCov.of(bank(300, 6, 0))
    fit = frechet_infinity(real, bank(400, 6, 1), sizes=7)
    assert fit.sizes == [40, 100, 160, 220, 280, 340, 400]
    assert fit.distances[-1] == pytest.approx(frechet_distance(real, MeanCov.of(bank(400, 6, 1))))
    inverse = [1 / n for n in fit.sizes]
    slope, value = statistics.linear_regression(inverse, fit.distances)
    assert (fit.value, fit.slope) == pytest.approx((value, slope))
    assert fit.slope > 0


def test_impossible_sizes_are_named():
    real = MeanCov.of(bank(30, 2, 0))
    with pytest.raises(ValueError, match="first=1, N=15"):
        frechet_infinity(real, bank(15, 2, 0))
    with pytest.raises(ValueError, match="N=50"):
        frechet_infinity(real, bank(50, 2, 0), first=50)
