"""Decoupled DMD: its two terms add up to guided DMD, one pushes for ever, and together they know where to stop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.functional.divergence import dmd_gap
from stepdistill.models.denoiser import Guided
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import DecoupledDMD
from stepdistill.parts.rollout import BackwardSim, OneStep
from stepdistill.parts.times import OnGrid, Uniform
from stepdistill.sampling import Ddim, Renoise, Sampler, trailing
from stepdistill.schedule import RectifiedFlow, Schedule
from stepdistill.student import Student
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

AT = OnGrid((0.5,))
PLAIN = DecoupledDMD(normalise=False, dm_times=AT, ca_times=AT)
BATCH = Batch(labels(12, 0), (12, 2))
PUSH = CLASSES[0] - NULL_MEAN


def loss_of(objective: DecoupledDMD, nets: Nets) -> tuple[Tensor, Tensor]:
    """Gradients of mean and factor, of exact moments over the sample's noise and the two of re-noising."""
    return gradients(objective.student_loss(nets, BATCH, given(*design(2, 3))).total, nets)


def test_at_one_time_and_noise_the_terms_add_up_to_dmd_with_a_guided_teacher() -> None:
    """Eq. 6, sample by sample; the critic has another covariance, so nothing is constant."""
    teacher = guided(classes(), 4.0)
    nets = linear_nets(teacher, CLASSES[0] + 0.3, 1.3 * torch.eye(2, dtype=torch.float64))
    x0, x_t, t = torch.randn(12, 2).double(), torch.randn(12, 2).double(), torch.rand(12).double()
    got = PLAIN.dm_gap(nets, BATCH, x0, x_t, t) + PLAIN.ca_gap(nets, BATCH, x0, x_t, t)
    whole = dmd_gap(x0, teacher(x_t, t, BATCH.cond), nets.critic(x_t, t, {}), normalise=False)
    assert_close(got, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_the_push_alone_is_the_same_everywhere_and_so_never_stops(scale: float) -> None:
    """-(w - 1) A (mu_c - mu_null) whatever the student's mean and spread."""
    alone = DecoupledDMD(normalise=False, ca_times=AT, dm_weight=0.0)
    for mean, spread in ((CLASSES[0], 0.7), (CLASSES[0] + 20 * PUSH, 0.1)):
        nets = linear_nets(guided(classes(), scale), mean, spread * torch.eye(2, dtype=torch.float64))
        to_mean, to_factor = loss_of(alone, nets)
        assert_close(to_mean, -(scale - 1) * shrink(classes(), 0.5) @ PUSH, rtol=1e-9, atol=1e-12)
        assert to_factor.abs().max() < 1e-12


def test_matching_alone_is_dmd_with_the_plain_teacher() -> None:
    alone = DecoupledDMD(normalise=False, dm_times=AT, ca_weight=0.0)
    factor = 0.7 * torch.eye(2, dtype=torch.float64)
    nets = linear_nets(guided(classes(), 4.0), CLASSES[0] + 0.3, factor)
    to_mean, to_factor = loss_of(alone, nets)
    a, b = shrink(classes(), 0.5), shrink(nets.critic, 0.5)
    assert_close(to_mean, a @ torch.full((2,), 0.3, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert_close(to_factor, (a - b) @ factor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", [None, "flow"])
def test_together_they_rest_at_the_guided_law(schedule: str | None) -> None:
    """m = mu_c + (w - 1) (mu_c - mu_null) and S = Sigma, at two independent noises, sample by sample."""
    teacher = classes(RectifiedFlow() if schedule else None)
    nets = linear_nets(guided(teacher, 3.0), CLASSES[0] + 2.0 * PUSH, torch.linalg.cholesky(COV))
    loss = PLAIN.student_loss(nets, BATCH, given(*design(2, 3)))
    assert loss.total.item() < 1e-24 and loss.terms["ca"].item() > 1e-3


def test_weights_multiply_their_terms() -> None:
    nets = linear_nets(guided(classes(), 3.0), CLASSES[0] + 0.3, torch.eye(2, dtype=torch.float64))

    def mean(dm: float, ca: float) -> Tensor:
        return loss_of(DecoupledDMD(normalise=False, dm_times=AT, ca_times=AT, dm_weight=dm, ca_weight=ca), nets)[0]

    assert_close(mean(2.0, 3.0), 2 * mean(1.0, 0.0) + 3 * mean(0.0, 1.0), rtol=1e-9, atol=1e-12)


def test_each_term_is_divided_by_the_distance_at_its_own_time() -> None:
    nets = linear_nets(guided(classes(), 3.0), CLASSES[0] + 0.3, torch.eye(2, dtype=torch.float64))
    x0, x_t, t = torch.randn(12, 2).double(), torch.randn(12, 2).double(), torch.rand(12).double()
    distance = (x0 - classes()(x_t, t, BATCH.cond)).abs().mean(1, keepdim=True)
    for term in ("dm_gap", "ca_gap"):
        plain = getattr(PLAIN, term)(nets, BATCH, x0, x_t, t)
        assert_close(getattr(DecoupledDMD(), term)(nets, BATCH, x0, x_t, t), plain / distance, rtol=1e-12, atol=0)


class Counting(GaussianTeacher):
    """Counts the samples it is asked about."""

    asked = 0

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], **kwargs: str) -> Tensor:
        self.asked += len(x_t)
        return super().forward(x_t, t, cond, **kwargs)


@pytest.mark.parametrize(
    ("scale", "weights", "teacher", "critic"),
    [(1.0, {}, 12, 12), (3.0, {}, 36, 12), (3.0, {"dm_weight": 0.0}, 24, 0), (3.0, {"ca_weight": 0.0}, 12, 12)],
)
def test_no_network_is_asked_for_a_term_that_is_nothing(
    scale: float, weights: dict[str, float], teacher: int, critic: int
) -> None:
    counting = Counting(NULL_MEAN, COV, classes().schedule, CLASSES)
    nets = linear_nets(guided(counting, scale), CLASSES[0], COV)
    nets.student.float()
    nets["critic"] = Counting(NULL_MEAN, COV, classes().schedule, CLASSES)
    DecoupledDMD(**weights).student_loss(nets, BATCH, Step.at(0))
    assert (counting.asked, nets.critic.asked) == (teacher, critic)


class Timed(GaussianTeacher):
    """Keeps the times it was asked at."""

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], **kwargs: str) -> Tensor:
        self.times = t
        return super().forward(x_t, t, cond, **kwargs)


def seen_times(schedule: Schedule, steps: int, index: int, rollout: BackwardSim) -> tuple[float, Tensor, Tensor]:
    """The time of the student's own input, and those of the two terms."""
    inputs: list[float] = []
    nets = linear_nets(guided(Timed(NULL_MEAN, COV, schedule, CLASSES), 3.0), CLASSES[0], COV)
    nets["critic"] = Timed(NULL_MEAN, COV, schedule, CLASSES)
    student = Student(Sampler(trailing(steps), Renoise()), nets.student.net, schedule, "x0").float()
    student.register_forward_pre_hook(lambda _, args: inputs.append(float(args[1][0])))
    nets["student"] = student
    DecoupledDMD(rollout=rollout).student_loss(nets, BATCH, Step.at(index))
    return inputs[-1], nets.critic.times, nets.teacher.denoiser.times[:12]  # the push is asked last, in both halves


def test_the_push_is_asked_below_the_students_input_and_matching_everywhere() -> None:
    schedule, below = classes().schedule, {}
    for index in range(40):
        own, dm_t, ca_t = seen_times(schedule, 4, index, BackwardSim())
        below.setdefault(own, []).append(ca_t)
        assert dm_t.max() > 0.9 and dm_t.min() < 0.1  # stratified over the batch of 12
        assert not torch.equal(dm_t, ca_t)
    assert sorted(below) == [0.25, 0.5, 0.75, 1.0]
    for own, times in below.items():
        assert 0.9 * own < torch.cat(times).max() <= own and torch.cat(times).min() < 0.1 * own


def test_a_teacher_that_is_told_its_scale_has_no_push() -> None:
    nets = linear_nets(Guided(classes(), 3.0, told=True), CLASSES[0], COV)
    nets.student.float()
    with pytest.raises(ValueError, match="pushes from a null condition, and this teacher has none"):
        DecoupledDMD(dm_weight=0.0).student_loss(nets, BATCH, Step.at(0))


def test_scales_may_come_with_the_batch() -> None:
    """Each sample's own, which nobody but the push is told."""
    scales = torch.linspace(1.0, 4.0, 12, dtype=torch.float64)
    nets = linear_nets(guided(classes()), CLASSES[0], torch.eye(2, dtype=torch.float64))
    batch = Batch(BATCH.cond | {"guidance": scales}, (12, 2))
    x0, x_t, t = torch.randn(12, 2).double(), torch.randn(12, 2).double(), torch.full((12,), 0.5).double()
    got = PLAIN.ca_gap(nets, batch, x0, x_t, t)
    assert_close(got, -(scales - 1)[:, None] * (shrink(classes(), 0.5) @ PUSH), rtol=1e-9, atol=1e-12)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"objective\.dm_weight and ca_weight must be at least 0 and one of them above"
    ):
        DecoupledDMD(dm_weight=0.0, ca_weight=0.0)
    with pytest.raises(ValueError, match="OneStep trains the first of the sampler's 4 steps only"):
        DecoupledDMD(rollout=OneStep()).check(Sampler(trailing(4), Ddim()))


def test_trained_each_class_reaches_its_guided_law() -> None:
    """One step, so that both terms are asked at times of one law; at scale 2 the classes move apart."""
    optim = {"student": AdamW(5e-4, (0.0, 0.999), decay="linear"), "critic": AdamW(1e-3, (0.0, 0.999), decay="linear")}
    law = Uniform(0.02, 0.98)
    objective = DecoupledDMD(dm_times=law, ca_times=law, student_every=2)
    start = pretrained_on_labels(classes())
    student = distilled_on_labels(objective, guided(classes(), 2.0), start, classes(), optim, 400)
    for label in (0, 1):
        got, mean = drawn_of(student, label), 2 * CLASSES[label] - NULL_MEAN
        assert (
            got.mean(0) - mean
        ).abs().max() < 0.07  # it starts 0.7 and 0.5 away, where the push alone would not stop
        assert (torch.cov(got.T) - COV).norm() / COV.norm() < 0.26
