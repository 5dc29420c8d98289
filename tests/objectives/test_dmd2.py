"""DMD2 against the gradient of the KL divergence in closed form, and trained to the exact law."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.functional.divergence import dmd_gap
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import DMD2
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim
from stepdistill.parts.times import LogNormal, OnGrid, Uniform
from stepdistill.sampling import Ddim, Renoise, Sampler, trailing
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, MixtureTeacher, sliced_wasserstein
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained

ONE = Sampler(trailing(1), Ddim())
OPTIM = {"student": AdamW(5e-4, (0.0, 0.999), decay="linear"), "critic": AdamW(1e-3, (0.0, 0.999), decay="linear")}


class Linear(nn.Module):
    """``x0 = m + L z``: a generator whose law is known."""

    def __init__(self, mean: Tensor, factor: Tensor):
        super().__init__()
        self.mean, self.factor = nn.Parameter(mean.clone()), nn.Parameter(factor.clone())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mean + x_t @ self.factor.T


def nets_of(teacher: GaussianTeacher, mean: Tensor, factor: Tensor) -> Nets:
    """A linear generator, its exact critic, and the teacher."""
    nets = Nets()
    nets["teacher"] = teacher
    nets["student"] = Student(ONE, Linear(mean, factor), teacher.schedule, "x0").double()
    nets["critic"] = GaussianTeacher(mean, factor @ factor.T, teacher.schedule)
    return nets


class Doubled(Step):
    """Draws in float64, in antithetic pairs, so that moments of first order are exact."""

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        half = torch.randn((shape[0] // 2, *shape[1:]), generator=self.rng, dtype=torch.float64)
        return torch.cat([half, -half])


@pytest.mark.parametrize("time", [0.1, 0.4, 0.8])
def test_the_student_moves_along_the_gradient_of_the_kl(gaussian: GaussianTeacher, time: float) -> None:
    """Unnormalised, with the weight alpha^2 / sigma^2 restored, the expected gradient is that of KL(q_t || p_t) with
    respect to the generator's mean and factor, here by autograd through the closed form of the divergence."""
    mean = torch.tensor([-0.2, 0.5], dtype=torch.float64)
    factor = torch.tensor([[0.9, 0.1], [-0.3, 0.6]], dtype=torch.float64)
    nets = nets_of(gaussian, mean, factor)
    n = 400_000
    z, eps = Doubled.at(3).randn((n, 2)), torch.randn(n, 2, dtype=torch.float64)
    t = torch.full((n,), time, dtype=torch.float64)
    c = gaussian.schedule(t[:1])
    x0 = nets.student(z, torch.ones_like(t), {})
    x_t = gaussian.schedule.add_noise(x0.detach(), eps, t)
    gap = dmd_gap(x0, gaussian(x_t, t, {}), nets.critic(x_t, t, {}), normalise=False)
    (c.alpha**2 / c.sigma**2 * (gap * x0).sum() / n).backward()

    m, factor_ = mean.clone().requires_grad_(True), factor.clone().requires_grad_(True)
    eye = torch.eye(2, dtype=torch.float64)
    q = torch.distributions.MultivariateNormal(c.alpha * m, c.alpha**2 * factor_ @ factor_.T + c.sigma**2 * eye)
    p = torch.distributions.MultivariateNormal(c.alpha * gaussian.mean, c.alpha**2 * gaussian.cov + c.sigma**2 * eye)
    torch.distributions.kl_divergence(q, p).backward()
    scale = m.grad.norm() + factor_.grad.norm()
    torch.testing.assert_close(nets.student.net.mean.grad, m.grad, atol=0.01 * scale.item(), rtol=0)
    torch.testing.assert_close(nets.student.net.factor.grad, factor_.grad, atol=0.01 * scale.item(), rtol=0)


def test_a_perfect_student_with_a_perfect_critic_gets_no_gradient(gaussian: GaussianTeacher) -> None:
    nets = nets_of(gaussian, gaussian.mean, torch.linalg.cholesky(gaussian.cov))
    objective = DMD2(gan=Gan(weight=0.0))
    objective.student_loss(nets, Batch({}, (256, 2)), Doubled.at(0)).total.backward()
    # per sample, not only on average, so nothing can cancel
    assert nets.student.net.mean.grad.abs().max() < 1e-10
    assert nets.student.net.factor.grad.abs().max() < 1e-10


def test_the_loss_value_is_half_the_mean_square_of_the_normalised_gap(gaussian: GaussianTeacher) -> None:
    """Re-derived sample by sample from the exact posterior means at a fixed noise level."""
    mean, factor = torch.tensor([0.0, 0.9], dtype=torch.float64), 0.7 * torch.eye(2, dtype=torch.float64)
    nets = nets_of(gaussian, mean, factor)
    objective = DMD2(gan=Gan(weight=0.0), times=OnGrid((0.3,)))
    loss = objective.student_loss(nets, Batch({}, (16, 2)), Doubled.at(4)).total.item()

    step = Doubled.at(4)
    step.integers(1, 1)  # the rollout's stop
    x0 = mean + step.randn((16, 2)) @ factor.T
    step.integers(1, 16)  # the one time there is
    c = gaussian.schedule(torch.tensor([0.3], dtype=torch.float64))
    x_t = c.alpha * x0 + c.sigma * step.randn((16, 2))
    eye = torch.eye(2, dtype=torch.float64)
    expected = 0.0
    for x, y in zip(x0, x_t, strict=True):
        p = gaussian.mean + c.alpha * gaussian.cov @ torch.linalg.solve(
            c.alpha**2 * gaussian.cov + c.sigma**2 * eye, y - c.alpha * gaussian.mean
        )
        s = factor @ factor.T
        q = mean + c.alpha * s @ torch.linalg.solve(c.alpha**2 * s + c.sigma**2 * eye, y - c.alpha * mean)
        expected += 0.5 * ((q - p) / (x - p).abs().mean()).square().mean().item() / 16
    assert loss == pytest.approx(expected, rel=1e-9)


def test_without_a_gan_the_student_reaches_the_exact_law(gaussian: GaussianTeacher) -> None:
    objective = DMD2(gan=Gan(weight=0.0), student_every=2)
    student = distilled(objective, gaussian, pretrained(gaussian), ONE, OPTIM, 1400)
    got = drawn(student)
    assert (got.mean(0) - gaussian.mean).abs().max() < 0.05
    cov, exact = torch.cov(got.T), gaussian.cov.float()
    assert (cov - exact).norm() / exact.norm() < 0.08
    assert torch.linalg.eigvalsh(cov)[0] / 0.04 == pytest.approx(1, abs=0.35)


def test_backward_simulation_serves_four_steps(ring: MixtureTeacher) -> None:
    """Trained on its own states, the four-step student samples the mixture by the sampler it was trained with."""
    sampler = Sampler(trailing(4), Renoise())
    objective = DMD2(gan=Gan(weight=0.0), rollout=BackwardSim(), student_every=2)
    start = pretrained(ring, 1200)
    student = distilled(objective, ring, start, sampler, OPTIM, 800)
    reference = ring.sample(10_000, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(1)
    assert sliced_wasserstein(drawn(student), reference, generator=g) < 0.10


def modes_kept(samples: Tensor, ring: MixtureTeacher) -> int:
    """Modes that hold between half and twice their share."""
    nearest = torch.cdist(samples.double(), ring.means).argmin(1)
    share = torch.bincount(nearest, minlength=8) / len(samples) * 8
    return int(((share > 0.5) & (share < 2)).sum())


def test_with_a_gan_all_modes_are_kept_and_the_discriminator_enters(ring: MixtureTeacher) -> None:
    optim = OPTIM | {"disc": AdamW(1e-3, (0.0, 0.99))}
    objective = DMD2(gan=Gan(weight=0.03, times=LogNormal(-1.5, 1.0)), student_every=2)
    student = distilled(objective, ring, pretrained(ring, 1200), ONE, optim, 900)
    got = drawn(student)
    reference = ring.sample(10_000, torch.Generator().manual_seed(3))
    assert modes_kept(got, ring) == 8
    assert sliced_wasserstein(got, reference, generator=torch.Generator().manual_seed(1)) < 0.11


def test_the_adversarial_gradient_is_the_weighted_numeric_derivative(gaussian: GaussianTeacher) -> None:
    """dm + weight * adv, and nothing else, reaches the student: against finite differences of the two terms."""

    class Disc(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return (x_t.square().sum(1, keepdim=True) - t[:, None]).sin()

    nets = nets_of(gaussian, torch.tensor([0.3, 0.3]).double(), torch.eye(2).double() * 0.5)
    nets["disc"] = Disc()
    objective = DMD2(gan=Gan(weight=0.5, times=Uniform(0.05, 0.2)), times=OnGrid((0.3,)))

    def loss() -> dict[str, Tensor]:
        out = objective.student_loss(nets, Batch({}, (8, 2)), Doubled.at(1))
        return out.terms | {"total": out.total}

    terms = loss()
    torch.testing.assert_close(terms["total"], terms["dm"] + 0.5 * terms["adv"])
    (with_gan,) = torch.autograd.grad(loss()["total"], nets.student.net.mean)
    (without,) = torch.autograd.grad(loss()["dm"], nets.student.net.mean)
    numeric = torch.zeros(2, dtype=torch.float64)
    for i in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                nets.student.net.mean[i] += sign * 1e-5
                values.append(loss()["adv"].item())
                nets.student.net.mean[i] -= sign * 1e-5
        numeric[i] = 0.5 * (values[0] - values[1]) / 2e-5
    torch.testing.assert_close(with_gan - without, numeric, rtol=1e-5, atol=1e-8)


def test_the_discriminators_loss_is_weighed_beside_the_critics(gaussian: GaussianTeacher) -> None:
    class Disc(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return x_t.sum(1, keepdim=True)

    nets = nets_of(gaussian, torch.tensor([0.3, 0.3]).double(), torch.eye(2).double() * 0.5)
    nets["disc"] = Disc()
    batch = Batch({}, (8, 2), x0=torch.randn(8, 2, dtype=torch.float64))
    plain, faint = (DMD2(disc_weight=w).disc_loss(nets, batch, Doubled.at(1)) for w in (1.0, 0.01))
    torch.testing.assert_close(faint.total, 0.01 * plain.total)
    torch.testing.assert_close(faint.terms["disc"], plain.terms["disc"])  # logged as it is
    with pytest.raises(ValueError, match=r"objective.disc_weight must be above 0; got 0"):
        DMD2(disc_weight=0.0)


def test_a_data_free_run_needs_no_data_and_no_discriminator() -> None:
    free = DMD2(gan=Gan(weight=0.0))
    assert free.data == frozenset() and all("disc" not in turn.moves for turn in free.turns())
    assert DMD2().data == {"x0"} and any("disc" in turn.moves for turn in DMD2().turns())
