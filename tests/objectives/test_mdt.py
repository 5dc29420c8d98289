"""MDT against the exact transport to the data, and a naive re-derivation of both terms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import MDT
from stepdistill.parts.times import Uniform
from stepdistill.sampling import Ddim, Heun, Renoise, Sampler, trailing
from stepdistill.schedule import DiscreteVP, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student, mlp
from stepdistill.trainer import AdamW

from .conftest import distilled, pretrained, student_like
from .flow_maps import ExactFlowMap, bed, map_error
from .test_mean_flow import batch_of


@pytest.mark.parametrize("schedule", [RectifiedFlow(), DiscreteVP.linear(), TrigFlow(0.5)], ids=["flow", "vp", "trig"])
def test_both_terms_vanish_at_the_exact_transport_as_the_difference_gets_short(schedule: Schedule) -> None:
    """``phi + t dphi/dt`` is then the teacher's velocity, and samples have the teacher's law; what is left of order
    delta is the difference's."""
    teacher = bed(schedule)
    student = exact_student(teacher, Sampler(trailing(1), Ddim())).double()
    nets = Nets({"student": student, "teacher": teacher})
    losses = []
    for delta in (0.04, 0.01, 0.0025):
        loss = MDT(delta=delta, normalise=0.0, times=Uniform(0.2, 1.0))
        terms = loss.student_loss(nets, batch_of(teacher, 2000), Step.at(0)).terms
        losses.append([terms["match"].item(), terms["distil"].item()])
    for coarse, fine in pairwise(losses):
        for a, b in zip(coarse, fine, strict=True):
            assert 8 < a / b < 32  # squares of something linear in delta
    assert max(losses[-1]) < 1e-4
    off = bed(schedule, mean=1.4)  # the transport of another law: its velocity is another, and so are its samples
    nets = Nets({"student": exact_student(off, Sampler(trailing(1), Ddim())).double(), "teacher": teacher})
    terms = loss.student_loss(nets, batch_of(teacher, 2000), Step.at(0)).terms
    assert min(terms["match"].item(), terms["distil"].item()) > 0.1


def guided_nets() -> tuple[Nets, Batch]:
    torch.manual_seed(0)
    student, teacher = (
        Student(Sampler(), mlp(2, width=16, classes=2), RectifiedFlow(), "velocity").double() for _ in range(2)
    )
    nets = Nets({"student": student, "teacher": Guided(teacher, 1.5, {"labels": torch.tensor([2])})})
    return nets, Batch({"labels": torch.arange(6) % 2}, (6, 2), x0=torch.randn(6, 2, dtype=torch.float64))


@pytest.mark.parametrize("c", [0.0, 0.1])
def test_the_loss_and_its_gradient_equal_a_loop_over_samples(c: float) -> None:
    nets, batch = guided_nets()
    n, delta = len(batch), 0.02
    objective = MDT(delta=delta, normalise=c, distil=0.7, distil_guidance=3.0)
    got = objective.student_loss(nets, batch, Step.at(5))
    got.total.backward()
    gradient = [p.grad.clone() for p in nets.student.parameters()]
    nets.student.zero_grad()

    step = Step.at(5)
    eps, noise = step.randn((n, 2)).double(), step.randn((n, 2)).double()
    t = torch.sigmoid(1 + step.randn((n,)).double())
    match, distil, surrogate = 0.0, 0.0, 0.0
    for i in range(n):
        label, null = batch.cond["labels"][i : i + 1], torch.tensor([2])

        def phi(x: Tensor, time: Tensor) -> Tensor:
            return nets.student(x, time[None], {"labels": label}, want="velocity")  # noqa: B023

        def v(x: Tensor, time: Tensor, scale: float) -> Tensor:
            one, zero = (
                nets.teacher.denoiser(x, time[None], {"labels": k}, want="velocity")
                for k in (label, null)  # noqa: B023
            )
            return zero + scale * (one - zero)

        def implied(x: Tensor, time: Tensor, scale: float) -> Tensor:
            """phi + t dphi/dt - v."""
            u = v(x, time, scale)
            back = delta * time
            slope = (phi(x, time) - phi(x - back * u, time - back)) / back
            if c:
                slope = slope / (slope.norm() + c)
            return phi(x, time) + time * slope - u

        x_t = ((1 - t[i]) * batch.x0[i] + t[i] * eps[i])[None]
        with torch.no_grad():
            error = implied(x_t, t[i], 1.5)
            aim = phi(x_t, t[i]) - error
        match += error.square().mean() / n
        surrogate += (phi(x_t, t[i]) - aim).square().mean() / n
        jump = phi(noise[i : i + 1], torch.ones((), dtype=torch.float64))
        with torch.no_grad():
            gap = implied((1 - t[i]) * (noise[i : i + 1] - jump) + t[i] * eps[i : i + 1], t[i], 3.0)
        distil += gap.square().mean() / n
        surrogate += 0.7 * 2 * (gap * jump).mean() / n  # of which the gradient is that of the term
    assert_close(got.terms["match"], match)
    near = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}  # samples are made in float32, as noise is
    assert_close(got.terms["distil"], distil, **near)
    assert_close(got.total, match + 0.7 * distil, **near)
    surrogate.backward()
    for p, g in zip(nets.student.parameters(), gradient, strict=True):
        assert_close(g, p.grad, **near)


def test_a_sample_moves_from_its_own_flow_towards_the_teachers() -> None:
    """Velocity distillation alone, of a law too far right: descending it moves samples to the left."""
    teacher = bed(RectifiedFlow())
    student = ExactFlowMap(bed(RectifiedFlow(), mean=1.4))
    nets = Nets({"student": student, "teacher": teacher})
    terms = MDT(normalise=0.0, times=Uniform(0.3, 0.9)).student_loss(nets, batch_of(teacher, 4000), Step.at(0)).terms
    (gradient,) = torch.autograd.grad(terms["distil"], student.offset)
    assert gradient.item() > 0.1


def test_without_distillation_no_sample_is_made() -> None:
    nets, batch = guided_nets()
    calls = []
    nets.student.register_forward_hook(lambda *_: calls.append(1))
    loss = MDT(distil=0.0).student_loss(nets, batch, Step.at(0))
    assert len(calls) == 2 and set(loss.terms) == set()
    MDT().student_loss(nets, batch, Step.at(0))
    assert len(calls) == 2 + 5


@pytest.mark.parametrize("half", [False, True])
def test_in_half_precision_the_difference_is_no_shorter_than_rounding_allows(half: bool) -> None:
    """Of the two times at which the student is asked in matching, the later less the earlier."""
    nets, batch = guided_nets()
    nets.student.dtype = torch.bfloat16 if half else torch.float64
    seen: list[Tensor] = []
    student = nets.student

    class Asked(torch.nn.Module):
        schedule, dtype = student.schedule, student.dtype

        def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: str = "x0") -> Tensor:
            seen.append(t)
            return torch.zeros_like(x_t)

    nets["student"] = Asked()
    MDT(delta=0.01, distil=0.0, times=Uniform(0.002, 1.0)).student_loss(nets, batch, Step.at(0))
    t, before = seen
    expected = [0.01 * x if not half else min(max(0.01 * x, 0.005), x / 2) for x in t.tolist()]
    assert_close((t - before).tolist(), expected)
    assert not half or any(0.01 * x < 0.005 for x in t.tolist())


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"objective.delta must lie in \(0, 0.5\); got 0"):
        MDT(delta=0)
    with pytest.raises(ValueError, match=r"objective\.distil must be at least 0; got -1"):
        MDT(distil=-1)
    with pytest.raises(ValueError, match=r"MDT's student jumps to the data only; use Renoise"):
        MDT().check(Sampler(trailing(2), Heun()))
    MDT().check(Sampler(trailing(2), Renoise()))


def test_one_step_reaches_the_exact_ode_map(gaussian: GaussianTeacher) -> None:
    sampler, start = Sampler(trailing(1), Ddim()), pretrained(gaussian)
    before = map_error(gaussian, student_like(start, sampler))
    objective = MDT(delta=0.1, normalise=0.0, times=Uniform())
    optim = {"student": AdamW(1e-3, decay="linear")}
    after = map_error(gaussian, distilled(objective, gaussian, start, sampler, optim, 300, batch=128))
    assert after < 0.3 and after < before / 2  # 0.14 to 0.16 from 0.72, over three seeds
