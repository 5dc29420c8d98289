"""SDS against closed forms: it pulls to the mode and shrinks whatever law it starts from."""

from __future__ import annotations

import pytest
import torch

from stepdistill.models.denoiser import Denoiser
from stepdistill.objective import Batch
from stepdistill.objectives import SDS
from stepdistill.parts.rollout import OneStep
from stepdistill.parts.times import OnGrid
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.testing import GaussianTeacher, mlp
from stepdistill.trainer import AdamW, Run, Trainer

from .linear_game import (
    CLASSES,
    GOLDEN,
    NULL_MEAN,
    classes,
    design,
    given,
    golden_nets,
    gradients,
    guided,
    labels,
    linear_nets,
)


@pytest.mark.parametrize("column", GOLDEN.values(), ids=GOLDEN)
def test_the_gradient_is_a_pull_to_the_mean_and_a_shrinkage(column) -> None:
    """E[x - D_p] = A (m - mu) and E[(x - D_p) z] = A L, of exact moments, at the table's C_p."""
    nets = golden_nets(column)
    loss = SDS(times=OnGrid((column.time,))).student_loss(nets, Batch({}, (4, 1)), given(*design(1, 2))).total
    mean, factor = gradients(loss, nets)
    a = column.sigma**2 / column.c_p
    assert float(mean) == pytest.approx(column.weight * a * (-0.2 - 0.3), rel=1e-5)
    assert float(factor) == pytest.approx(column.weight * a * 1.1, rel=1e-5)


def test_the_weight_is_sigma_squared_on_variance_preserving_paths() -> None:
    """Sample by sample, from the noise as the teacher's Gaussian predicts it."""
    column = GOLDEN["vp"]
    nets, (z, eps) = golden_nets(column), design(1, 2)
    loss = SDS(times=OnGrid((column.time,))).student_loss(nets, Batch({}, (4, 1)), given(z, eps)).total
    expected = 0.0
    for x0, e in zip((-0.2 + 1.1 * z)[:, 0], eps[:, 0], strict=True):
        x_t = 0.8 * x0 + 0.6 * e
        predicted = 0.6 / column.c_p * (x_t - 0.8 * 0.3)
        expected += 0.5 * (0.36 * (predicted - e)) ** 2 / 4
    assert loss.item() == pytest.approx(float(expected), rel=1e-9)


def test_even_the_teachers_own_law_shrinks() -> None:
    """Where distribution matching stands still: A L is no zero at L L^T = Sigma, only where L vanishes."""
    teacher = classes()
    objective = SDS(times=OnGrid((0.4,)))
    for factor in (torch.linalg.cholesky(teacher.cov), 1e-9 * torch.eye(2, dtype=torch.float64)):
        nets = linear_nets(teacher, teacher.mean, factor)
        loss = objective.student_loss(nets, Batch({}, (8, 2)), given(*design(2, 2))).total
        mean, gradient = gradients(loss, nets)
        assert mean.abs().max() < 1e-12
        along = (gradient * factor).sum() / factor.square().sum()  # positive: descending it lowers the spread
        assert along > 0.05 and gradient.norm() < factor.norm()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_moves_the_mode(scale: float) -> None:
    """The mean stands still at mu_c + (w - 1) (mu_c - mu_0), the mode of the guided teacher."""
    mode = CLASSES[1] + (scale - 1) * (CLASSES[1] - NULL_MEAN)
    nets = linear_nets(guided(classes(), scale), mode, torch.eye(2, dtype=torch.float64))
    loss = SDS(times=OnGrid((0.6,))).student_loss(nets, Batch(labels(8, 1), (8, 2)), given(*design(2, 2))).total
    assert gradients(loss, nets)[0].abs().max() < 1e-12


def test_no_gradient_passes_through_the_teacher(gaussian: GaussianTeacher) -> None:
    network = Denoiser(mlp(2, 8, 2), gaussian.schedule, "eps").double()
    nets = linear_nets(network, gaussian.mean, torch.eye(2, dtype=torch.float64))
    SDS(times=OnGrid((0.4,))).student_loss(nets, Batch({}, (8, 2)), given(*design(2, 2))).total.backward()
    assert nets.student.net.mean.grad is not None
    assert all(p.grad is None for p in network.parameters())


def test_training_takes_a_perfect_generator_to_a_point_at_the_mode(gaussian: GaussianTeacher) -> None:
    nets = linear_nets(gaussian, gaussian.mean + 0.5, torch.linalg.cholesky(gaussian.cov))
    nets.student.float()
    spec = AdamW(1e-2, (0.0, 0.999), decay="linear")
    run = Run(steps=400, batch=256, ema=0.98)
    optimizers = {"student": spec.build(nets.student.parameters())}
    trainer = Trainer(nets, SDS(), optimizers, lambda step: Batch({}, (256, 2)), run, specs={"student": spec})
    for index in range(run.steps):
        trainer.step(index)
    net = nets.ema.net
    assert (net.mean - gaussian.mean).abs().max() < 0.02  # it was 0.5
    assert torch.linalg.matrix_norm(net.factor, 2) < 0.04  # it was 1


def test_one_call_from_noise_does_not_train_four_steps() -> None:
    with pytest.raises(ValueError, match="OneStep trains the first of the sampler's 4 steps only"):
        SDS(rollout=OneStep()).check(Sampler(trailing(4), Ddim()))
