"""Denoisers, guidance, re-scheduling, and who trains: against hand-written formulas and closed forms."""

from __future__ import annotations

import copy
import hashlib
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.denoiser import Cond, Denoiser, Guided, Rescheduled, plain_call
from stepdistill.models.nets import Nets, only_trains, update_average
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Sampler, StepRule
from stepdistill.schedule import EDM, KINDS, DiscreteVP, RectifiedFlow, Schedule, TrigFlow, convert
from stepdistill.testing import GaussianTeacher, MixtureTeacher, mlp

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Recorder(nn.Module):
    """A labelled network that remembers how it was called."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.net = mlp(2, width=16, depth=2, classes=classes).double()
        self.calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((x_t, t, cond))
        return self.net(x_t, t, **cond)


def states(n: int, schedule: Schedule) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    t = torch.linspace(0.1, 0.9, n, dtype=torch.float64) * schedule.t_max
    return torch.randn(n, 2, dtype=torch.float64), t, {"labels": torch.arange(n) % 3}


NULL = {"labels": torch.tensor([3])}


# Denoiser


def test_a_network_is_called_once_with_its_schedules_time_and_its_conditions() -> None:
    schedule = TrigFlow()
    net = Recorder()
    x_t, t, cond = states(4, schedule)
    for kind in KINDS:
        Denoiser(net, schedule, kind)(x_t, t.float(), cond)
        ((seen_x, seen_t, seen_cond),) = net.calls
        assert_close(seen_x, x_t, rtol=0, atol=0)
        assert_close(seen_t, t.float().double(), rtol=0, atol=0)  # in the sample's dtype
        assert list(seen_cond) == ["labels"]
        net.calls.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_answers_in_every_kind_what_its_network_means(schedule: Schedule, kind: str) -> None:
    x_t, t, cond = states(5, schedule)
    denoiser = Denoiser(Recorder(), schedule, kind)
    raw = denoiser.net.net(x_t, t, **cond)
    assert_close(denoiser(x_t, t, cond, want=kind), raw, rtol=0, atol=0)
    c = schedule.coeffs(t, x_t)
    x0, eps = denoiser(x_t, t, cond), denoiser(x_t, t, cond, want="eps")
    assert_close(c.alpha * x0 + c.sigma * eps, x_t, **TIGHT)
    rows = {"x0": x0, "eps": eps, "v": c.alpha * eps - c.sigma * x0, "velocity": c.dalpha * x0 + c.dsigma * eps}
    assert_close(rows[kind], raw, **TIGHT)
    for want in KINDS:
        assert_close(denoiser(x_t, t, cond, want=want), rows[want], **TIGHT)


def test_the_networks_arithmetic_is_the_denoisers_and_the_answer_is_the_samples() -> None:
    seen = []

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out = plain_call(net, x_t, t, cond)
        seen.append((torch.is_autocast_enabled("cpu"), out.dtype))
        return out

    x_t, t = torch.randn(3, 2), torch.full((3,), 0.5)
    for dtype in (torch.float32, torch.bfloat16):
        denoiser = Denoiser(mlp(2, width=16, depth=2), RectifiedFlow(), "velocity", call, dtype)
        assert {denoiser(x_t, t, {}, want=kind).dtype for kind in KINDS} == {torch.float32}
        assert set(seen) == {(dtype == torch.bfloat16, dtype)}
        seen.clear()
    rounded = denoiser(x_t, t, {}, want="velocity")
    # the conversion happens in float32: x_t - t u, not a rounding of it
    assert_close(denoiser(x_t, t, {}), x_t - 0.5 * rounded, rtol=1e-6, atol=1e-6)


def test_gradients_go_where_they_are_asked_and_nowhere_else() -> None:
    x_t, t, cond = states(3, RectifiedFlow())
    denoiser = Denoiser(Recorder(), RectifiedFlow(), "eps")

    denoiser(x_t, t, cond).sum().backward()
    assert x_t.grad is None
    assert all(p.grad is not None for p in denoiser.parameters())

    denoiser.zero_grad(set_to_none=True)
    denoiser.requires_grad_(False)
    assert not denoiser(x_t, t, cond).requires_grad  # a frozen network of plain samples keeps no graph
    x_t.requires_grad_()
    denoiser(x_t, t, cond).sum().backward()
    assert bool(x_t.grad.abs().sum() > 0)
    assert all(p.grad is None for p in denoiser.parameters())


# Guided


def test_guidance_of_one_is_the_denoiser_and_costs_one_evaluation_of_the_batch() -> None:
    schedule = RectifiedFlow()
    x_t, t, cond = states(5, schedule)
    denoiser = Denoiser(Recorder(), schedule, "eps")
    guided = Guided(denoiser, 1.0, NULL)
    for kind in KINDS:
        denoiser.net.calls.clear()
        answer = guided(x_t, t, cond, want=kind)
        assert [len(x) for x, _, _ in denoiser.net.calls] == [5]
        assert_close(answer, denoiser(x_t, t, cond, want=kind), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.5, 7.3])
def test_guidance_is_null_plus_scale_times_the_difference_in_every_kind(schedule: Schedule, scale: float) -> None:
    """0 is unconditional, 1 conditional: pipelines' guidance_scale, not the (1 + w) form that is one lower."""
    x_t, t, cond = states(5, schedule)
    denoiser = Denoiser(Recorder(), schedule, "eps")
    guided = Guided(denoiser, scale, NULL)
    nothing = {"labels": torch.full((5,), 3)}
    for kind in KINDS:
        denoiser.net.calls.clear()
        answer = guided(x_t, t, cond, want=kind)
        assert [len(x) for x, _, _ in denoiser.net.calls] == [10]  # one batch of both
        null, conditional = denoiser(x_t, t, nothing, want=kind), denoiser(x_t, t, cond, want=kind)
        assert_close(answer, null + scale * (conditional - null), **TIGHT)
    assert guided.schedule is schedule


def test_guidance_acts_within_its_interval_of_times_only() -> None:
    schedule = TrigFlow()
    x_t, t, cond = states(5, schedule)  # at .1, .3, .5, .7, .9 of t_max
    denoiser = Denoiser(Recorder(), schedule, "velocity")
    answer = Guided(denoiser, 3.0, NULL, interval=(0.25, 0.75))(x_t, t, cond)
    plain, guided = denoiser(x_t, t, cond), Guided(denoiser, 3.0, NULL)(x_t, t, cond)
    assert_close(answer[[0, 4]], plain[[0, 4]], **TIGHT)
    assert_close(answer[1:4], guided[1:4], **TIGHT)
    assert bool(((guided - plain).abs() > 1e-3).any())


def test_guidance_without_a_null_condition_is_refused_unless_it_is_one() -> None:
    denoiser = Denoiser(Recorder(), RectifiedFlow(), "eps")
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a null condition"):
        Guided(denoiser, 2.0)
    x_t, t, cond = states(2, RectifiedFlow())
    assert_close(Guided(denoiser)(x_t, t, cond), denoiser(x_t, t, cond))


def test_a_guided_teacher_is_frozen_stays_in_eval_mode_and_lets_gradients_through_to_the_sample() -> None:
    x_t, t, cond = states(3, RectifiedFlow())
    x_t.requires_grad_()
    guided = Guided(Denoiser(Recorder(), RectifiedFlow(), "velocity"), 2.5, NULL)
    nn.ModuleDict({"teacher": guided}).train()
    assert not any(m.training for m in guided.modules())
    assert not any(p.requires_grad for p in guided.parameters())
    (grad,) = torch.autograd.grad(guided(x_t, t, cond).sum(), x_t)
    nothing = {"labels": torch.full((3,), 3)}
    null, conditional = (torch.autograd.grad(guided.denoiser(x_t, t, k).sum(), x_t)[0] for k in (nothing, cond))
    assert_close(grad, null + 2.5 * (conditional - null), **TIGHT)


@pytest.mark.parametrize("rule", [Ddim(), Heun(), DpmPP2M()], ids=["ddim", "heun", "dpm++"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.7])
def test_sampling_a_guided_gaussian_lands_on_the_extrapolated_mean(rule: StepRule, scale: float) -> None:
    """m_u + s (m_c - m_u): with alpha = 0 at the start every rule maps zero noise onto the mean exactly."""
    means = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    null = torch.tensor([0.2, 0.4], dtype=torch.float64)
    cov = torch.tensor([[0.8, 0.3], [0.3, 0.5]], dtype=torch.float64)
    for schedule in (RectifiedFlow(), TrigFlow(0.5)):
        teacher = GaussianTeacher(null, cov, schedule, means)
        guided = Guided(teacher, scale, {"labels": torch.tensor([2])})
        labels = torch.tensor([0, 1])
        run = Sampler(tuple(1 - i / 5 for i in range(5)), rule).run
        out = run(guided, torch.zeros(2, 2, dtype=torch.float64), {"labels": labels}, torch.Generator())
        assert_close(out, null + scale * (means - null), **TIGHT)


def test_the_ode_of_a_guided_gaussian_keeps_the_covariance() -> None:
    cov = torch.tensor([[0.8, 0.3], [0.3, 0.5]], dtype=torch.float64)
    teacher = GaussianTeacher(torch.zeros(2), cov, RectifiedFlow(), torch.tensor([[1.0, -2.0]]))
    guided = Guided(teacher, 4.2, {"labels": torch.tensor([1])})
    noise = torch.randn(6, 2, dtype=torch.float64)
    t = torch.ones(6, dtype=torch.float64)
    labels = {"labels": torch.zeros(6, dtype=torch.int64)}
    fine = Sampler(tuple(1 - i / 300 for i in range(300)), Heun()).run(guided, noise, labels, torch.Generator())
    assert_close(fine, teacher.given(0, 4.2).consistency(noise, t), rtol=0, atol=5e-4)


# Rescheduled


PATHS = {
    "flow": RectifiedFlow(),
    "edm": EDM(),
    "trig": TrigFlow(),
    "trig-half": TrigFlow(0.5),
    "vp": DiscreteVP.scaled_linear(),
}


@pytest.mark.parametrize("inner", PATHS)
@pytest.mark.parametrize("outer", PATHS)
def test_a_rescheduled_teacher_is_the_teacher_of_the_other_schedule(inner: str, outer: str) -> None:
    teachers = [
        MixtureTeacher(
            torch.tensor([0.3, 0.7]), torch.tensor([[1.0, 0.5], [-1.0, 0.2]]), torch.tensor([0.3, 0.6]), PATHS[name]
        )
        for name in (inner, outer)
    ]
    seen = Rescheduled(teachers[0], PATHS[outer])
    low, high = (  # a VP table ends at a log-SNR that others go beyond
        PATHS[outer].t_from_logsnr(torch.tensor(u, dtype=torch.float64)) for u in (6.0, -5.0)
    )
    t = low + (high - low) * torch.linspace(0, 1, 7, dtype=torch.float64)
    c = PATHS[outer](t)
    x_t = (c.alpha**2 + c.sigma**2).sqrt()[:, None] * torch.randn(7, 2, dtype=torch.float64)
    for kind in KINDS:
        assert_close(seen(x_t, t, {}, want=kind), teachers[1](x_t, t, want=kind), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("outer", ["trig", "trig-half", "flow"])
def test_rescheduling_is_exact_at_both_ends(outer: str) -> None:
    schedule = PATHS[outer]
    mean, cov = torch.tensor([0.3, -1.0]), torch.tensor([[0.8, 0.3], [0.3, 0.5]])
    for inner in (RectifiedFlow(), TrigFlow(0.5), TrigFlow()):
        seen = Rescheduled(GaussianTeacher(mean, cov, inner), schedule)
        x_t = torch.randn(2, 2, dtype=torch.float64)
        noisy = torch.full((2,), schedule.t_max, dtype=torch.float64)
        direct = GaussianTeacher(mean, cov, schedule)
        for kind in ("x0", "eps", "v", "velocity"):
            assert_close(seen(x_t, noisy, {}, want=kind), direct(x_t, noisy, want=kind), **TIGHT)
        assert_close(seen(x_t, 0 * noisy, {}), x_t, **TIGHT)


@pytest.mark.parametrize("inner", PATHS)
@pytest.mark.parametrize("outer", PATHS)
def test_rescheduling_there_and_back_is_the_identity(inner: str, outer: str) -> None:
    """For any network, not only for a perfect one."""
    denoiser = Denoiser(Recorder(), PATHS[inner], "velocity")
    back = Rescheduled(Rescheduled(denoiser, PATHS[outer]), PATHS[inner])
    low, high = (PATHS[inner].t_from_logsnr(torch.tensor(u, dtype=torch.float64)) for u in (6.0, -5.0))
    t = low + (high - low) * torch.linspace(0, 1, 6, dtype=torch.float64)
    x_t, _, cond = states(6, PATHS[inner])
    for kind in KINDS:
        assert_close(back(x_t, t, cond, want=kind), denoiser(x_t, t, cond, want=kind), rtol=1e-7, atol=1e-7)


def test_a_flow_network_seen_as_trigflow_follows_the_published_formula() -> None:
    """F = (c x - x0) / s at t_rf = s / (c + s) with x / (c + s) fed in, as rCM and SANA-Sprint wrap it."""
    denoiser = Denoiser(Recorder(), RectifiedFlow(), "velocity")
    x, t, cond = states(5, TrigFlow())
    s, c = t.sin()[:, None], t.cos()[:, None]
    u = denoiser.net.net(x / (c + s), (s / (c + s))[:, 0], **cond)
    x0 = x / (c + s) - s / (c + s) * u
    seen = Rescheduled(denoiser, TrigFlow())
    assert_close(seen(x, t, cond), x0, **TIGHT)
    assert_close(seen(x, t, cond, want="velocity"), (c * x - x0) / s, **TIGHT)
    tau, x_rf = s / (c + s), x / (c + s)
    sprint = ((1 - 2 * tau) * x_rf + (1 - 2 * tau + 2 * tau**2) * u) / (tau**2 + (1 - tau) ** 2).sqrt()
    assert_close(seen(x, t, cond, want="velocity"), sprint, **TIGHT)


def test_a_flow_network_seen_as_edm_follows_the_published_formula() -> None:
    denoiser = Denoiser(Recorder(), RectifiedFlow(), "velocity")
    x_edm, sigma, cond = states(5, EDM(3.0))
    t = (sigma / (1 + sigma))[:, None]
    x0 = x_edm / (1 + sigma[:, None]) - t * denoiser.net.net(x_edm / (1 + sigma[:, None]), t[:, 0], **cond)
    assert_close(Rescheduled(denoiser, EDM(3.0))(x_edm, sigma, cond), x0, **TIGHT)
    assert math.isclose(EDM(3.0).t_max, 3.0)


@pytest.mark.parametrize("sigma_max", [10.0, 40.0, 80.0, 157.4])
def test_guidance_acts_where_another_schedule_starts_too(sigma_max: float) -> None:
    """Matching log-SNR comes back to sigma_max up to rounding, which must not count as beyond it."""

    class Label(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return labels.to(x)[:, None].expand_as(x)

    denoiser = Denoiser(Label(), EDM(sigma_max), "x0")
    seen = Rescheduled(Guided(denoiser, 3.0, {"labels": torch.tensor([0])}), RectifiedFlow())
    top = torch.full((2,), sigma_max / (1 + sigma_max), dtype=torch.float64)
    x0 = seen(torch.randn(2, 3, dtype=torch.float64), top, {"labels": torch.tensor([1, 2])})
    assert_close(x0, torch.tensor([[3.0], [6.0]], dtype=torch.float64).expand(2, 3))


# Nets: who trains, averages, state


def nets() -> Nets:
    schedule = RectifiedFlow()
    return Nets(
        {
            "student": Denoiser(mlp(2, 8, 2), schedule, "x0"),
            "teacher": Guided(Denoiser(mlp(2, 8, 2), schedule, "x0")),
            "critic": Denoiser(mlp(2, 8, 2), schedule, "x0"),
            "disc": mlp(2, 8, 2),
        }
    )


def hashes(all_nets: Nets) -> dict[str, str]:
    return {
        name: hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()
        for name, net in all_nets.items()
    }


@pytest.mark.parametrize("moves", [("student",), ("critic",), ("critic", "disc"), ("disc",)])
def test_a_turn_changes_those_who_move_and_nobody_else(moves: tuple[str, ...]) -> None:
    """Every network is part of the loss and every one has an optimizer; the hashes tell who has moved."""
    all_nets = nets()
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.1) for net in all_nets.values()]
    with only_trains(all_nets, ("student", "critic", "disc")):
        pass  # a turn before this one, so that flags have to be changed both ways
    before = hashes(all_nets)
    with only_trains(all_nets, moves) as params:
        x, t = torch.randn(16, 2), torch.rand(16)
        x = all_nets.student(x, t, {})
        (all_nets.teacher(x, t, {}) + all_nets.critic(x, t, {}) + all_nets.disc(x, t)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    after = hashes(all_nets)
    assert {name for name in after if after[name] != before[name]} == set(moves)
    assert {id(p) for p in params} == {id(p) for name in moves for p in all_nets[name].parameters()}
    assert all(p.grad is None for name in all_nets if name not in moves for p in all_nets[name].parameters())


def test_a_network_that_stays_still_passes_gradients_on_to_the_one_that_moves() -> None:
    all_nets = nets()
    with only_trains(all_nets, ("student",)):
        x, t = torch.randn(4, 2), torch.rand(4)
        all_nets.disc(all_nets.student(x, t, {}), t).mean().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in all_nets.student.parameters())


def test_a_running_average_is_the_geometric_sum_of_what_it_has_seen() -> None:
    source, decay = nn.BatchNorm1d(3), 0.9
    average = copy.deepcopy(source)
    expected = source.weight.detach().clone()
    for k in range(5):
        with torch.no_grad():
            source.weight.fill_(float(k * k))
            source.running_mean.fill_(float(k))
            source.num_batches_tracked.fill_(k)
        update_average(average, source, decay)
        expected = decay * expected + (1 - decay) * k * k
    assert_close(average.weight.detach(), expected)
    assert_close(average.running_mean, source.running_mean)  # buffers are copied
    assert int(average.num_batches_tracked) == 4
    assert_close(source.weight.detach(), torch.full((3,), 16.0))


def test_a_checkpoint_holds_everybody_but_the_teacher() -> None:
    all_nets = nets()
    kept = all_nets.trainable_state()
    assert {k.split(".")[0] for k in kept} == {"student", "critic", "disc"}
    assert len(kept) == sum(len(all_nets[n].state_dict()) for n in ("student", "critic", "disc"))


def test_conversion_and_guidance_commute(schedule: Schedule) -> None:
    """Guiding in one kind and converting is converting and guiding, since conversion is affine in the prediction."""
    x_t, t, cond = states(5, schedule)
    c = schedule.coeffs(t, x_t)
    guided = Guided(Denoiser(Recorder(), schedule, "v"), 5.5, NULL)
    for src in KINDS:
        for dst in KINDS:
            converted = convert(guided(x_t, t, cond, want=src), x_t, c, src, dst)
            assert_close(converted, guided(x_t, t, cond, want=dst), **TIGHT)
