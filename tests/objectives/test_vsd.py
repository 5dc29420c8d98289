"""VSD against closed forms, with and without guidance on the critic, and trained to the exact law."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.lora import Adapted
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import SDS, VSD
from stepdistill.parts.rollout import OneStep
from stepdistill.parts.times import OnGrid
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, mlp
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained
from .linear_game import (
    CLASSES,
    COV,
    GOLDEN,
    NULL_MEAN,
    ONE,
    classes,
    design,
    given,
    golden_nets,
    gradients,
    guided,
    labels,
    linear_nets,
    shrink,
)

OPTIM = {"student": AdamW(5e-4, (0.0, 0.999), decay="linear"), "critic": AdamW(1e-3, (0.0, 0.999), decay="linear")}
PLAIN = {"critic_guided": False}


@pytest.mark.parametrize("column", GOLDEN.values(), ids=GOLDEN)
def test_the_gradient_is_the_tables_under_the_weight_of_noises(column) -> None:
    nets = golden_nets(column)
    objective = VSD(times=OnGrid((column.time,)), **PLAIN)
    mean, factor = gradients(objective.student_loss(nets, Batch({}, (4, 1)), given(*design(1, 2))).total, nets)
    assert float(mean) == pytest.approx(column.weight * column.gap, rel=1e-5)
    assert float(factor) == pytest.approx(column.weight * column.gap_z, rel=2e-5)


@pytest.mark.parametrize("column", GOLDEN.values(), ids=GOLDEN)
def test_the_critic_takes_back_the_shrinkage_of_sds_and_nothing_else(column) -> None:
    """E[(D_q - x)] = 0 and E[(D_q - x) z] = -B L."""
    nets, batch, at = golden_nets(column), Batch({}, (4, 1)), OnGrid((column.time,))
    with_critic = gradients(VSD(times=at, **PLAIN).student_loss(nets, batch, given(*design(1, 2))).total, nets)
    without = gradients(SDS(times=at).student_loss(nets, batch, given(*design(1, 2))).total, nets)
    assert_close(with_critic[0], without[0], rtol=1e-9, atol=1e-12)
    expected = -column.weight * column.sigma**2 / column.c_q * 1.1
    assert float(with_critic[1] - without[1]) == pytest.approx(expected, rel=1e-5)


def gap(objective: VSD, nets: Nets, cond: dict[str, Tensor], scale: Tensor | None = None) -> Tensor:
    """What is subtracted from the samples of one step, (8, 2)."""
    return objective.score_gap(nets, Batch(cond, (8, 2)), given(*design(2, 2)), scale)[1]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guided_alike_a_student_with_the_teachers_law_stands_still_at_any_scale(scale: float) -> None:
    nets = linear_nets(guided(classes(), scale), CLASSES[0], torch.linalg.cholesky(COV))
    nets["critic"] = classes()
    assert gap(VSD(times=OnGrid((0.5,))), nets, labels(8, 0)).abs().max() < 1e-12


def test_guided_alike_the_gap_is_guidance_of_the_two_gaps() -> None:
    """null gap + w (conditional gap - null gap), with a critic that is wrong about both."""
    nets = linear_nets(guided(classes(), 3.0), CLASSES[0] + 0.1, torch.eye(2, dtype=torch.float64))
    nets["critic"] = GaussianTeacher(NULL_MEAN + 0.3, 2 * COV, classes().schedule, CLASSES - 0.2)
    objective = VSD(times=OnGrid((0.5,)))
    got = gap(objective, nets, labels(8, 0))
    nets["teacher"] = guided(classes())
    conditional, null = gap(objective, nets, labels(8, 0)), gap(objective, nets, labels(8, 2))
    assert_close(got, null + 3.0 * (conditional - null), rtol=1e-9, atol=1e-12)
    assert (got - conditional).abs().max() > 0.01


def test_with_a_plain_critic_the_fixed_point_is_guided() -> None:
    mode = CLASSES[0] + 2.0 * (CLASSES[0] - NULL_MEAN)
    nets = linear_nets(guided(classes(), 3.0), mode, torch.linalg.cholesky(COV))
    assert gap(VSD(times=OnGrid((0.5,)), **PLAIN), nets, labels(8, 0)).abs().max() < 1e-12
    away = linear_nets(guided(classes(), 3.0), CLASSES[0], torch.linalg.cholesky(COV))
    c = classes().schedule(torch.tensor(0.5, dtype=torch.float64))
    pushed = c.alpha * c.sigma * shrink(classes(), 0.5) @ (CLASSES[0] - mode)
    got = gap(VSD(times=OnGrid((0.5,)), **PLAIN), away, labels(8, 0))
    assert_close(got, pushed.expand(8, 2), rtol=1e-9, atol=1e-12)


def test_a_critic_of_untrained_adapters_gives_no_gradient_at_all(gaussian: GaussianTeacher) -> None:
    """As the paper starts: the critic is a LoRA on the teacher's own network, whose second factor is zero."""
    torch.manual_seed(0)
    shared = mlp(2, 16, 3)
    nets = Nets()
    nets["teacher"] = Guided(Denoiser(shared, gaussian.schedule, "v"))
    nets["student"] = Student(ONE, mlp(2, 16, 3), gaussian.schedule, "v")
    nets["critic"] = Denoiser(Adapted(shared, 4, 4.0, ("enter", "hidden.0")), gaussian.schedule, "v")
    batch = Batch({}, (16, 2))
    VSD().student_loss(nets, batch, Step.at(0)).total.backward()
    assert all(p.grad.abs().max() == 0 for p in nets.student.parameters())
    VSD().critic_loss(nets, batch, Step.at(0)).total.backward()
    moved = [p for p in nets.critic.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved and all(p.grad is None for n, p in shared.named_parameters() if ".lora_" not in n)
    assert all(p.grad.abs().max() == 0 for p in nets.student.parameters())


class Attentive(GaussianTeacher):
    """A critic that keeps the labels it is asked for."""

    kind = "x0"

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], *, want: str = "x0") -> Tensor:
        self.asked = cond["labels"]
        return super().forward(x_t, t, cond, want=want)


@pytest.mark.parametrize(
    ("settings", "share"), [({}, 0.1), ({"null_rate": 0.5}, 0.5), ({"null_rate": 0.0}, 0.0), (PLAIN, 0.0)]
)
def test_labels_are_dropped_for_a_guided_critic_alone(settings: dict[str, object], share: float) -> None:
    nets = linear_nets(guided(classes()), NULL_MEAN, COV)
    nets.student.float()
    nets["critic"] = Attentive(NULL_MEAN, COV, classes().schedule, CLASSES)
    batch = Batch(labels(4000, 1), (4000, 2))
    VSD(**settings).critic_loss(nets, batch, Step.at(0))
    dropped = (nets.critic.asked == 2).double().mean().item()
    assert dropped == pytest.approx(share, abs=0.03 if share else 0)
    assert set(nets.critic.asked.tolist()) <= {1, 2}
    assert set(batch.cond["labels"].tolist()) == {1}


def test_dropping_without_a_null_condition_is_refused() -> None:
    nets = linear_nets(guided(classes()), NULL_MEAN, COV)
    nets.student.float()
    nets.teacher.null = {}
    with pytest.raises(ValueError, match="this teacher has no null condition; set the share that is dropped to 0"):
        VSD().critic_loss(nets, Batch(labels(4, 1), (4, 2)), Step.at(0))


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"objective\.null_rate must lie in \[0, 1\); got 1.0"):
        VSD(null_rate=1.0)
    with pytest.raises(ValueError, match="OneStep trains the first of the sampler's 2 steps only"):
        VSD(rollout=OneStep()).check(Sampler(trailing(2), Ddim()))


def test_the_student_reaches_the_exact_law(gaussian: GaussianTeacher) -> None:
    student = distilled(VSD(student_every=2, **PLAIN), gaussian, pretrained(gaussian), ONE, OPTIM, 600)
    got, exact = drawn(student), gaussian.cov.float()
    assert (got.mean(0) - gaussian.mean).abs().max() < 0.02
    assert (torch.cov(got.T) - exact).norm() / exact.norm() < 0.12  # it starts at 1: a point
