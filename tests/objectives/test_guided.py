"""Guided distillation against guided Gaussians, whose every prediction and law is a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.build import build
from stepdistill.functional.distances import L2
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import GuidedDistillation
from stepdistill.parts.times import OnGrid
from stepdistill.recipes import find
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.schedule import EDM, DiscreteVP, Kind, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained
from .test_lcm import CLASS, NULL, SPREAD, Baked, batch_of, guided_gaussian

EIGHT = Sampler(trailing(8), Ddim())


class Told(nn.Module):
    """The posterior mean of a Gaussian whose mean lies as far along as the scale that it is told says."""

    def __init__(self, schedule: Schedule, kind: Kind):
        super().__init__()
        self.kind, self.schedule = kind, schedule
        self.off = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        mean = NULL + guidance[:, None] * (CLASS - NULL)
        c, variance = self.schedule.coeffs(t, x_t), SPREAD.square()
        share = (x_t - c.alpha * mean) / (c.alpha**2 * variance + c.sigma**2)
        x0, eps = mean + c.alpha * variance * share, c.sigma * share
        rows = {"x0": (1.0, 0.0), "eps": (0.0, 1.0), "v": (-c.sigma, c.alpha), "velocity": (c.dalpha, c.dsigma)}
        p, q = rows[self.kind]
        return p * x0 + q * eps + self.off


def nets_of(schedule: Schedule, kind: Kind, scale: float = 1.0) -> Nets:
    student = Student(EIGHT, Told(schedule, kind), schedule, kind)
    return Nets({"student": student, "teacher": guided_gaussian(schedule, scale)})


@pytest.mark.parametrize("schedule", [DiscreteVP.linear(), RectifiedFlow(), TrigFlow(), EDM(5.0)])
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "velocity"])
def test_a_student_that_knows_the_guided_gaussian_has_no_loss(schedule: Schedule, kind: Kind) -> None:
    """Of any kind on any path; each sample under its own scale, and the teacher's own has no say then."""
    for scale in (1.0, 3.0):
        loss = GuidedDistillation().student_loss(nets_of(schedule, kind, scale), batch_of(64), Step.at(0)).total
        assert loss.item() < 1e-16
    fixed = batch_of(64, guidance=False)
    wrong = Batch(fixed.cond | {"guidance": torch.full((64,), 2.0)}, fixed.shape, x0=fixed.x0)
    nets = nets_of(schedule, kind)
    nets["teacher"].forward = lambda x, t, cond, want: guided_gaussian(schedule, 3.0)(x, t, fixed.cond, want=want)
    assert GuidedDistillation().student_loss(nets, wrong, Step.at(0)).total > 1e-3


@pytest.mark.parametrize(("kind", "plus"), [("v", 1.0), ("eps", 0.0), ("x0", None)])
def test_the_weight_of_the_clean_estimates_error_is_what_the_docstring_says(kind: Kind, plus: float | None) -> None:
    schedule, batch = DiscreteVP.linear(), batch_of(16)
    nets = nets_of(schedule, kind)
    with torch.no_grad():
        nets.student.net.off.fill_(0.1)
    for t in (0.2, 0.5, 0.8):
        got = GuidedDistillation(times=OnGrid((t,))).student_loss(nets, batch, Step.at(2)).total
        step, times = Step.at(2), torch.full((16,), t, dtype=torch.float64)
        step.integers(1, 16)  # OnGrid's draw
        x_t = schedule.add_noise(batch.x0, step.randn((16, 2)), times)
        error = L2()(nets.student(x_t, times, batch.cond), nets.teacher(x_t, times, batch.cond)).mean()
        weight = 1.0 if plus is None else schedule.logsnr(times)[0].exp() + plus
        torch.testing.assert_close(got, weight * error, rtol=1e-6, atol=0)


def test_the_gradient_reaches_the_student_alone_and_the_teacher_is_asked_once() -> None:
    nets = nets_of(RectifiedFlow(), "velocity")
    asked = []
    nets.teacher.register_forward_hook(lambda net, args, out: asked.append(out.requires_grad))
    loss = GuidedDistillation().student_loss(nets, batch_of(8), Step.at(0)).total
    with torch.no_grad():
        nets.student.net.off.fill_(0.5)
    loss = GuidedDistillation().student_loss(nets, batch_of(8), Step.at(0)).total
    loss.backward()
    assert asked == [False, False]
    assert nets.student.net.off.grad.item() == pytest.approx(1.0)  # of off^2, the only error


def test_any_grid_and_rule_will_do() -> None:
    for steps in (1, 8, 20):
        GuidedDistillation().check(Sampler(trailing(steps), Ddim()))


def test_one_evaluation_follows_the_guided_teachers_own_sampler() -> None:
    """A student that is told nothing, at one fixed scale: its eight DDIM steps have the law that the guided teacher's
    eight have in closed form."""
    schedule, scale = DiscreteVP.linear(), 2.5
    start = pretrained(Baked(guided_gaussian(schedule)), 400)
    optim = {"student": AdamW(2e-3, decay="linear")}
    teacher = Baked(guided_gaussian(schedule, scale))
    student = distilled(GuidedDistillation(), teacher, start, EIGHT, optim, 300, batch=256)
    exact: GaussianTeacher = guided_gaussian(schedule).denoiser.given(0, scale)
    mean, cov = exact.ddim_law(trailing(8))
    before = drawn(Student(EIGHT, start.net, schedule, start.kind))
    got = drawn(student)
    assert (before.mean(0) - mean).norm() > 1.5 and (got.mean(0) - mean).norm() < 0.06
    assert (torch.cov(got.T) - cov).norm() < 0.06 * cov.norm()


def test_as_a_lora_teacher_and_student_share_one_network_and_only_adapters_move() -> None:
    trainer = build(find("digits_guided_lora@4")).trainer
    nets = trainer.nets
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5, dtype=torch.float64)
    cond = {"class_labels": torch.arange(4)}
    alone, guided = nets.teacher.denoiser(x, t, cond), nets.teacher(x, t, cond)
    assert nets.student.net.backbone is nets.teacher.denoiser.net
    assert torch.equal(nets.student(x, t, cond), alone) and not torch.allclose(guided, alone)
    losses = [float(trainer.step(i)["student/loss"]) for i in range(12)]
    assert torch.equal(nets.teacher.denoiser(x, t, cond), alone) and torch.equal(nets.teacher(x, t, cond), guided)
    assert all(".lora_" in name.replace("/", ".") for name, _ in nets.student.net.named_parameters())
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
