"""Weights of noise levels against the errors that they stand for."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from stepdistill.functional.weights import Even, SnrPlusOne, TruncatedSnr
from stepdistill.schedule import DiscreteVP, convert


def test_snr_plus_one_makes_an_error_of_the_clean_estimate_one_of_v() -> None:
    schedule, t = DiscreteVP.linear(), torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    x_t, a, b = torch.randn(3, 4, 5, dtype=torch.float64)
    c = schedule.coeffs(t, x_t)
    of_v = (convert(a, x_t, c, "x0", "v") - convert(b, x_t, c, "x0", "v")).square().mean(1)
    assert_close(SnrPlusOne()(schedule.logsnr(t)) * (a - b).square().mean(1), of_v)


def test_the_truncated_weight_is_the_larger_of_the_errors_of_noise_and_clean_sample() -> None:
    schedule, t = DiscreteVP.linear(), torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    x_t, a, b = torch.randn(3, 4, 5, dtype=torch.float64)
    c = schedule.coeffs(t, x_t)
    of_eps = (convert(a, x_t, c, "x0", "eps") - convert(b, x_t, c, "x0", "eps")).square().mean(1)
    of_x0 = (a - b).square().mean(1)
    assert bool((of_eps > of_x0).any()) and bool((of_eps < of_x0).any())
    assert_close(TruncatedSnr()(schedule.logsnr(t)) * of_x0, torch.maximum(of_eps, of_x0))


def test_weights_are_finite_where_nothing_of_the_data_is_left() -> None:
    logsnr = torch.tensor([-math.inf, 0.0, math.log(4.0)], dtype=torch.float64)
    assert TruncatedSnr()(logsnr).tolist() == [1.0, 1.0, 4.0]
    assert SnrPlusOne()(logsnr).tolist() == [1.0, 2.0, 5.0]
    assert Even()(logsnr).tolist() == [1.0, 1.0, 1.0]
