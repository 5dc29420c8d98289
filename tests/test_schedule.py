"""Schedules and conversions against hand-written formulas, autodiff and diffusers' tables."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor
from torch.testing import assert_close

from stepdistill.schedule import EDM, KINDS, Coeffs, DiscreteVP, KarrasEDM, RectifiedFlow, Schedule, TrigFlow, convert

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
LOOSE = {"rtol": 1e-5, "atol": 1e-7}  # diffusers' tables are float32


def draw(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64)


def table_times(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) / n


def rescale_snr(schedule: DiscreteVP) -> Tensor:
    """The table shifted to zero terminal SNR, q <- (q - q_T) q_0 / (q_0 - q_T) (arXiv:2305.08891 alg. 1)."""
    q = schedule(table_times(schedule.n)).alpha
    return ((q - q[-1]) * q[0] / (q[0] - q[-1])).square()


def all_kinds(x0: Tensor, eps: Tensor, c: Coeffs) -> dict[str, Tensor]:
    """What a perfect network of each kind says about one pair (x0, eps)."""
    return {
        "x0": x0,
        "eps": eps,
        "v": c.alpha * eps - c.sigma * x0,
        "velocity": c.dalpha * x0 + c.dsigma * eps,
    }


@pytest.mark.parametrize("src", KINDS)
@pytest.mark.parametrize("dst", KINDS)
def test_every_conversion_recovers_the_other_kind(schedule: Schedule, interior: Tensor, src: str, dst: str) -> None:
    x0, eps = draw(9, 2, 3), draw(9, 2, 3)
    c = schedule.coeffs(interior, x0)
    x_t = c.alpha * x0 + c.sigma * eps
    known = all_kinds(x0, eps, c)
    assert_close(convert(known[src], x_t, c, src, dst), known[dst], **TIGHT)


@pytest.mark.parametrize("src", KINDS)
@pytest.mark.parametrize("dst", KINDS)
def test_there_and_back_is_the_identity_for_any_prediction(
    schedule: Schedule, interior: Tensor, src: str, dst: str
) -> None:
    x_t, pred = draw(9, 4), draw(9, 4)  # a network's answer need not fit any (x0, eps)
    c = schedule.coeffs(interior, x_t)
    assert_close(convert(convert(pred, x_t, c, src, dst), x_t, c, dst, src), pred, **TIGHT)


def test_conversions_match_the_textbook_formulas() -> None:
    """The per-path tables of the literature, each written out by hand."""
    x_t, pred = draw(5, 3), draw(5, 3)

    flow, t = RectifiedFlow(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    c, t = flow.coeffs(t, x_t), t[:, None]
    assert_close(convert(pred, x_t, c, "velocity", "x0"), x_t - t * pred, **TIGHT)
    assert_close(convert(pred, x_t, c, "velocity", "eps"), x_t + (1 - t) * pred, **TIGHT)

    edm, t = EDM(), torch.linspace(0.1, 60, 5, dtype=torch.float64)
    c, t = edm.coeffs(t, x_t), t[:, None]
    assert_close(convert(pred, x_t, c, "velocity", "x0"), x_t - t * pred, **TIGHT)
    assert_close(convert(pred, x_t, c, "velocity", "eps"), pred, **TIGHT)

    vp, t = DiscreteVP.linear(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    c = vp.coeffs(t, x_t)
    assert_close(convert(pred, x_t, c, "eps", "x0"), (x_t - c.sigma * pred) / c.alpha, **TIGHT)
    assert_close(convert(pred, x_t, c, "v", "x0"), c.alpha * x_t - c.sigma * pred, **TIGHT)
    assert_close(convert(pred, x_t, c, "v", "eps"), c.sigma * x_t + c.alpha * pred, **TIGHT)

    sd = 0.5
    trig, t = TrigFlow(sd), torch.linspace(0.1, 1.5, 5, dtype=torch.float64)
    c, t = trig.coeffs(t, x_t), t[:, None]
    velocity = sd * pred  # sCM's F, with sigma_d F = dx/dt
    assert_close(convert(velocity, x_t, c, "velocity", "x0"), t.cos() * x_t - t.sin() * sd * pred, **TIGHT)
    assert_close(convert(velocity, x_t, c, "velocity", "eps"), (t.sin() * x_t + t.cos() * sd * pred) / sd, **TIGHT)


@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
def test_conversions_to_clean_are_finite_at_pure_noise_and_exact(kind: str) -> None:
    for schedule in (RectifiedFlow(), TrigFlow(0.5), DiscreteVP(rescale_snr(DiscreteVP.scaled_linear()))):
        x0, eps = draw(3, 4), draw(3, 4)
        c = schedule.coeffs(torch.full((3,), schedule.t_max, dtype=torch.float64), x0)
        assert_close(convert(all_kinds(x0, eps, c)[kind], c.sigma * eps, c, kind, "x0"), x0, **TIGHT)


@pytest.mark.parametrize("kind", ["eps", "v", "velocity"])
def test_every_kind_gives_the_state_itself_as_clean_at_time_zero(schedule: Schedule, kind: str) -> None:
    """The boundary condition of consistency models; an x0 network has to learn it instead."""
    x_t = draw(3, 4)
    c = schedule.coeffs(torch.zeros(3, dtype=torch.float64), x_t)
    assert_close(convert(draw(3, 4), x_t, c, kind, "x0"), x_t, rtol=0, atol=0)


def test_an_unknown_kind_is_named() -> None:
    c = Coeffs(*torch.ones(4))
    with pytest.raises(ValueError, match="'noise'"):
        convert(torch.ones(1), torch.ones(1), c, "noise", "x0")


def test_derivatives_match_autodiff_and_differences(schedule: Schedule, interior: Tensor) -> None:
    t = interior.clone().requires_grad_()
    c = schedule(t)
    for value, slope, name in ((c.alpha, c.dalpha, "alpha"), (c.sigma, c.dsigma, "sigma")):
        (auto,) = torch.autograd.grad((value + 0 * t).sum(), t, retain_graph=True)  # a constant has no graph to t
        assert_close(slope.detach(), auto, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        h = 1e-6
        numeric = (getattr(schedule(interior + h), name) - getattr(schedule(interior - h), name)) / (2 * h)
        assert_close(slope.detach(), numeric, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_paths_are_the_ones_of_the_papers() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    flow, edm, trig = RectifiedFlow()(t), EDM()(80 * t), TrigFlow(0.5)(math.pi / 2 * t.double())
    one = torch.ones(3, dtype=torch.float64)
    assert_close(flow, Coeffs(1 - t.double(), t.double(), -one, one), **TIGHT)
    assert_close(edm, Coeffs(one, 80 * t.double(), 0 * one, one), **TIGHT)
    assert_close(trig.alpha**2 + (trig.sigma / 0.5) ** 2, one, **TIGHT)
    assert_close(trig.sigma / trig.alpha, 0.5 * torch.tan(math.pi / 2 * t.double()), **TIGHT)
    assert (flow.alpha.dtype, EDM().prior_std, TrigFlow(0.5).prior_std) == (torch.float64, 80.0, 0.5)


def test_even_times_of_karras_path_are_edms_own_noise_levels() -> None:
    """Beside diffusers' grid, whose last sigma is ours at 1 / 18."""
    schedule, grid = KarrasEDM(), torch.arange(18, 0, -1, dtype=torch.float64) / 18
    sigma = schedule(grid).sigma
    scheduler = EDMEulerScheduler(sigma_min=float(sigma[-1]))
    scheduler.set_timesteps(18)
    assert_close(sigma, scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0)
    assert_close(schedule(torch.tensor([1.0, 1e-12])).sigma, torch.tensor([80.0, 2e-9]).double(), rtol=0.01, atol=0)
    few = torch.linspace(1e-7, 1e-5, 50, dtype=torch.float64)  # both pieces, and where they meet
    assert_close(schedule.t_from_logsnr(schedule.logsnr(few)), few, rtol=1e-9, atol=0)
    assert bool((schedule(few).sigma.diff() > 0).all())


def test_noise_starts_at_zero_and_grows(schedule: Schedule) -> None:
    t = torch.linspace(0, schedule.t_max, 4001, dtype=torch.float64)
    c, logsnr = schedule(t), schedule.logsnr(t)
    assert (float(c.alpha[0]), float(c.sigma[0])) == (1.0, 0.0)
    assert logsnr[0] == math.inf
    assert bool((logsnr.diff() < 0).all())
    assert_close(logsnr[1:], (c.alpha[1:] / c.sigma[1:]).square().log(), **TIGHT)


def test_time_from_logsnr_inverts_logsnr(schedule: Schedule, interior: Tensor) -> None:
    assert_close(schedule.t_from_logsnr(schedule.logsnr(interior)), interior, **TIGHT)
    knots = torch.arange(1, 10, dtype=torch.float64) / 10 * schedule.t_max  # entries of the discrete tables
    assert_close(schedule.t_from_logsnr(schedule.logsnr(knots)), knots, **TIGHT)
    assert float(schedule.t_from_logsnr(torch.tensor(math.inf))) == 0


def test_time_from_logsnr_reaches_the_noisy_end() -> None:
    zero_snr = DiscreteVP(rescale_snr(DiscreteVP.linear()))
    for schedule in (RectifiedFlow(), TrigFlow(), TrigFlow(0.5), zero_snr):
        t = schedule.t_from_logsnr(torch.tensor(-math.inf))
        assert_close(t, torch.tensor(schedule.t_max, dtype=torch.float64), **TIGHT)
    assert float(DiscreteVP.linear().t_from_logsnr(torch.tensor(-100.0))) == 1  # noisier than the table: its end


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("reference", [DDPMScheduler, DDIMScheduler])
def test_discrete_vp_adds_noise_and_forms_velocity_as_diffusers_does(name: str, reference: type) -> None:
    betas = {"linear": {}, "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012}}[name]
    theirs = reference(beta_schedule=name, **betas)
    ours = DiscreteVP(theirs.alphas_cumprod)
    assert_close(theirs.alphas_cumprod.double(), getattr(DiscreteVP, name)()(table_times(1000)).alpha ** 2, **LOOSE)

    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    index = torch.tensor([0, 1, 137, 499, 998, 999])
    x0, eps = draw(6, 3, 4), draw(6, 3, 4)
    t = (index + 1).double() / 1000
    assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, index), rtol=0, atol=3e-9)
    v = convert(x0, ours.add_noise(x0, eps, t), ours.coeffs(t, x0), "x0", "v")
    assert_close(v, theirs.get_velocity(x0, eps, index), rtol=0, atol=3e-9)


def test_stable_diffusions_table_has_its_published_ends() -> None:
    alpha = DiscreteVP.scaled_linear()(table_times(1000)).alpha
    assert_close(alpha[[0, 999]], torch.tensor([0.9995749, 0.0682649], dtype=torch.float64), rtol=0, atol=1e-7)


def test_entries_of_the_table_are_met_exactly_and_joined_smoothly() -> None:
    table = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    schedule, t = DiscreteVP(table), table_times(1000)
    c = schedule(t)
    assert_close(c.alpha, table.sqrt(), rtol=0, atol=1e-14)
    assert_close(c.sigma, (1 - table).sqrt(), rtol=0, atol=1e-14)
    between = schedule(t[:-1] + 0.0005)
    assert_close(between.alpha**2 + between.sigma**2, torch.ones(999, dtype=torch.float64), **TIGHT)
    half = (torch.atan2(c.sigma, c.alpha)[1:] + torch.atan2(c.sigma, c.alpha)[:-1]) / 2
    assert_close(torch.atan2(between.sigma, between.alpha), half, rtol=0, atol=1e-12)
    for side in (-1e-12, 1e-12):
        assert_close(schedule((t + side).clamp(0, 1)).alpha, c.alpha, rtol=0, atol=1e-10)


def test_a_table_of_zero_terminal_snr_ends_in_pure_noise() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    assert_close(table, rescale_snr(DiscreteVP.scaled_linear()), rtol=0, atol=1e-12)
    schedule = DiscreteVP(table)
    c = schedule(torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64))
    assert_close(c.alpha, torch.tensor([0.9995749, 0.4923000, 0.0], dtype=torch.float64), rtol=0, atol=5e-7)
    assert abs(float(c.alpha[-1])) < 1e-15
    assert float(c.sigma[-1]) == 1
    assert all(bool(u.isfinite().all()) for u in c)
    assert float(c.dalpha[-1]) < -0.1  # alpha still falls there, so a velocity keeps its information


@pytest.mark.parametrize(
    "table",
    [
        [0.9, 0.9],
        [0.5, 0.6],
        [1.0, 0.5],
        [0.5, -0.1],
        [[0.9, 0.5]],
    ],
    ids=["flat", "rising", "starts at 1", "negative", "2-d"],
)
def test_a_table_that_does_not_fall_within_the_unit_interval_is_refused(table: list) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod must fall strictly"):
        DiscreteVP(torch.tensor(table))


def test_coefficients_take_the_dtype_and_rank_of_the_sample(schedule: Schedule) -> None:
    like = torch.zeros(3, 2, 4, 4, dtype=torch.float32)
    c = schedule.coeffs(torch.tensor([0.1, 0.5, 0.9]) * schedule.t_max, like)
    assert {(tuple(u.shape), u.dtype) for u in c} == {((3, 1, 1, 1), torch.float32)}


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.full((2,), 0.5), torch.full((3, 1), 0.5)])
def test_a_time_per_sample_is_asked_for(schedule: Schedule, t: Tensor) -> None:
    with pytest.raises(ValueError, match=r"one time per sample, shape \(3,\)"):
        schedule.coeffs(t, torch.zeros(3, 2))


def test_noise_is_added_per_sample(schedule: Schedule, interior: Tensor) -> None:
    x0, eps = draw(9, 2, 2), draw(9, 2, 2)
    c = schedule(interior)
    rows = [float(c.alpha[i]) * x0[i] + float(c.sigma[i]) * eps[i] for i in range(9)]
    assert_close(schedule.add_noise(x0, eps, interior), torch.stack(rows), **TIGHT)


def test_at_zero_terminal_snr_nothing_is_left_of_the_data() -> None:
    table = DiscreteVP.linear()(torch.arange(1, 1001, dtype=torch.float64) / 1000).alpha ** 2
    table[-1] = 0.0
    schedule = DiscreteVP(table)
    end = torch.ones(1, dtype=torch.float64)
    assert schedule(end).alpha.item() == 0.0 and schedule(end).sigma.item() == 1.0
    assert schedule.logsnr(end).item() == -float("inf")
