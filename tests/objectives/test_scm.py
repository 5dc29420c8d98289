"""sCM against derivatives along the exact ODE, its closed forms, and the exact consistency function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.nets import Nets
from stepdistill.objective import Step
from stepdistill.objectives import SCM
from stepdistill.parts.neighbours import times_and_own
from stepdistill.parts.tangents import CentralDifference, Jvp, Tangent
from stepdistill.parts.times import LogNormal, OnGrid
from stepdistill.sampling import Ddim, Renoise, Sampler, trailing
from stepdistill.schedule import DiscreteVP, Kind, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import ExactTeacher, GaussianTeacher, exact_student
from stepdistill.trainer import AdamW

from .conftest import distilled, pretrained
from .test_cd import batch_of, error_of

ONE_STEP = Sampler(trailing(1), Renoise())
AFTER = Step.at(10**6).index
MIDDLE = LogNormal(-0.5, 0.8)
"""Levels away from both ends, where every path is smooth."""


class Answers(nn.Module):
    """A network that predicts as an exact teacher does, plus a bias of each sample's own."""

    def __init__(self, teacher: ExactTeacher, kind: Kind, n: int):
        super().__init__()
        self._teacher, self.kind = (teacher,), kind
        self.bias = nn.Parameter(torch.zeros(n, teacher.dim, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self._teacher[0](x_t, t, {}, want=self.kind) + self.bias


def seen_on(teacher: GaussianTeacher, schedule: Schedule) -> GaussianTeacher:
    return GaussianTeacher(teacher.mean, teacher.cov, schedule)


def tangents(objective: SCM, teacher: GaussianTeacher, n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised tangents of a student that is the teacher itself, a plain denoiser, on TrigFlow, and where they are
    taken, states and times. They are read off the gradient of its bias."""
    trig = TrigFlow(objective.sigma_data)
    teacher = seen_on(teacher, trig)
    net = Answers(teacher, "velocity", n)
    student = Student(ONE_STEP, net, trig, "velocity")
    step, batch = Step.at(AFTER), batch_of(teacher, n)
    objective.student_loss(Nets({"student": student, "teacher": teacher}), batch, step).total.backward()
    again = Step.at(AFTER)
    eps = again.randn((n, 2)).double()
    t = times_and_own(objective.times, objective.own, student, n, again)
    # the loss is mean (F - target)^2 over n * 2 numbers, F = sigma_d^-1 (... + bias), and F - target = -tangent
    t = t - objective.lag * t.sin()
    return trig.add_noise(batch.x0, eps, t), t, -net.bias.grad * objective.sigma_data * n


def along_the_ode(teacher: GaussianTeacher, x: Tensor, t: Tensor, h: float = 1e-4) -> Tensor:
    """d/dt of the denoiser's estimate along the exact trajectory through ``x``, in TrigFlow's time."""
    ahead, behind = (teacher(teacher.flow_map(x, t, t + d), t + d, {}) for d in (h, -h))
    return (ahead - behind) / (2 * h)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("tangent", [Jvp(), CentralDifference(1e-3)])
def test_the_tangent_is_the_change_of_the_estimate_along_the_teachers_ode(
    gaussian: GaussianTeacher, tangent: Tangent, sigma_data: float
) -> None:
    objective = SCM(times=MIDDLE, own=1e-9, sigma_data=sigma_data, tangent=tangent)
    x, t, got = tangents(objective, gaussian)
    g = along_the_ode(seen_on(gaussian, TrigFlow(sigma_data)), x, t)
    assert_close(got, g / (g.norm(dim=1, keepdim=True) + 0.1), rtol=2e-4, atol=2e-5)


def test_before_the_warm_up_it_is_flow_matching(gaussian: GaussianTeacher) -> None:
    """At r = 0 only the difference to the direction counts, and a student that is the teacher has none on average:
    with a teacher the tangent is zero, without one it is ``cos(t) (dx/dt - F)``."""
    objective = SCM(times=MIDDLE, own=1e-9, warmup=10**9)
    assert tangents(objective, gaussian)[2].abs().max() < 3e-2  # r = 1e-3 is left of the rest
    assert tangents(replace(objective, warmup=10**12), gaussian)[2].abs().max() < 1e-4
    x, t, got = tangents(replace(objective, warmup=10**12, distil=False), gaussian)
    teacher = seen_on(gaussian, TrigFlow(0.5))
    step = Step.at(AFTER)
    eps, x0 = step.randn((64, 2)).double(), batch_of(teacher, 64).x0
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    g = cos * (0.5 * cos * eps - sin * x0 - teacher(x, t, {}, want="velocity"))
    assert_close(got, g / (g.norm(dim=1, keepdim=True) + 0.1), rtol=1e-3, atol=1e-4)


def test_without_a_teacher_the_direction_is_the_samples_own(gaussian: GaussianTeacher) -> None:
    """Differentiated here through the estimate itself, by reverse mode."""
    objective = SCM(times=MIDDLE, own=1e-9, distil=False)
    assert objective.needs == {"student"} and SCM().needs == {"student", "teacher"}
    x, t, got = tangents(objective, gaussian)
    teacher = seen_on(gaussian, TrigFlow(0.5))
    step = Step.at(AFTER)
    eps, x0 = step.randn((64, 2)).double(), batch_of(teacher, 64).x0
    dx = 0.5 * t.cos()[:, None] * eps - t.sin()[:, None] * x0
    _, g = torch.autograd.functional.jvp(lambda x, t: teacher(x, t, {}), (x, t), (dx, torch.ones_like(t)))
    assert_close(got, g / (g.norm(dim=1, keepdim=True) + 0.1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "kind"), [(RectifiedFlow(), "velocity"), (DiscreteVP.linear(), "eps")], ids=("flow", "vp")
)
def test_the_loss_is_the_same_on_every_path(gaussian: GaussianTeacher, schedule: Schedule, kind: Kind) -> None:
    objective = SCM(times=MIDDLE, own=1e-9)
    losses = []
    for path, predicts in ((TrigFlow(0.5), "velocity"), (schedule, kind)):
        teacher = seen_on(gaussian, path)
        student = Student(ONE_STEP, Answers(teacher, predicts, 64), path, predicts)
        nets = Nets({"student": student, "teacher": teacher})
        losses.append(objective.student_loss(nets, batch_of(teacher, 64), Step.at(AFTER)).total.item())
    # float32 noise levels; the VP table's angle is linear between its entries, so its direction bends there
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0] > 0.1


@pytest.mark.parametrize(
    "schedule", [DiscreteVP.linear(), RectifiedFlow(), TrigFlow(0.5)], ids=lambda s: type(s).__name__
)
def test_the_exact_consistency_function_stands_still(gaussian: GaussianTeacher, schedule: Schedule) -> None:
    teacher = seen_on(gaussian, schedule)
    nets = Nets({"student": exact_student(teacher, Sampler(trailing(2), Renoise())).double(), "teacher": teacher})
    for tangent, bar in ((Jvp(), 1e-10), (CentralDifference(1e-3), 1e-6)):
        objective = SCM(tangent=tangent, own=0.3, times=LogNormal(-0.5, 1.2))
        loss = objective.student_loss(nets, batch_of(teacher, 256), Step.at(AFTER))
        assert loss.total.item() < bar


def test_data_as_wide_as_trigflow_need_the_network_of_the_closed_form() -> None:
    """Mean 0 and standard deviation sigma_d: the trajectory stands still, f = x, and F = -tan(t / 2) x / sigma_d."""
    trig = TrigFlow(0.5)
    teacher = GaussianTeacher(torch.zeros(2), 0.25 * torch.eye(2), trig)

    class Closed(nn.Module):
        def __init__(self, off: float):
            super().__init__()
            self.off = nn.Parameter(torch.tensor(off, dtype=torch.float64))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return -(t[:, None] / 2).tan() * x_t + self.off * t[:, None] * x_t

    losses = []
    for off in (0.0, 0.05):
        student = Student(ONE_STEP, Closed(off), trig, "velocity")
        nets = Nets({"student": student, "teacher": teacher})
        losses.append(SCM(times=MIDDLE).student_loss(nets, batch_of(teacher, 64), Step.at(AFTER)).total.item())
    assert losses[0] < 1e-12 and losses[1] > 1e-4


class Spy(nn.Module):
    """Passes the times on that it is called at."""

    def __init__(self, teacher: ExactTeacher):
        super().__init__()
        self._teacher, self.times = (teacher,), []
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.times.append(t.detach().clone())
        return self.scale * self._teacher[0](x_t, t, {})


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_at_the_noisiest_time_the_student_is_moved_and_differences_look_down(
    gaussian: GaussianTeacher, path: str
) -> None:
    """The network is called for its gradient at the very time of its sampler, and never above; the difference there
    spans 2 h below it."""
    teacher = seen_on(gaussian, DiscreteVP.linear() if path == "vp" else RectifiedFlow())
    spy = Spy(teacher)
    nets = Nets({"student": Student(ONE_STEP, spy, teacher.schedule, "x0"), "teacher": teacher})
    objective = SCM(own=1.0, tangent=CentralDifference(0.02), lag=0.02)
    loss = objective.student_loss(nets, batch_of(teacher, 32), Step.at(AFTER))
    loss.total.backward()
    direct, ahead, behind = (t.unique().item() for t in spy.times)
    assert direct == pytest.approx(1, abs=1e-12)
    assert 1 - 1e-3 < ahead <= 1 and behind < ahead
    trig = TrigFlow(0.5)
    high, low = (trig.t_from_logsnr(teacher.schedule.logsnr(torch.tensor([u]))).item() for u in (ahead, behind))
    assert high - low == pytest.approx(0.04, rel=1e-3)
    assert spy.scale.grad.abs() > 1e-3


def test_a_learned_weighting_starts_at_one_and_ends_at_the_mean_loss(gaussian: GaussianTeacher) -> None:
    teacher, step = seen_on(gaussian, RectifiedFlow()), lambda: Step.at(AFTER)
    plain, adaptive = SCM(times=OnGrid((0.5,))), SCM(times=OnGrid((0.5,)), adaptive=True)
    student = Student(ONE_STEP, Answers(teacher, "velocity", 64), teacher.schedule, "velocity")
    nets = Nets({"student": student, "teacher": teacher})
    base = plain.student_loss(nets, batch_of(teacher, 64), step()).total
    assert plain.extras(student) == {} and plain.turns()[0].moves == ("student",)
    assert adaptive.turns()[0].moves == ("student", "weighting") and adaptive.optional == {"weighting"}
    nets["weighting"] = adaptive.extras(student)["weighting"]
    loss = adaptive.student_loss(nets, batch_of(teacher, 64), step()).total
    assert_close(loss, base)
    loss.backward()
    # d/dw (exp(-w) l + w) at 0 is 1 - l: the weight's optimum is log l
    assert nets.weighting.linear.bias.grad.item() == pytest.approx(1 - base.item(), rel=1e-5)
    with torch.no_grad():
        nets.weighting.linear.bias.fill_(base.log())
    nets.weighting.zero_grad()
    adaptive.student_loss(nets, batch_of(teacher, 64), step()).total.backward()
    assert abs(nets.weighting.linear.bias.grad.item()) < 1e-5


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"own must lie in \(0, 1\].*got 0"):
        SCM(own=0.0)
    with pytest.raises(ValueError, match=r"floor above 0.* 0\.0"):
        SCM(floor=0.0)
    with pytest.raises(ValueError, match=r"at least the tangent's h, 0\.1, .* got 0\.05"):
        SCM(tangent=CentralDifference(0.1))
    with pytest.raises(ValueError, match=r"lag must be below 1.* got 0\.0"):
        SCM(lag=0.0)
    with pytest.raises(ValueError, match="sCM's student jumps to the data only"):
        SCM().check(Sampler(trailing(2), Ddim()))


@pytest.mark.parametrize(("distil", "bar"), [(True, 0.12), (False, 0.35)])  # 0.04 to 0.05 and 0.17 to 0.19, from 0.72
def test_distillation_reaches_the_exact_ode_map(gaussian: GaussianTeacher, distil: bool, bar: float) -> None:
    start = pretrained(gaussian, 400)
    before = error_of(gaussian, Student(ONE_STEP, start.net, start.schedule, start.kind))
    objective = SCM(
        distil=distil,
        tangent=CentralDifference(0.2),
        lag=0.2,
        warmup=100,
        sigma_data=1.0,
        times=LogNormal(0.0, 1.6),
        own=0.2,
    )
    student = distilled(objective, gaussian, start, ONE_STEP, {"student": AdamW(2e-3, decay="linear")}, 300, batch=256)
    after = error_of(gaussian, student)
    assert after < bar < before / 2
