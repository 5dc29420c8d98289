"""Rollouts: one call with a graph, the inference sampler's own states, and the law of the stop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.denoiser import Cond
from stepdistill.objective import Batch, Step
from stepdistill.parts.rollout import BackwardSim, FromData, OneStep, Rollout
from stepdistill.sampling import Ddim, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student, mlp

GRID = (0.9, 0.6, 0.3)


class Watched(nn.Module):
    """A network that keeps what it was called with, and whether a graph was being built."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, width=16, depth=2, classes=3)
        self.calls: list[tuple[Tensor, Tensor, Cond, bool]] = []

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((x_t.detach(), t.double(), cond, torch.is_grad_enabled()))
        return self.net(x_t, t, **cond)


def student(schedule: Schedule, times: tuple[float, ...] = GRID, rule: StepRule | None = None) -> Student:
    return Student(Sampler(times, rule or Renoise()), Watched(), schedule, "v")


def batch(n: int = 4) -> Batch:
    x0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(9))
    return Batch({"labels": torch.arange(n) % 3}, (n, 2), x0)


@pytest.mark.parametrize("rollout", [OneStep(), FromData(), BackwardSim(), BackwardSim(last_only=True)], ids=str)
def test_exactly_one_call_builds_a_graph_and_it_is_the_last(schedule: Schedule, rollout: Rollout) -> None:
    for index in range(8):
        s = student(schedule)
        x0 = rollout(s, batch(), Step.at(index))
        graphs = [with_graph for *_, with_graph in s.net.calls]
        assert graphs == [False] * (len(graphs) - 1) + [True]
        assert len(graphs) == 1 or isinstance(rollout, BackwardSim)
        assert x0.shape == (4, 2)
        assert all(torch.equal(cond["labels"], batch().cond["labels"]) for _, _, cond, _ in s.net.calls)
        x0.sum().backward()
        # the gradient is that of one call at a fixed state
        x, t, cond, _ = s.net.calls[-1]
        twin = copy.deepcopy(s)
        twin.zero_grad(set_to_none=True)
        again = twin(x, t, cond)
        assert_close(again, x0, rtol=1e-5, atol=1e-5)
        again.sum().backward()
        for p, q in zip(s.parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rollout", [OneStep(), FromData(), BackwardSim(), BackwardSim(last_only=True)], ids=str)
def test_without_gradients_there_is_no_graph_at_all(rollout: Rollout) -> None:
    s = student(RectifiedFlow())
    with torch.no_grad():
        x0 = rollout(s, batch(), Step.at(0))
    assert not x0.requires_grad
    assert not any(with_graph for *_, with_graph in s.net.calls)


@pytest.mark.parametrize("rollout", [OneStep(), FromData(), BackwardSim(), BackwardSim(last_only=True)], ids=str)
def test_a_rollout_repeats_with_its_step(rollout: Rollout) -> None:
    s = student(RectifiedFlow())
    first = rollout(s, batch(), Step.at(5, 1))
    assert_close(rollout(s, batch(), Step.at(5, 1)), first, rtol=0, atol=0)
    assert not torch.equal(rollout(s, batch(), Step.at(6, 1)), first)


def test_one_step_starts_from_the_priors_noise_at_the_first_time(schedule: Schedule) -> None:
    s = student(schedule)
    x0 = OneStep()(s, batch(), Step.at(3))
    ((x, t, _, _),) = s.net.calls
    assert_close(x, Step.at(3).randn((4, 2)) * schedule.prior_std)
    assert_close(t, torch.full((4,), 0.9 * schedule.t_max, dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(x0, s(x, t, batch().cond), rtol=1e-5, atol=1e-5)


def test_one_step_is_the_first_call_of_the_sampler() -> None:
    """With a one-step grid it is the student's sample."""
    s = student(TrigFlow(0.5), (1.0,))
    x0 = OneStep()(s, batch(), Step.at(3))
    assert_close(s.sampler.run(s, Step.at(3).randn((4, 2)), batch().cond, torch.Generator()), x0)


def test_from_data_noises_real_samples_to_times_of_the_grid(schedule: Schedule) -> None:
    s = student(schedule)
    real = Batch(batch(600).cond, (600, 2), 3 + 0 * batch(600).x0)
    FromData()(s, real, Step.at(0))
    ((x, t, _, _),) = s.net.calls
    on_grid = torch.tensor(GRID, dtype=torch.float64) * schedule.t_max
    distance, which = (t[:, None] - on_grid).abs().min(1)
    assert float(distance.max()) < 1e-5 * schedule.t_max
    assert_close(which.bincount() / 200, torch.ones(3), rtol=0, atol=0.25)
    c = schedule(on_grid)
    for j in range(3):
        eps = (x[which == j] - float(c.alpha[j]) * 3) / float(c.sigma[j])
        assert abs(float(eps.mean())) < 0.2
        assert abs(float(eps.std()) - 1) < 0.12


@pytest.mark.parametrize("rule", [Ddim(), Renoise(), Tcd(0.5)], ids=str)
def test_the_state_at_the_stop_is_the_inference_samplers_state_for_the_same_noise(rule: StepRule) -> None:
    """The bug this guards against: training on noised data, or on another rule's states, while sampling by this."""
    schedule = EDM(2.0)
    s = student(schedule, GRID, rule)
    seen = set()
    for index in range(12):
        s.net.calls.clear()
        x0 = BackwardSim()(s, batch(), Step.at(index))
        x, t, _, _ = s.net.calls[-1]
        stop = min(range(3), key=lambda k: abs(GRID[k] * 2.0 - float(t[0])))
        seen.add(stop)
        assert len(s.net.calls) == stop + 1
        assert_close(t, torch.full((4,), GRID[stop] * 2.0, dtype=torch.float64), rtol=1e-6, atol=0)
        # the same draws, in the order in which the rollout makes them
        twin = Step.at(index)
        assert int(twin.integers(3, 1)) == stop
        with torch.no_grad():
            path = s.sampler.run(s, twin.randn((4, 2)), batch().cond, twin.rng, path=True)
        assert_close(x, path[:, stop], rtol=0, atol=0)
        if stop == 2:  # the last call's estimate is the sample itself
            assert_close(x0.detach(), path[:, -1])
    assert seen == {0, 1, 2}


def test_stops_are_uniform_and_shared_by_the_batch() -> None:
    s = student(RectifiedFlow())
    counts = torch.zeros(3)
    with torch.no_grad():
        for index in range(1200):
            s.net.calls.clear()
            BackwardSim()(s, batch(2), Step.at(index))
            counts[len(s.net.calls) - 1] += 1
            assert s.net.calls[-1][1].unique().numel() == 1
    assert float(((counts - 400) ** 2 / 400).sum()) < 13.8  # chi square of two degrees, once in a thousand


def test_backward_simulation_of_the_last_step_only_gives_the_samples_of_inference() -> None:
    s = student(RectifiedFlow())
    for index in range(6):
        s.net.calls.clear()
        x0 = BackwardSim(last_only=True)(s, batch(), Step.at(index))
        assert [graph for *_, graph in s.net.calls] == [False, False, True]
        twin = Step.at(index)
        with torch.no_grad():
            sample = s.sampler.run(s, twin.randn((4, 2)), batch().cond, twin.rng)
        assert_close(x0.detach(), sample)


def test_backward_simulation_of_one_step_is_one_step() -> None:
    """The same call at the same time, and samples of the same mean and spread."""
    s = student(TrigFlow(0.5), (1.0,))
    with torch.no_grad():
        simulated, direct = (r(s, batch(20000), Step.at(0)) for r in (BackwardSim(), OneStep()))
    (x, t, _, graph), (y, u, _, _) = s.net.calls
    assert not graph
    assert_close(t, u)
    assert_close(x.std(), torch.tensor(0.5), rtol=0.02, atol=0)
    assert_close(y.std(), torch.tensor(0.5), rtol=0.02, atol=0)
    assert_close(simulated.mean(0), direct.mean(0), rtol=0, atol=0.03)
    assert_close(simulated.T.cov(), direct.T.cov(), rtol=0, atol=0.03)


def test_real_data_that_are_not_there_are_asked_for() -> None:
    teacher = GaussianTeacher(torch.zeros(2), torch.eye(2), DiscreteVP.linear())
    student = exact_student(teacher, Sampler(trailing(1)))
    with pytest.raises(ValueError, match=r"objective.rollout FromData needs data with x0; use BackwardSim"):
        FromData()(student, Batch({}, (3, 2)), Step.at(0))
