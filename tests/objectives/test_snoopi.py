"""SNOOPI: the law of the drawn scale, that teacher and critic share it, and what it does to the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.models.denoiser import Cond, Guided
from stepdistill.objective import Batch, Step
from stepdistill.objectives import SNOOPI, VSD
from stepdistill.parts.rollout import OneStep
from stepdistill.parts.times import OnGrid
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.testing import GaussianTeacher
from stepdistill.trainer import AdamW

from .linear_game import (
    CLASSES,
    COV,
    NULL_MEAN,
    classes,
    design,
    distilled_on_labels,
    drawn_of,
    given,
    gradients,
    guided,
    labels,
    linear_nets,
    pretrained_on_labels,
    shrink,
)

WRONG = GaussianTeacher(NULL_MEAN + 0.3, COV, classes().schedule, CLASSES - 0.2)


class Watched(Guided):
    """Keeps the scales that it guided by, of whom."""

    def guide(self, predict: object, x_t: Tensor, t: Tensor, cond: Cond, **kwargs: object) -> Tensor:
        self.seen = [*getattr(self, "seen", []), cond["guidance"]]
        return super().guide(predict, x_t, t, cond, **kwargs)


def watched(objective: SNOOPI, index: int) -> list[Tensor]:
    """Scales of teacher and critic in one step."""
    teacher = classes()
    nets = linear_nets(Watched(teacher, 7.0, {"labels": torch.tensor([2])}), CLASSES[0], COV)
    nets.student.float()
    nets["critic"] = WRONG
    objective.student_loss(nets, Batch(labels(8, 0), (8, 2)), Step.at(index))
    return nets.teacher.seen


def test_teacher_and_critic_share_one_scale_of_the_range_whatever_the_teachers_own() -> None:
    scales = []
    for index in range(60):
        of_teacher, of_critic = watched(SNOOPI(), index)
        assert torch.equal(of_teacher, of_critic) and len(set(of_teacher.tolist())) == 1
        scales.append(float(of_teacher[0]))
    assert 2.0 <= min(scales) < 2.2 and 4.8 < max(scales) <= 5.0
    assert sum(scales) / 60 == pytest.approx(3.5, abs=0.35)  # three standard errors of a uniform law


def test_a_teacher_that_is_told_its_scale_is_refused() -> None:
    nets = linear_nets(Guided(classes(), 1.0, told=True), CLASSES[0], COV)
    nets["critic"] = WRONG
    with pytest.raises(ValueError, match="this teacher is told its scale; use vsd"):
        SNOOPI().student_loss(nets, Batch(labels(8, 0), (8, 2)), Step.at(0))


def test_each_sample_may_have_its_own() -> None:
    of_teacher, of_critic = watched(SNOOPI(per_sample=True), 0)
    assert torch.equal(of_teacher, of_critic) and len(set(of_teacher.tolist())) == 8


def test_the_gradient_is_the_closed_form_at_the_drawn_scale() -> None:
    """All four laws have one covariance, so the guided gap is constant: alpha sigma A times
    (m_q - m_p) of the guided means, kappa m_c + (1 - kappa) m_null."""
    objective = SNOOPI(base=VSD(times=OnGrid((0.5,))), guidance=(1.0, 6.0))
    nets = linear_nets(guided(classes()), CLASSES[0], torch.linalg.cholesky(COV))
    nets["critic"] = WRONG
    loss = objective.student_loss(nets, Batch(labels(8, 0), (8, 2)), given(*design(2, 2)))
    kappa = loss.terms["guidance"]
    assert 1 < kappa < 6
    apart = kappa * torch.full((2,), -0.2, dtype=torch.float64) + (1 - kappa) * torch.full(
        (2,), 0.3, dtype=torch.float64
    )
    c = classes().schedule(torch.tensor(0.5, dtype=torch.float64))
    mean, factor = gradients(loss.total, nets)
    assert_close(mean, c.alpha * c.sigma * shrink(classes(), 0.5) @ apart, rtol=1e-9, atol=1e-12)
    assert factor.abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_a_range_of_one_point_is_vsd_at_that_scale(scale: float) -> None:
    base, batch = VSD(times=OnGrid((0.5,))), Batch(labels(8, 0), (8, 2))
    nets = linear_nets(guided(classes(), scale), CLASSES[0] + 0.4, torch.eye(2, dtype=torch.float64))
    nets["critic"] = WRONG
    expected = base.student_loss(nets, batch, given(*design(2, 2))).total
    nets["teacher"] = guided(classes(), 11.0)
    got = SNOOPI(base=base, guidance=(scale, scale)).student_loss(nets, batch, given(*design(2, 2))).total
    assert_close(got, expected, rtol=1e-12, atol=0)


def test_critic_and_pace_are_the_bases() -> None:
    base = VSD(student_every=3)
    student, critic = SNOOPI(base=base).turns()
    assert (student.moves, student.every) == (("student",), 3) and critic.moves == ("critic",)
    assert critic.losses == (base.critic_loss,)
    with pytest.raises(ValueError, match="OneStep trains the first"):
        SNOOPI(base=VSD(rollout=OneStep())).check(Sampler(trailing(2), Ddim()))


@pytest.mark.parametrize("bad", [(3.0, 2.0), (-1.0, 2.0), (1.0, float("inf"))])
def test_a_range_must_be_one(bad: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"objective\.guidance must be two scales that do not fall"):
        SNOOPI(guidance=bad)


def test_trained_under_random_guidance_each_class_has_its_own_law_without_guidance() -> None:
    """Guiding both alike leaves the teacher's conditional laws the fixed point, up to what the critic's null label,
    fitted to all classes at once, makes of the teacher's."""
    optim = {"student": AdamW(5e-4, (0.0, 0.999), decay="linear"), "critic": AdamW(1e-3, (0.0, 0.999), decay="linear")}
    mixture = GaussianTeacher(CLASSES.mean(0), COV, classes().schedule, CLASSES)
    start = pretrained_on_labels(mixture)
    away = GaussianTeacher(CLASSES.mean(0), 0.4 * COV, mixture.schedule, CLASSES + 0.5)
    objective = SNOOPI(base=VSD(student_every=2), guidance=(1.0, 1.5))
    student = distilled_on_labels(objective, guided(mixture), start, away, optim, 400)
    for label in (0, 1):
        got = drawn_of(student, label)
        assert (got.mean(0) - CLASSES[label]).abs().max() < 0.07
        assert (torch.cov(got.T) - COV).norm() / COV.norm() < 0.2  # it starts at 0.6
