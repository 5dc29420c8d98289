"""Adversarial losses: their values at chance, their gradients, and the logit that is optimal."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from stepdistill.functional.gan import disc_accuracy, disc_loss, student_loss

KINDS = ["softplus", "hinge"]


def test_losses_at_chance_are_two_log_two_and_two() -> None:
    zero = torch.zeros(5, 3, dtype=torch.float64)
    assert_close(float(disc_loss(zero, zero, "softplus")), 2 * math.log(2))
    assert_close(float(disc_loss(zero, zero, "hinge")), 2.0)
    assert_close(float(student_loss(zero, "softplus")), math.log(2))
    assert_close(float(student_loss(zero, "hinge")), 0.0)


def test_losses_follow_their_formulas() -> None:
    real, fake = [0.3, -1.2, 2.5], [0.4, -2.0]
    r, f = torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64)
    softplus = sum(math.log1p(math.exp(-v)) for v in real) / 3 + sum(math.log1p(math.exp(v)) for v in fake) / 2
    hinge = sum(max(0.0, 1 - v) for v in real) / 3 + sum(max(0.0, 1 + v) for v in fake) / 2
    assert_close(float(disc_loss(r, f)), softplus)
    assert_close(float(disc_loss(r, f, "hinge")), hinge)
    assert_close(float(student_loss(f)), sum(math.log1p(math.exp(-v)) for v in fake) / 2)
    assert_close(float(student_loss(f, "hinge")), -sum(fake) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_players_pull_logits_in_opposite_directions(kind: str) -> None:
    real, fake = (torch.randn(7, dtype=torch.float64).clamp(-0.9, 0.9).requires_grad_() for _ in range(2))
    by_real, by_fake = torch.autograd.grad(disc_loss(real, fake, kind), (real, fake))
    (by_student,) = torch.autograd.grad(student_loss(fake, kind), fake)
    assert bool((by_real < 0).all() and (by_fake > 0).all() and (by_student < 0).all())
    assert torch.autograd.gradcheck(lambda r, f: disc_loss(r, f, kind), (real, fake))
    assert torch.autograd.gradcheck(lambda f: student_loss(f, kind), fake)
    if kind == "softplus":
        assert_close(by_real, (torch.sigmoid(real) - 1).detach() / 7)
        assert_close(by_fake, torch.sigmoid(fake).detach() / 7)
        assert_close(by_student, -torch.sigmoid(-fake).detach() / 7)  # does not vanish for a losing student


def test_hinge_ignores_what_is_classified_with_margin() -> None:
    real, fake = (torch.tensor([2.0 * s], requires_grad=True) for s in (1, -1))
    by_real, by_fake = torch.autograd.grad(disc_loss(real, fake, "hinge"), (real, fake))
    assert (float(by_real), float(by_fake)) == (0.0, 0.0)


def test_the_optimal_softplus_logit_is_the_log_density_ratio() -> None:
    p, q = 0.7, 0.2  # densities of real and fake at a point: p softplus(-l) + q softplus(l)
    logit = torch.tensor(math.log(p / q), dtype=torch.float64, requires_grad=True)
    loss = p * disc_loss(logit, torch.tensor(-1e9)) + q * disc_loss(torch.tensor(1e9), logit)
    (grad,) = torch.autograd.grad(loss, logit)
    assert_close(float(grad), 0.0, rtol=0, atol=1e-12)


def test_losses_stay_finite_at_large_logits() -> None:
    huge = torch.tensor([-1e4, 1e4])
    for kind in KINDS:
        assert bool(disc_loss(huge, huge, kind).isfinite() and student_loss(huge, kind).isfinite())


def test_accuracy_is_balanced_over_real_and_fake() -> None:
    assert float(disc_accuracy(torch.ones(3), -torch.ones(5))) == 1.0
    assert float(disc_accuracy(-torch.ones(3), torch.ones(5))) == 0.0
    assert float(disc_accuracy(torch.ones(3), torch.ones(9))) == 0.5  # calls everything real
    assert_close(float(disc_accuracy(torch.tensor([1.0, -1, 1, 1]), torch.tensor([-1.0, 1]))), 0.5 * (0.75 + 0.5))
    assert not disc_accuracy(torch.ones(2, requires_grad=True), torch.ones(2)).requires_grad


def test_an_unknown_loss_is_named() -> None:
    for call in (lambda k: disc_loss(torch.ones(1), torch.ones(1), k), lambda k: student_loss(torch.ones(1), k)):
        with pytest.raises(ValueError, match="'softplus' or 'hinge'; got 'wgan'"):
            call("wgan")
