"""The U-shaped law of times against its density, integrated by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from stepdistill.objective import Step
from stepdistill.parts.times import UShaped
from stepdistill.schedule import EDM, RectifiedFlow, Schedule


def drawn(a: float, n: int = 20_000) -> torch.Tensor:
    return UShaped(a).fractions(RectifiedFlow(), n, Step.at(0, 2))


@pytest.mark.parametrize("a", [1.0, 4.0, 12.0])
def test_draws_fill_the_integral_of_the_density(a: float) -> None:
    """The distribution function by the trapezoid rule; stratified draws follow it to one cell of 1 / n."""
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = torch.exp(a * t) + torch.exp(a * (1 - t))
    cdf = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, t)])
    cdf = cdf / cdf[-1]
    ordered = drawn(a).sort().values
    at_draws = cdf[(ordered * 200_000).round().long()]
    ranks = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert_close(at_draws, ranks.double(), rtol=0, atol=1e-4)


def test_ends_come_more_often_than_the_middle_by_a_hyperbolic_cosine() -> None:
    t = drawn(4.0, 200_000)
    width = 0.01
    ends = ((t < width) | (t > 1 - width)).double().mean() / 2
    middle = ((t - 0.5).abs() < width / 2).double().mean()
    # over the width of a bin the density falls from the end by about 2 %
    assert float(ends / middle) == pytest.approx(math.cosh(2.0), rel=0.04)
    assert math.cosh(2.0) == pytest.approx(3.762, abs=1e-3)
    assert float(t.mean()) == pytest.approx(0.5, abs=1e-3)


def test_draws_are_fractions_of_any_schedule_and_stay_inside() -> None:
    t = drawn(4.0)
    assert t.dtype == torch.float64 and float(t.min()) >= 0 and float(t.max()) <= 1
    schedules: list[Schedule] = [RectifiedFlow(), EDM(80.0)]
    flow, edm = (UShaped()(schedule, 16, Step.at(1)) for schedule in schedules)
    assert_close(edm, 80 * flow)


@pytest.mark.parametrize("a", [0.0, -1.0, float("nan"), 1e3])
def test_a_law_that_is_no_u_is_refused(a: float) -> None:
    with pytest.raises(ValueError, match="times need 0 < a < 100; got"):
        UShaped(a)
