"""DMD against the golden table, its regression against the plain one, and trained to the exact law and map."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from stepdistill.functional.distances import L2, Huber
from stepdistill.objective import Batch, Step
from stepdistill.objectives import DMD, KD
from stepdistill.parts.rollout import BackwardSim, OneStep
from stepdistill.parts.times import OnGrid
from stepdistill.sampling import Ddim, Renoise, Sampler, at, trailing
from stepdistill.testing import GaussianTeacher
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
)

PLAIN = DMD(regression_weight=0.0, normalise=False)


@pytest.mark.parametrize("column", GOLDEN.values(), ids=GOLDEN)
def test_without_its_weight_the_gradient_is_the_tables(column) -> None:
    nets = golden_nets(column)
    objective = replace(PLAIN, times=OnGrid((column.time,)))
    mean, factor = gradients(objective.student_loss(nets, Batch({}, (4, 1)), given(*design(1, 2))).total, nets)
    assert float(mean) == pytest.approx(column.gap, rel=1e-5)
    assert float(factor) == pytest.approx(column.gap_z, rel=2e-5)


def test_the_weight_is_one_over_the_distance_to_the_teachers_estimate() -> None:
    """Eq. 8, sample by sample, in one dimension where posterior means are one line."""
    column = GOLDEN["flow"]
    nets, (z, eps) = golden_nets(column), design(1, 2)
    objective = DMD(regression_weight=0.0, times=OnGrid((0.5,)))
    loss = objective.student_loss(nets, Batch({}, (4, 1)), given(z, eps)).total
    expected = 0.0
    for x0, e in zip((-0.2 + 1.1 * z)[:, 0].tolist(), eps[:, 0].tolist(), strict=True):
        x_t = 0.5 * x0 + 0.5 * e
        teacher = 0.3 + 0.5 * 1.4 / 0.6 * (x_t - 0.5 * 0.3)
        critic = -0.2 + 0.5 * 1.21 / 0.5525 * (x_t + 0.5 * 0.2)
        expected += 0.5 * ((critic - teacher) / abs(x0 - teacher)) ** 2 / 4
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_fixed_point_is_the_guided_law_sample_by_sample(scale: float) -> None:
    mode = CLASSES[1] + (scale - 1) * (CLASSES[1] - NULL_MEAN)
    nets = linear_nets(guided(classes(), scale), mode, torch.linalg.cholesky(COV))
    batch = Batch(labels(8, 1), (8, 2))
    loss = DMD(regression_weight=0.0, times=OnGrid((0.6,))).student_loss(nets, batch, given(*design(2, 2))).total
    assert loss.item() < 1e-24
    mean, factor = gradients(loss, nets)
    assert mean.abs().max() < 1e-12 and factor.abs().max() < 1e-12


def test_the_loss_is_matching_plus_a_weight_of_the_regression_on_the_batchs_pairs() -> None:
    nets, (z, eps) = golden_nets(GOLDEN["vp"]), design(1, 2)
    path = torch.stack([torch.linspace(-1, 1, 4)[:, None], torch.linspace(2, 0, 4)[:, None]], 1).double()
    objective = DMD(regression=KD(distance=Huber(0.1)), regression_weight=0.25, times=OnGrid((0.5,)))
    loss = objective.student_loss(nets, Batch({}, (4, 1), path=path), given(z, eps))
    off = -0.2 + 1.1 * path[:, 0, 0] - path[:, 1, 0]  # the student's answer to the stored noise, less the image
    regression = ((off.square() + 0.01).sqrt() - 0.1).mean()
    assert_close(loss.terms["regression"], regression, rtol=1e-9, atol=0)
    alone = replace(objective, regression_weight=0.0).student_loss(nets, Batch({}, (4, 1)), given(z, eps)).total
    assert_close(loss.terms["dm"], alone, rtol=1e-12, atol=0)
    assert_close(loss.total, alone + 0.25 * regression, rtol=1e-9, atol=0)


def test_a_student_that_answers_the_pairs_has_no_regression_left() -> None:
    nets, (z, eps) = golden_nets(GOLDEN["vp"]), design(1, 2)
    path = torch.stack([z, -0.2 + 1.1 * z], 1)
    loss = DMD(times=OnGrid((0.5,))).student_loss(nets, Batch({}, (4, 1), path=path), given(z, eps))
    assert loss.terms["regression"].item() < 1e-20 and loss.terms["dm"].item() > 1e-3


def test_pairs_are_needed_for_the_regression_alone() -> None:
    assert DMD().data == {"path"} and PLAIN.data == frozenset()


def test_samplers_that_do_not_go_with_it_are_refused() -> None:
    noisy = Sampler(trailing(4), Renoise())
    with pytest.raises(ValueError, match="KD trains jumps"):
        DMD().check(noisy)
    PLAIN.check(noisy)
    with pytest.raises(ValueError, match="OneStep trains the first of the sampler's 4 steps only"):
        DMD(rollout=OneStep()).check(Sampler(trailing(4), Ddim()))
    with pytest.raises(ValueError, match=r"objective\.regression_weight must be at least 0"):
        DMD(regression_weight=-1.0)


OPTIM = {"student": AdamW(1e-3, (0.0, 0.999), decay="linear"), "critic": AdamW(1e-3, (0.0, 0.999), decay="linear")}


def paths(gaussian: GaussianTeacher, times: tuple[float, ...]):
    """The teacher's exact ODE solutions at a student's grid."""

    def batch(step: Step) -> Batch:
        noise = step.randn((512, 2))
        states = [gaussian.flow_map(noise, at(1.0, noise), at(s, noise)) for s in (*times[1:], 0.0)]
        return Batch({}, (512, 2), path=torch.stack([noise, *states], 1))

    return batch


def test_the_student_reaches_the_exact_law_along_the_teachers_own_map(gaussian: GaussianTeacher) -> None:
    """The law from matching, the map from the regression; without it the map is nobody's business."""
    objective = DMD(regression_weight=1.0, regression=KD(distance=L2()), student_every=2)
    data = paths(gaussian, trailing(1))
    student = distilled(objective, gaussian, pretrained(gaussian), ONE, OPTIM, 600, data=data)
    got, exact = drawn(student), gaussian.cov.float()
    assert (got.mean(0) - gaussian.mean).abs().max() < 0.01
    assert (torch.cov(got.T) - exact).norm() / exact.norm() < 0.03  # it starts at 1: a point
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        off = student(noise, at(1.0, noise), {}) - gaussian.consistency(noise, at(1.0, noise))
    assert off.square().mean().sqrt() < 0.02  # it starts at 0.72


def test_several_steps_regress_interval_by_interval(gaussian: GaussianTeacher) -> None:
    """A path of four states fits a four-step student on its own states; the graph reaches both terms."""
    sampler = Sampler(trailing(4), Ddim())
    objective = DMD(rollout=BackwardSim())
    objective.check(sampler)
    data = paths(gaussian, trailing(4))
    student = distilled(objective, gaussian, pretrained(gaussian, 100), sampler, OPTIM, 2, data=data)
    assert student.sampler == sampler
