"""Laws of training times against their distribution functions; determinism of a step's draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.objective import Step
from stepdistill.parts.times import LogitNormal, LogNormal, OnGrid, Times, Uniform, renoise
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule

LAWS = [Uniform(), Uniform(0.02, 0.98), LogitNormal(), LogNormal(-1.2, 1.2), OnGrid((1.0, 0.5, 0.25))]


def ks(draws: Tensor, cdf: Tensor) -> float:
    """Kolmogorov's statistic times sqrt(n): above 1.95 once in a thousand when the law is right."""
    order = draws.argsort()
    n = len(draws)
    above = torch.arange(1, n + 1, dtype=torch.float64) / n - cdf[order]
    below = cdf[order] - torch.arange(n, dtype=torch.float64) / n
    return float(torch.maximum(above, below).max()) * math.sqrt(n)


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def draws(law: Times, schedule: Schedule, batch: int, steps: int) -> Tensor:
    """(steps, batch) times."""
    return torch.stack([law(schedule, batch, Step.at(i, 1)) for i in range(steps)])


# Step


def test_draws_depend_on_the_index_and_the_stream_and_nothing_else() -> None:
    def everything(step: Step) -> list[float]:
        return [*step.randn((3,)).tolist(), *step.rand(2).tolist(), *map(float, step.integers(1000, 3))]

    torch.manual_seed(1)
    reference = everything(Step.at(7, 0, 1, 2))
    torch.manual_seed(2)
    torch.randn(5)
    assert everything(Step.at(7, 0, 1, 2)) == reference
    others = [
        (8, 0, 1, 2),
        (7, 1, 1, 2),
        (7, 0, 0, 2),
        (7, 0, 1, 3),
        (7, 0, 2, 1),
        (7, 0, 1),
        (7, 0, 1, 2, 0),
        (0, 7, 1, 2),
    ]
    assert len({tuple(everything(Step.at(*stream))) for stream in [(7, 0, 1, 2), *others]}) == 1 + len(others)
    many = {float(Step.at(i, j).rand(1)) for i in range(100) for j in range(20)}
    assert len(many) == 2000


def test_a_step_draws_in_the_documented_types_and_ranges() -> None:
    step = Step.at(0, 3)
    assert (step.randn((2, 3)).dtype, step.randn((2, 3)).shape) == (torch.float32, (2, 3))
    uniform, whole = step.rand(10000), step.integers(5, 10000)
    assert (uniform.dtype, whole.dtype) == (torch.float64, torch.int64)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    assert ks(uniform, uniform) < 1.95
    assert_close(whole.bincount() / 2000, torch.ones(5), rtol=0, atol=0.08)
    normal = step.randn((20000,)).double()
    assert ks(normal, normal_cdf(normal)) < 1.95


def test_turns_share_what_they_are_given_and_nothing_by_default() -> None:
    shared: dict[str, Tensor] = {}
    Step.at(0, shared=shared).shared["x"] = torch.ones(1)
    assert "x" in Step.at(0, shared=shared).shared
    assert Step.at(0).shared == {}


# Laws


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_times_lie_on_the_schedule_and_repeat_with_the_step(schedule: Schedule, law: Times) -> None:
    t = law(schedule, 500, Step.at(3, 1))
    assert (t.shape, t.dtype) == ((500,), torch.float64)
    assert float(t.min()) >= 0 and float(t.max()) <= schedule.t_max
    assert_close(law(schedule, 500, Step.at(3, 1)), t, rtol=0, atol=0)
    assert not torch.equal(law(schedule, 500, Step.at(4, 1)), t)
    assert not torch.equal(law(schedule, 500, Step.at(3, 2)), t)


def test_uniform_times_are_uniform_between_their_fractions() -> None:
    t = draws(Uniform(0.2, 0.7), EDM(), 50, 200).flatten() / 80
    assert float(t.min()) >= 0.2 and float(t.max()) < 0.7
    assert ks(t, (t - 0.2) / 0.5) < 1.95


def test_every_batch_has_one_uniform_time_in_each_cell() -> None:
    for i in range(20):
        t = Uniform(0.1, 0.9)(RectifiedFlow(), 8, Step.at(i)).sort().values
        cells = (t - 0.1) / 0.8 * 8
        assert cells.floor().tolist() == list(range(8))


def test_every_sample_has_uniform_times_in_spite_of_stratification() -> None:
    """Without the shuffle sample k would always sit in cell k."""
    t = draws(Uniform(), RectifiedFlow(), 4, 3000)
    for k in range(4):
        assert ks(t[:, k], t[:, k]) < 1.95
    inside = (4 * t).frac()  # and within its cell too
    assert ks(inside.flatten(), inside.flatten()) < 1.95


def test_logit_normal_times_follow_their_law() -> None:
    for mean, std in ((0.0, 1.0), (-0.4, 1.5)):
        t = draws(LogitNormal(mean, std), RectifiedFlow(), 500, 20).flatten()
        assert ks(t, normal_cdf((torch.logit(t) - mean) / std)) < 1.95


def test_log_normal_times_have_the_same_noise_levels_on_every_schedule(schedule: Schedule) -> None:
    t = draws(LogNormal(-1.2, 1.2), schedule, 500, 20).flatten()
    c = schedule(t)
    inside = (t > 0) & (t < schedule.t_max)  # a VP table ends somewhere, and times stay on it
    assert float(inside.double().mean()) > 0.99
    z = ((c.sigma / c.alpha).log() + 1.2) / 1.2
    assert ks(z, normal_cdf(z)) < 1.95


def test_grid_times_are_equally_likely() -> None:
    t = draws(OnGrid((1.0, 0.5, 0.25)), EDM(), 100, 90).flatten()
    values, counts = t.unique(return_counts=True)
    assert_close(values, torch.tensor([20.0, 40.0, 80.0], dtype=torch.float64))
    assert_close(counts / 3000, torch.ones(3), rtol=0, atol=0.07)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"got low {low}, high {high}"):
        Uniform(low, high)


# Renoising


def test_renoised_samples_are_what_time_and_noise_say(schedule: Schedule) -> None:
    x0 = torch.randn(6, 2, 3, requires_grad=True)
    x_t, t, eps = renoise(schedule, x0, Uniform(0.1, 0.9), Step.at(0))
    c = schedule(t)
    for i in range(6):
        assert_close(x_t[i], float(c.alpha[i]) * x0[i] + float(c.sigma[i]) * eps[i])
    (grad,) = torch.autograd.grad(x_t.sum(), x0)
    assert_close(grad, c.alpha.float()[:, None, None].expand_as(x0))
    again = renoise(schedule, x0, Uniform(0.1, 0.9), Step.at(0))
    assert_close(again, (x_t, t, eps), rtol=0, atol=0)
    assert not torch.equal(renoise(schedule, x0, Uniform(0.1, 0.9), Step.at(1))[2], eps)


def test_renoising_uses_fresh_noise_for_every_element() -> None:
    _, _, eps = renoise(DiscreteVP.linear(), torch.zeros(100, 3, 10, 10), Uniform(), Step.at(0))
    flat = eps.flatten().double()
    assert ks(flat, normal_cdf(flat)) < 1.95
    assert len(flat.unique()) > 0.99 * len(flat)


@pytest.mark.parametrize("times", [(), (0.5, 1.2), (-0.1,), (float("nan"),)])
def test_grids_lie_within_the_range(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"times must be fractions of t_max, within \[0, 1\]; got \["):
        OnGrid(times)
