"""TwinFlow against exact flow maps, numbers of the method book, and a naive re-derivation of its loss."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.functional.distances import Barron
from stepdistill.models.denoiser import Guided
from stepdistill.models.nets import Nets
from stepdistill.models.two_time import TwoTime
from stepdistill.objective import Batch, Step
from stepdistill.objectives import TwinFlow
from stepdistill.parts.flow import straight
from stepdistill.sampling import Ddim, Heun, Sampler, trailing
from stepdistill.schedule import DiscreteVP, RectifiedFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, mlp
from stepdistill.trainer import AdamW

from .conftest import distilled, pretrained, student_like
from .flow_maps import ExactFlowMap, bed, map_error
from .test_mean_flow import batch_of


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), DiscreteVP.linear()], ids=["flow", "vp"])
def test_the_residual_is_the_bias_of_one_euler_step(schedule) -> None:
    """The method book's number for t = 0.8 to 0.2 at x = 1.1, and none at all after an exact step."""
    teacher, objective = bed(schedule), TwinFlow(velocity="teacher", guidance=0.0)
    nets = Nets({"student": ExactFlowMap(teacher), "target": ExactFlowMap(teacher), "teacher": teacher})
    x, t, s = one(1.1)[:, None], one(0.8), one(0.2)
    out = straight(nets.student)(x, t, {}, want="velocity", s=s)
    v = straight(teacher)(x, t, {}, want="velocity")
    residual = out - objective.recursion(nets, out, v, x, t, s, {})
    assert_close(residual.item(), -0.0043, rtol=0, atol=5e-5)
    flow = bed(RectifiedFlow())
    exact = (x - flow.flow_map(x, t, t - 0.01)) / 0.01
    assert (out - objective.recursion(nets, out, exact, x, t, s, {})).abs().max() < 1e-8
    near = one(0.795)  # closer than the step: plain flow matching
    assert_close(objective.recursion(nets, out, v, x, t, near, {}), v, rtol=1e-12, atol=1e-12)
    assert_close(objective.recursion(nets, out + 7, v, x, t, s, {}), out + 7 - 1.0, rtol=1e-12, atol=1e-12)  # clipped


def test_an_exact_flow_map_on_its_own_samples_costs_next_to_nothing() -> None:
    """Own samples have the teacher's law, so fake and real flows are one; the fourth slice's target is noisy."""
    teacher = bed(RectifiedFlow())
    student = ExactFlowMap(teacher)
    nets = Nets({"student": student, "target": student, "teacher": teacher})
    objective = TwinFlow(velocity="teacher", guidance=0.0, delta=1e-3)
    terms = objective.student_loss(nets, batch_of(teacher, 400), Step.at(0)).terms
    assert terms["rectify"].item() < 1e-6
    far = ExactFlowMap(teacher, own=bed(RectifiedFlow(), mean=1.4))
    nets = Nets({"student": far, "target": far, "teacher": teacher})
    loss = objective.student_loss(nets, batch_of(teacher, 400), Step.at(0))
    assert loss.terms["rectify"].item() > 0.1
    (gradient,) = torch.autograd.grad(loss.terms["rectify"], far.offset)
    assert gradient.item() > 0.1  # a fake law to the right of the real one: descent moves samples to the left


def test_sizes_are_roots_of_squares() -> None:
    """Whatever the error, its gradient is about as long: a root mean square, not a mean square."""
    for scale in (1e-2, 1.0, 100.0):
        a = (scale * torch.randn(3, 50, dtype=torch.float64)).requires_grad_()
        size = Barron()(a, torch.zeros_like(a))
        assert_close(size, a.square().mean(1).sqrt(), rtol=1e-2, atol=0)
        (gradient,) = torch.autograd.grad(size.sum(), a)
        assert_close(gradient.norm(dim=1), torch.full((3,), 2 / math.sqrt(50)).double(), rtol=1e-2, atol=0)
    a = torch.full((1, 50), 1e-5, dtype=torch.float64)
    assert_close(Barron()(a, torch.zeros_like(a)).item(), 1e-10 / 1e-3, rtol=1e-3, atol=0)


def labelled() -> tuple[Nets, Batch]:
    torch.manual_seed(0)

    def two_time() -> Student:
        net = TwoTime(mlp(2, width=16, classes=2), at="enter")
        nn.init.normal_(net.second[2].weight, std=0.3)
        return Student(Sampler(trailing(2), Ddim()), net, RectifiedFlow(), "velocity").double()

    teacher = Student(Sampler(), mlp(2, width=16, classes=2), RectifiedFlow(), "velocity").double()
    nets = Nets({"student": two_time(), "target": two_time()})
    nets["teacher"] = Guided(teacher, 2.0, {"labels": torch.tensor([2])})
    return nets, Batch({"labels": torch.arange(8) % 2}, (8, 2), x0=torch.randn(8, 2, dtype=torch.float64))


@pytest.mark.parametrize("velocity", ["data", "teacher"])
def test_the_loss_and_its_gradient_equal_a_loop_over_samples(velocity: str) -> None:
    nets, batch = labelled()
    n, hops, delta, c = 8, 3, 0.04, 1e-3
    guidance = 0.6 if velocity == "data" else 0.0
    objective = TwinFlow(velocity=velocity, guidance=guidance, delta=delta, hops=hops, near=0.2, rectify=0.8)
    got = objective.student_loss(nets, batch, Step.at(3))
    got.total.backward()
    gradient = [p.grad.clone() for p in nets.student.parameters()]
    nets.student.zero_grad()

    step = Step.at(3)
    eps, noise, again = (step.randn((n, 2)).double() for _ in range(3))

    def stratified() -> Tensor:
        cells = torch.randperm(n, generator=step.rng)
        return (cells + step.rand(n)) / n

    kind = [0, 1, 2, 3, 0, 1, 2, 3]  # sample 24 of the run and those behind it
    times = stratified()
    share = step.rand(n)
    level = stratified()
    base = rectify = 0.0
    for i in range(n):
        label, null = batch.cond["labels"][i : i + 1], torch.tensor([2])

        def f(net: Student, x: Tensor, t: float, s: float, k: Tensor) -> Tensor:
            return net(x, one(t), {"labels": k}, want="velocity", s=one(s))

        def size(a: Tensor, b: Tensor) -> Tensor:
            m = (a - b).square().mean()
            return m * ((m.detach() / c**2 + 1) ** -0.5) / c

        t, e, x0 = times[i].item(), eps[i : i + 1], batch.x0[i : i + 1]
        t, s = [(1.0, 0.0), (t, t * (1 - 0.2 * share[i].item())), (t, t * (1 - share[i].item())), (t, -t)][kind[i]]
        with torch.no_grad():
            if kind[i] == 3:
                x0 = noise[i : i + 1] - f(nets.student, noise[i : i + 1], 1.0, 0.0, label)
            x_t = (1 - t) * x0 + t * e
        out = f(nets.student, x_t, t, s, label)
        with torch.no_grad():
            target = e - x0
            if kind[i] < 3:
                if velocity == "teacher":
                    parts = [nets.teacher.denoiser(x_t, one(t), {"labels": k}, want="velocity") for k in (label, null)]
                    target = parts[1] + 2 * (parts[0] - parts[1])
                else:
                    target = target + 0.6 * (f(nets.target, x_t, t, t, label) - f(nets.target, x_t, t, t, null))
                if t < s + delta:
                    residual = out - target
                else:
                    x, middle, walked = x_t - delta * target, t - delta, 0.0
                    grid = [middle + (s - middle) * k / hops for k in range(hops + 1)]
                    for high, low in pairwise(grid):
                        u = f(nets.target, x, high, max(low, 0.0), label)
                        clean, rough = x - high * u, x + (1 - high) * u
                        x, walked = (1 - low) * clean + low * rough, walked + (high - low) * u
                    residual = ((t - s) * out - walked) / delta - target
                target = out - residual.clamp(-1, 1)
        weight = 1.0 if s < 0 else math.tan((1 - (t - s)) * math.pi / 2.5) + 1
        base = base + weight * size(out, target) / n
        if kind[i] == 0:
            u = level[i].item()
            with torch.no_grad():
                x_s = (1 - u) * (x_t - out) + u * again[i : i + 1]
                gap = (f(nets.student, x_s, u, -u, label) - f(nets.student, x_s, u, u, label)).clamp(-1, 1)
                aim = out - gap
            rectify = rectify + size(out, aim) / 2
    assert_close(got.terms["base"], base, rtol=1e-6, atol=1e-9)
    assert_close(got.terms["rectify"], rectify, rtol=1e-6, atol=1e-9)
    (base + 0.8 * rectify).backward()
    for p, g in zip(nets.student.parameters(), gradient, strict=True):
        assert_close(g, p.grad, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for name in ("target", "teacher") for p in nets[name].parameters())


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_batches_of_less_than_four_have_all_kinds_in_turn(n: int) -> None:
    nets, batch = labelled()
    small = Batch({k: v[:n] for k, v in batch.cond.items()}, (n, 2), x0=batch.x0[:n])
    asked: list[bool] = []
    nets.student.register_forward_hook(lambda _, args, kwargs, out: asked.append(kwargs["s"] < 0), with_kwargs=True)
    rectified = 0
    for index in range(4):
        loss = TwinFlow().student_loss(nets, small, Step.at(index))
        loss.total.backward()
        assert loss.total.isfinite()
        rectified += bool(loss.terms["rectify"] > 0)
    assert rectified == min(n, 4)
    assert any(bool(below.any()) for below in asked)  # negative times are trained


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="under velocity 'teacher' set it 0"):
        TwinFlow(velocity="teacher")
    with pytest.raises(ValueError, match=r"objective.delta must lie above 0 and at most at 0.5; got 0.7"):
        TwinFlow(delta=0.7)
    with pytest.raises(ValueError, match=r"objective\.hops must be at least 1; got 0"):
        TwinFlow(hops=0)
    with pytest.raises(ValueError, match="sampled by its jumps"):
        TwinFlow().check(Sampler(trailing(2), Heun()))
    nets, batch = labelled()
    with pytest.raises(ValueError, match=r"objective\.guidance 0.5 needs conditions and a null one; set it 0"):
        TwinFlow().student_loss(nets, Batch({}, (8, 2), x0=batch.x0), Step.at(0))
    assert TwinFlow().averages() == {"target": 0.99}


def test_distillation_nears_the_exact_ode_map(gaussian: GaussianTeacher) -> None:
    sampler, start = Sampler(trailing(1), Ddim()), pretrained(gaussian)
    assert map_error(gaussian, student_like(start, sampler)) > 0.5
    objective = TwinFlow(velocity="teacher", guidance=0.0, delta=0.1, c=0.3, target_decay=0.9)
    optim = {"student": AdamW(2e-3, decay="linear")}
    after = map_error(gaussian, distilled(objective, gaussian, start, sampler, optim, 300, batch=128))
    assert after < 0.27  # 0.13 to 0.14 from 0.72, over three seeds
