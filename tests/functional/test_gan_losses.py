"""Adversarial losses: their values at chance, their gradients, and the logit that is optimal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.functional.gan import disc_accuracy, disc_loss, student_loss

KINDS = ["softplus", "hinge", "hinge_both", "lsgan", "relativistic"]


def test_losses_at_chance_are_two_log_two_and_two() -> None:
    zero = torch.zeros(5, 3, dtype=torch.float64)
    assert_close(float(disc_loss(zero, zero, "softplus")), 2 * math.log(2))
    assert_close(float(disc_loss(zero, zero, "hinge")), 2.0)
    assert_close(float(student_loss(zero, "softplus")), math.log(2))
    assert_close(float(student_loss(zero, "hinge")), 0.0)
    assert_close(float(disc_loss(zero, zero, "lsgan")), 1.0)
    assert_close(float(student_loss(zero, "lsgan")), 0.5)
    assert_close(float(disc_loss(zero + 3, zero + 3, "relativistic")), math.log(2))  # wherever zero lies
    assert_close(float(student_loss(zero + 3, "relativistic", zero + 3)), math.log(2))


def test_losses_follow_their_formulas() -> None:
    real, fake = [0.3, -1.2, 2.5], [0.4, -2.0]
    r, f = torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64)
    softplus = sum(math.log1p(math.exp(-v)) for v in real) / 3 + sum(math.log1p(math.exp(v)) for v in fake) / 2
    hinge = sum(max(0.0, 1 - v) for v in real) / 3 + sum(max(0.0, 1 + v) for v in fake) / 2
    assert_close(float(disc_loss(r, f)), softplus)
    assert_close(float(disc_loss(r, f, "hinge")), hinge)
    assert_close(float(student_loss(f)), sum(math.log1p(math.exp(-v)) for v in fake) / 2)
    assert_close(float(student_loss(f, "hinge")), -sum(fake) / 2)
    assert_close(float(disc_loss(r, f, "hinge_both")), hinge)
    assert_close(float(student_loss(r, "hinge_both")), sum(max(0.0, 1 - v) for v in real) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_players_pull_logits_in_opposite_directions(kind: str) -> None:
    real, fake = (torch.randn(7, dtype=torch.float64).clamp(-0.9, 0.9).requires_grad_() for _ in range(2))
    by_real, by_fake = torch.autograd.grad(disc_loss(real, fake, kind), (real, fake))
    (by_student,) = torch.autograd.grad(student_loss(fake, kind, real.detach()), fake)
    assert bool((by_real < 0).all() and (by_fake > 0).all() and (by_student < 0).all())
    assert torch.autograd.gradcheck(lambda r, f: disc_loss(r, f, kind), (real, fake))
    assert torch.autograd.gradcheck(lambda f: student_loss(f, kind, real.detach()), fake)
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


def test_the_relativistic_losses_compare_pair_by_pair() -> None:
    real, fake = [0.3, -1.2, 2.5], [0.4, -2.0, 2.5]
    r, f = torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64)
    by_disc = sum(math.log1p(math.exp(b - a)) for a, b in zip(real, fake, strict=True)) / 3
    by_student = sum(math.log1p(math.exp(a - b)) for a, b in zip(real, fake, strict=True)) / 3
    assert_close(float(disc_loss(r, f, "relativistic")), by_disc)
    assert_close(float(student_loss(f, "relativistic", r)), by_student)
    assert_close(float(disc_loss(r + 7, f + 7, "relativistic")), by_disc)  # only differences count
    assert_close(float(disc_accuracy(r, f, "relativistic")), 1 / 3)  # one pair is right, one wrong, one a tie
    assert_close(float(disc_accuracy(r - 9, f - 9, "relativistic")), 1 / 3)
    with pytest.raises(ValueError, match=r"pairs logits of one shape; got \(3,\) and \(2,\)"):
        disc_loss(r, f[:2], "relativistic")
    with pytest.raises(ValueError, match="compares with logits of real samples; none were given"):
        student_loss(f, "relativistic")


def test_least_squares_aim_at_one_and_minus_one() -> None:
    real, fake = [0.3, -1.2, 2.5], [0.4, -2.0]
    r, f = torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64)
    by_hand = 0.5 * sum((v - 1) ** 2 for v in real) / 3 + 0.5 * sum((v + 1) ** 2 for v in fake) / 2
    assert_close(float(disc_loss(r, f, "lsgan")), by_hand)
    assert_close(float(student_loss(f, "lsgan")), 0.5 * sum((v - 1) ** 2 for v in fake) / 2)


P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "best"),
    [
        ("softplus", (P / Q).log()),
        ("relativistic", (P / Q).log()),
        ("lsgan", (P - Q) / (P + Q)),
        ("hinge", (P - Q).sign()),
        ("hinge_both", (P - Q).sign()),
    ],
)
def test_the_best_logits_between_two_laws_are_those_of_the_docstring(kind: str, best: Tensor) -> None:
    """Three points of probability P as real and Q as generated samples: the expected loss is a finite sum."""
    if kind == "relativistic":

        def expected(logits: Tensor) -> Tensor:
            return sum(P[i] * Q[j] * disc_loss(logits[i], logits[j], kind) for i in range(3) for j in range(3))
    else:
        far = 1.0 if kind == "lsgan" else 1e9  # where the other half of the loss is nothing

        def expected(logits: Tensor) -> Tensor:
            right, wrong = torch.tensor(far), torch.tensor(-far)
            return sum(
                P[i] * disc_loss(logits[i], wrong, kind) + Q[i] * disc_loss(right, logits[i], kind) for i in range(3)
            )

    least = float(expected(best))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(20):
            moved = best + size * torch.randn(3, generator=generator, dtype=torch.float64)
            assert float(expected(moved)) >= least - 1e-12
    assert float(expected(best + torch.tensor([0.1, 0.0, 0.0]))) > least + 1e-4 or "hinge" in kind
    shifted = float(expected(best + 2))
    assert (abs(shifted - least) < 1e-12) is (kind == "relativistic")


def test_losses_stay_finite_at_large_logits() -> None:
    huge = torch.tensor([-1e4, 1e4])
    for kind in KINDS:
        assert bool(
            disc_loss(huge, huge.flip(0), kind).isfinite() and student_loss(huge, kind, huge.flip(0)).isfinite()
        )


def test_accuracy_is_balanced_over_real_and_fake() -> None:
    assert float(disc_accuracy(torch.ones(3), -torch.ones(5))) == 1.0
    assert float(disc_accuracy(-torch.ones(3), torch.ones(5))) == 0.0
    assert float(disc_accuracy(torch.ones(3), torch.ones(9))) == 0.5  # calls everything real
    assert_close(float(disc_accuracy(torch.tensor([1.0, -1, 1, 1]), torch.tensor([-1.0, 1]))), 0.5 * (0.75 + 0.5))
    assert not disc_accuracy(torch.ones(2, requires_grad=True), torch.ones(2)).requires_grad


def test_an_unknown_loss_is_named() -> None:
    for call in (lambda k: disc_loss(torch.ones(1), torch.ones(1), k), lambda k: student_loss(torch.ones(1), k)):
        with pytest.raises(
            ValueError, match="'softplus', 'hinge', 'hinge_both', 'lsgan' or 'relativistic'; got 'wgan'"
        ):
            call("wgan")
