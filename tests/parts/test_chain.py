"""The noising chain: its levels, its law, and a length that goes where the discriminator's certainty sends it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from stepdistill.objective import Step
from stepdistill.parts.chain import ChainLength, NoiseChain
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow

SCHEDULES = (DiscreteVP.linear(), DiscreteVP.scaled_linear(), RectifiedFlow(), EDM(), TrigFlow())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_ratio_of_noise_to_data_is_that_of_the_papers_chain_on_every_schedule(schedule: Schedule) -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    for length, noise in ((0.01, 0.05), (0.5, 0.5), (0.8, 0.05)):
        chain = NoiseChain(length=length, noise=noise, clean=0.0)
        c = schedule(chain(schedule, 4000, Step.at(0)))
        ratio = (c.sigma / c.alpha).max()
        last = abar[round(1000 * length) - 1]
        by_hand = noise * ((1 - last) / last).sqrt()
        assert_close(ratio, by_hand, rtol=5e-3, atol=0)
        assert float(ratio) <= float(by_hand) * (1 + 1e-6)


def test_steps_are_drawn_in_proportion_to_their_number_and_some_samples_are_clean() -> None:
    """P(t) ~ t on the steps 1 ... T of the paper: the distribution function is (t / T)^2."""
    schedule, n = DiscreteVP.linear(), 20_000
    for priority, power in ((True, 2), (False, 1)):
        chain = NoiseChain(length=0.4, noise=1.0, clean=0.25, priority=priority)
        t = chain(schedule, n, Step.at(1))  # at noise 1 the chain's steps are the schedule's own times
        clean = t == 0
        assert abs(float(clean.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
        steps = t[~clean]
        for share in (0.1, 0.2, 0.3):
            below = float((steps <= share).double().mean())
            assert abs(below - (share / 0.4) ** power) < 0.02
        assert float(steps.max()) <= 0.4 + 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_clean_sample_is_left_as_it_is(schedule: Schedule) -> None:
    t = NoiseChain(clean=0.999)(schedule, 50, Step.at(0))
    x, eps = torch.randn(50, 2), torch.randn(50, 2)
    assert bool((t == 0).sum() > 40)
    assert_close(schedule.add_noise(x, eps, t)[t == 0], x[t == 0], rtol=0, atol=0)


def test_the_length_follows_the_papers_rule() -> None:
    """p <- clip(p + sign(r_d - target) * batch * every / ramp, 0, 1) every few batches, re-derived with floats."""
    generator = torch.Generator().manual_seed(0)
    chain, p, pending = ChainLength(target=0.6, every=4, ramp=1000), 0.0, []
    reached = []
    for batch in range(120):
        centre = 2.0 if batch < 60 else 0.2  # sure of real samples at first, then not
        logits = centre + torch.randn(8, 5, generator=generator)
        pending.append(sum(1 if v > 0 else -1 for v in logits.flatten().tolist()) / 40)
        r = chain.watch(logits)
        assert float(r) == pytest.approx(pending[-1])
        if len(pending) == 4:
            p = min(max(p + math.copysign(8 * 4 / 1000, sum(pending) / 4 - 0.6), 0.0), 1.0)
            pending = []
        assert float(chain.reach) == pytest.approx(p, abs=1e-5)
        reached.append(p)
    assert max(reached) == pytest.approx(15 * 0.032)  # fifteen changes up, then down again to nothing
    assert reached[-1] == 0.0


@pytest.mark.parametrize(("logit", "end"), [(1.0, 1.0), (-1.0, 0.0)])
def test_the_length_stays_within_its_range(logit: float, end: float) -> None:
    chain = ChainLength(target=0.0, every=1, ramp=30)
    chain.reach.fill_(0.5)
    for _ in range(10):
        chain.watch(torch.full((10, 2), logit))
    assert float(chain.reach) == end


def test_exactly_on_target_nothing_moves_and_no_graph_is_kept() -> None:
    chain = ChainLength(target=0.5, every=1, ramp=100)
    chain.reach.fill_(0.25)
    logits = torch.tensor([[1.0, 1.0, 1.0, -1.0]], requires_grad=True)
    assert not chain.watch(logits).requires_grad
    assert float(chain.reach) == 0.25


def test_all_of_it_is_state_of_a_run() -> None:
    """A run that is stopped between two changes goes on with the batches that it has counted."""
    chain, again = (ChainLength(target=0.6, every=4, ramp=100) for _ in range(2))
    assert list(chain.parameters()) == [] and set(chain.state_dict()) == {"reach", "signs", "seen"}
    for _ in range(7):
        chain.watch(torch.ones(2, 1))
    again.load_state_dict(chain.state_dict())
    for module in (chain, again):
        module.watch(torch.ones(2, 1))
    assert float(chain.reach) == float(again.reach) == pytest.approx(2 * 0.08)


@pytest.mark.parametrize("bad", [{"length": 0.0}, {"length": 1.1}, {"noise": 0.0}, {"clean": 1.0}, {"clean": -0.1}])
def test_a_chain_out_of_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(
        ValueError, match=r"a noise chain needs length in \(0, 1\], noise above 0 and clean in \[0, 1\)"
    ):
        NoiseChain(**bad)
