"""LCM against the exact fixed point of its loss under a guided teacher, and a naive re-derivation."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stepdistill.functional.distances import L2, ElementHuber
from stepdistill.models.denoiser import Cond, Guided, Predictor
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import LCM
from stepdistill.sampling import Ddim, Move, Renoise, Sampler, StepRule, Tcd, at, trailing
from stepdistill.schedule import EDM, DiscreteVP, Kind, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student
from stepdistill.trainer import AdamW, Run, Trainer

from .conftest import distilled, drawn, pretrained

ONE = Sampler(trailing(1), Renoise())
CLASS, NULL, SPREAD = (torch.tensor(v, dtype=torch.float64) for v in ((1.5, -0.5), (0.3, 0.2), (0.8, 0.3)))
"""Means of the one class and without a class, and the standard deviations of both."""


def guided_gaussian(schedule: Schedule, scale: float = 1.0) -> Guided:
    """An exact class-conditional teacher under guidance; label 0 is the class, 1 the null label."""
    exact = GaussianTeacher(NULL, SPREAD.square().diag(), schedule, means=CLASS[None])
    return Guided(exact, scale, {"labels": torch.tensor([1])})


def batch_of(n: int, *, guidance: bool = True) -> Batch:
    rng = torch.Generator().manual_seed(3)
    x0 = CLASS + SPREAD * torch.randn(n, 2, generator=rng)
    cond = {"labels": torch.zeros(n, dtype=torch.int64)}
    if guidance:
        cond["guidance"] = 1 + 4 * torch.rand(n, generator=rng, dtype=torch.float64)
    return Batch(cond, (n, 2), x0=x0)


class Composition(nn.Module):
    """What n DDIM steps of the guided teacher make of a state, in closed form, for the scale that it is told."""

    def __init__(self, schedule: Schedule, n: int):
        super().__init__()
        self.schedule, self.n = schedule, n

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        mean, variance = NULL + guidance[:, None] * (CLASS - NULL), SPREAD.square()
        factors = [torch.ones(2, dtype=torch.float64)]
        for i in range(1, self.n + 1):
            c, d = (self.schedule(torch.tensor(j / self.n * self.schedule.t_max)) for j in (i, i - 1))
            step = (c.alpha * d.alpha * variance + c.sigma * d.sigma) / (c.alpha**2 * variance + c.sigma**2)
            factors.append(factors[-1] * step)
        factor = torch.stack(factors)[(t / self.schedule.t_max * self.n).round().long()]
        return mean + factor * (x_t - self.schedule.coeffs(t, x_t).alpha * mean)


SCHEDULES = [DiscreteVP.linear(), RectifiedFlow(), TrigFlow(), EDM(5.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_guided_solvers_own_composition_has_no_loss(schedule: Schedule) -> None:
    """A scale for each sample reaches the teacher and the student that is told it, once."""
    student = Student(ONE, Composition(schedule, 8), schedule, "x0")
    nets = Nets({"student": student, "target": student, "teacher": guided_gaussian(schedule)})
    lcm = LCM(intervals=8, distance=L2())
    assert lcm.student_loss(nets, batch_of(256), Step.at(0)).total.item() < 1e-14
    nets["teacher"] = guided_gaussian(schedule, 2.0)  # the batch's scales stand in place of it, not on top
    assert lcm.student_loss(nets, batch_of(256), Step.at(0)).total.item() < 1e-14
    other = LCM(intervals=7, distance=L2())  # of another grid it is no fixed point
    assert other.student_loss(nets, batch_of(256), Step.at(0)).total.item() > 1e-6


@pytest.mark.parametrize("target_decay", [0.95, None])
def test_the_loss_equals_a_loop_over_samples(target_decay: float | None) -> None:
    """Guidance, the solver's step and the element-wise distance in plain floats."""
    n, schedule = 24, DiscreteVP.linear()
    teacher = guided_gaussian(schedule)
    student = Student(ONE, Composition(schedule, 5), schedule, "x0")  # anything that depends on all it is given
    target = Student(ONE, Composition(schedule, 3), schedule, "x0")
    nets = Nets({"student": student, "teacher": teacher})
    if target_decay is None:
        target = student
    else:
        nets["target"] = target
    batch = batch_of(n)
    got = LCM(intervals=50, target_decay=target_decay).student_loss(nets, batch, Step.at(4)).total.item()

    step = Step.at(4)
    eps, i = step.randn((n, 2)).double(), step.integers(50, n) + 1
    expected = 0.0
    for k in range(n):
        cond = {name: value[k : k + 1] for name, value in batch.cond.items()}
        t, s = (torch.tensor([j / 50], dtype=torch.float64) for j in (i[k].item(), i[k].item() - 1))
        a, b = schedule(t), schedule(s)
        x_t = a.alpha * batch.x0[k] + a.sigma * eps[k]
        told, null = (teacher.denoiser(x_t[None], t, {"labels": torch.tensor([label])})[0] for label in (0, 1))
        x0 = null + cond["guidance"] * (told - null)
        x_s = b.alpha * x0 + b.sigma * (x_t - a.alpha * x0) / a.sigma
        aim = x_s if i[k] == 1 else target(x_s[None], s, cond)[0]
        gap = (student(x_t[None], t, cond)[0] - aim).tolist()
        expected += sum(math.sqrt(g * g + 0.001**2) - 0.001 for g in gap) / 2 / n
    assert got == pytest.approx(expected, rel=1e-9)


def test_without_a_running_average_the_target_is_the_student_and_carries_no_gradient(gaussian: GaussianTeacher) -> None:
    student = exact_student(gaussian, ONE).double()
    with torch.no_grad():
        student.net.scale.fill_(0.8)
    nets = Nets({"student": student, "teacher": gaussian})
    batch = Batch({}, (64, 2), x0=gaussian.sample(64, torch.Generator().manual_seed(2), dtype=torch.float64))
    LCM(target_decay=None).student_loss(nets, batch, Step.at(0)).total.backward()
    own = student.net.scale.grad.clone()

    nets["target"] = copy.deepcopy(student)  # a copy that is fixed on purpose
    nets["target"].net.scale.grad = student.net.scale.grad = None
    LCM().student_loss(nets, batch, Step.at(0)).total.backward()
    assert own.item() == pytest.approx(student.net.scale.grad.item(), rel=1e-12) and own.abs() > 1e-3
    assert nets["target"].net.scale.grad is None
    assert LCM(target_decay=None).averages() == {} and LCM().averages() == {"target": 0.95}


def test_with_one_interval_the_target_network_has_no_say(gaussian: GaussianTeacher) -> None:
    student, nonsense = exact_student(gaussian, ONE).double(), exact_student(gaussian, ONE).double()
    with torch.no_grad():
        nonsense.net.scale.fill_(float("nan"))
    nets = Nets({"student": student, "target": nonsense, "teacher": gaussian})
    batch = Batch({}, (8, 2), x0=gaussian.sample(8, torch.Generator().manual_seed(2), dtype=torch.float64))
    assert torch.isfinite(LCM(intervals=1).student_loss(nets, batch, Step.at(0)).total)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda: LCM(intervals=0), "intervals must be at least 1"),
        (lambda: LCM(target_decay=1.0), r"target_decay must lie in \[0, 1\)"),
        (
            lambda: LCM(intervals=50).check(Sampler(trailing(4), Renoise())),
            "times 0.75 is no point of the grid of 50 intervals",
        ),
        (lambda: LCM(intervals=8).check(Sampler(trailing(4), Ddim())), r"jumps to the data only; use Renoise\(\)"),
        (lambda: LCM(intervals=8).check(Sampler(trailing(4), Tcd(0.3))), r"use Renoise\(\)"),
    ],
)
def test_what_cannot_work_is_refused(bad: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bad()


def test_grids_that_it_serves() -> None:
    for steps in (1, 2, 3, 4, 6, 8):
        LCM().check(Sampler(trailing(steps), Renoise()))
    LCM(intervals=50).check(Sampler((1.0, 0.76, 0.5, 0.26), Renoise()))  # the paper's four steps, 999, 759, 499, 259
    LCM().check(Sampler(trailing(1), Ddim()))


class PerTime(nn.Module):
    """Affine in the state and in the scale that it is told, for each grid time: holds the fixed point exactly."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n
        self.slope, self.offset, self.told = (nn.Parameter(torch.full((n + 1, 2), v)) for v in (1.0, 0.0, 0.0))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        i = (t * self.n).round().long()
        return self.slope[i] * x_t + self.offset[i] + self.told[i] * guidance[:, None].to(x_t)


def test_a_student_that_is_told_the_scale_learns_what_the_scale_does() -> None:
    """Trained from scratch, slopes are products of DDIM's contractions and the scale moves the mean by as much as the
    guided teacher's means are apart."""
    n, schedule = 4, RectifiedFlow()
    torch.manual_seed(0)
    nets = Nets()
    nets["teacher"] = guided_gaussian(schedule)
    nets["student"] = Student(ONE, PerTime(n), schedule, "x0")
    spec = AdamW(0.03, (0.9, 0.99), decay="cosine", final=0.001)

    def data(step: Step) -> Batch:
        cond = {"labels": torch.zeros(512, dtype=torch.int64), "guidance": 1 + 3 * step.rand(512)}
        return Batch(cond, (512, 2), x0=nets.teacher.denoiser.sample(512, step.rng, cond))

    objective = LCM(intervals=n, target_decay=0.9, distance=L2())
    optim = {"student": spec.build(nets.student.parameters())}
    trainer = Trainer(nets, objective, optim, data, Run(steps=700, clip=0), specs={"student": spec})
    for index in range(700):
        trainer.step(index)
    exact = Composition(schedule, n)
    grid, two = torch.arange(1, n + 1).double() / n, torch.tensor([1.0, 2.0]).double()
    for i, t in enumerate(grid, 1):
        at_zero, at_one = (exact(torch.full((2, 2), v).double(), t.expand(2), None, two) for v in (0.0, 1.0))
        slope, told = (at_one - at_zero)[0], (at_zero[1] - at_zero[0])
        if i < n:  # at pure noise the state is the same noise for all: no slope is lost, it is only learned last
            torch.testing.assert_close(nets.student.net.slope[i].double(), slope, rtol=0.02, atol=0.02)
        torch.testing.assert_close(nets.student.net.told[i].double(), told, rtol=0.02, atol=0.02)


@dataclass(frozen=True)
class GuidedOde(StepRule):
    """Not a solver: fails if it is asked to solve anything but the guided teacher."""

    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        assert isinstance(predict, Guided) and "guidance" in move.cond
        return Ddim()(predict, x_t, move)


def test_the_solver_walks_the_guided_teacher() -> None:
    schedule = RectifiedFlow()
    student = Student(ONE, Composition(schedule, 8), schedule, "x0")
    nets = Nets({"student": student, "target": student, "teacher": guided_gaussian(schedule)})
    LCM(intervals=8, solver=GuidedOde()).student_loss(nets, batch_of(4), Step.at(0))


class Baked(nn.Module):
    """A guided teacher as a predictor without conditions, for students that are told nothing."""

    def __init__(self, teacher: Guided):
        super().__init__()
        self.teacher, self.schedule, self.dim = teacher, teacher.schedule, 2

    def labels(self, n: int) -> Cond:
        return {"labels": torch.zeros(n, dtype=torch.int64)}

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        return self.teacher(x_t, t, self.labels(len(x_t)), want=want)

    def sample(self, n: int, rng: torch.Generator, cond: Cond | None = None) -> Tensor:
        return self.teacher.denoiser.sample(n, rng, self.labels(n))


def test_one_step_lands_on_the_guided_law() -> None:
    """From a network of the class without guidance to what eight steps of the guided teacher make of the noise, and so
    to the guided mean, which lies elsewhere."""
    schedule, scale = DiscreteVP.linear(), 2.0
    start = pretrained(Baked(guided_gaussian(schedule)), 400)
    teacher = Baked(guided_gaussian(schedule, scale))
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    goal = Composition(schedule, 8)(noise, at(1.0, noise), None, torch.full((4000,), scale))

    def error(student: nn.Module) -> float:
        with torch.no_grad():
            return (student(noise.float(), at(1.0, noise), {}) - goal).square().mean().sqrt().item()

    optim = {"student": AdamW(2e-3, decay="linear")}
    objective = LCM(intervals=8, distance=ElementHuber(0.1))
    student = distilled(objective, teacher, start, ONE, optim, 400, batch=256)
    assert error(start) > 1.0 and error(student) < 0.03
    mean = guided_gaussian(schedule).denoiser.given(0, scale).mean
    assert (drawn(student).mean(0) - mean).abs().max() < 0.04
