"""The DMD direction against the closed-form KL gradient of Gaussians; ``pull`` against autograd's arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.functional.divergence import dmd_gap, mean_but_batch, pull
from stepdistill.schedule import EDM, RectifiedFlow, Schedule, TrigFlow
from stepdistill.testing import GaussianTeacher

# Teacher N(mu, Sigma), student m + L z: the golden table's setting.
MU, SIGMA, M, L = 0.3, 1.4, -0.2, 1.1
GOLDEN = {  # schedule, t, E[D_q - D_p], E[(D_q - D_p) z], dKL/dm, dKL/dS
    "flow": (RectifiedFlow(), 0.5, -0.208333, -0.039404, -0.208333, -0.017911),
    "vp": (
        TrigFlow(),
        torch.tensor(0.6, dtype=torch.float64).asin().item(),
        -0.143312,
        -0.033797,
        -0.254777,
        -0.027310,
    ),
    "edm": (EDM(), 2.0, -0.370370, -0.029715, -0.092593, -0.003377),
}


def line(mean: float, variance: float, schedule: Schedule) -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([mean]), torch.tensor([[variance]], dtype=torch.float64), schedule)


def gap_at(z: float, eps: float, schedule: Schedule, t: float, normalise: bool = False) -> Tensor:
    """The direction at one noise pair, with both networks exact."""
    x0 = torch.tensor([[M + L * z]], dtype=torch.float64)
    times = torch.tensor([t], dtype=torch.float64)
    x_t = schedule.add_noise(x0, torch.full_like(x0, eps), times)
    teacher, critic = (line(mean, var, schedule)(x_t, times) for mean, var in ((MU, SIGMA), (M, L * L)))
    return dmd_gap(x0, teacher, critic, normalise=normalise)[0, 0]


@pytest.mark.parametrize("path", GOLDEN)
def test_the_mean_direction_is_the_golden_one(path: str) -> None:
    """The direction is affine in (z, eps), so its moments are differences of three values, without sampling."""
    schedule, t, mean, slope, dm, ds = GOLDEN[path]
    first, second = gap_at(0, 0, schedule, t), (gap_at(1, 0, schedule, t) - gap_at(-1, 0, schedule, t)) / 2
    assert_close(float(first), mean, rtol=0, atol=5e-7)
    assert_close(float(second), slope, rtol=0, atol=5e-7)
    # alpha^2 / sigma^2 turns it into the gradient of KL(student || teacher): by m, and by L = sqrt(S)
    c = schedule(torch.tensor([t], dtype=torch.float64))
    weight = float(c.alpha**2 / c.sigma**2)
    assert_close(weight * float(first), dm, rtol=0, atol=2e-6)
    assert_close(weight * float(second), 2 * L * ds, rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", GOLDEN)
def test_the_mean_direction_is_the_gradient_of_the_noised_kl(path: str) -> None:
    """Autodiff of the closed KL with respect to the student's mean and scale."""
    schedule, t, *_ = GOLDEN[path]
    c = schedule(torch.tensor(t, dtype=torch.float64))
    m, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (M, L))
    q = torch.distributions.Normal(c.alpha * m, (c.alpha**2 * scale**2 + c.sigma**2).sqrt())
    p = torch.distributions.Normal(c.alpha * MU, (c.alpha**2 * SIGMA + c.sigma**2).sqrt())
    by_m, by_scale = torch.autograd.grad(torch.distributions.kl_divergence(q, p), (m, scale))
    weight = c.alpha**2 / c.sigma**2
    assert_close(weight * gap_at(0, 0, schedule, t), by_m, rtol=1e-7, atol=1e-7)
    slope = (gap_at(1, 0, schedule, t) - gap_at(-1, 0, schedule, t)) / 2
    assert_close(weight * slope, by_scale, rtol=1e-7, atol=1e-7)


def test_in_many_dimensions_the_direction_has_the_closed_moments(schedule: Schedule, interior: Tensor) -> None:
    """E[D_q - D_p] = A (m - mu) and E[(D_q - D_p) z^T] = (A - B) L with A, B = sigma^2 C^-1 of teacher and student."""
    mu, sigma = torch.tensor([1.0, -1.0]).double(), torch.tensor([[1.0, 0.5], [0.5, 2.0]]).double()
    m, factor = torch.tensor([-1.0, 2.0]).double(), torch.tensor([[0.5, 0.0], [0.3, 0.7]]).double()
    teacher, critic = GaussianTeacher(mu, sigma, schedule), GaussianTeacher(m, factor @ factor.T, schedule)
    z = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()  # the direction is affine in z; eps = 0
    x0 = m + z @ factor.T
    for time in interior:
        t = time.repeat(3)
        x_t = schedule.add_noise(x0, torch.zeros_like(x0), t)
        gap = dmd_gap(x0, teacher(x_t, t), critic(x_t, t), normalise=False)
        c, one = schedule(time), torch.eye(2, dtype=torch.float64)
        a, b = (
            c.sigma**2 * torch.linalg.inv(c.alpha**2 * cov + c.sigma**2 * one) for cov in (sigma, factor @ factor.T)
        )
        assert_close(gap[0], a @ (m - mu), rtol=1e-9, atol=1e-9)
        assert_close((gap[1:] - gap[0]).T, (a - b) @ factor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_perfect_student_gets_exactly_nothing_in_every_sample(normalise: bool) -> None:
    schedule = RectifiedFlow()
    teacher = line(MU, SIGMA, schedule)
    x0 = teacher.sample(50, dtype=torch.float64)
    t = torch.rand(50, dtype=torch.float64)
    x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
    gap = dmd_gap(x0, teacher(x_t, t), line(MU, SIGMA, schedule)(x_t, t), normalise=normalise)
    assert_close(gap, torch.zeros_like(gap), rtol=0, atol=0)
    # also where the teacher returns its input, so that the weight itself vanishes
    same = dmd_gap(x0, x0, x0, normalise=normalise)
    assert_close(same, torch.zeros_like(same), rtol=0, atol=0)


def test_the_weight_is_each_samples_own_mean_distance_to_the_teacher() -> None:
    x0, teacher_x0, critic_x0 = (torch.randn(4, 2, 3, 3) for _ in range(3))
    gap = dmd_gap(x0, teacher_x0, critic_x0)
    for i in range(4):
        total = sum(abs(float(a) - float(b)) for a, b in zip(x0[i].flatten(), teacher_x0[i].flatten(), strict=True))
        assert_close(gap[i], (critic_x0[i] - teacher_x0[i]) / (total / 18))
    assert_close(dmd_gap(x0, teacher_x0, critic_x0, normalise=False), critic_x0 - teacher_x0, rtol=0, atol=0)
    # scaling all three alike leaves the direction as it is
    assert_close(dmd_gap(7 * x0, 7 * teacher_x0, 7 * critic_x0), gap)


def test_no_gradient_flows_through_the_direction_or_its_weight() -> None:
    x0, teacher_x0, critic_x0 = (torch.randn(3, 2, requires_grad=True) for _ in range(3))
    assert not dmd_gap(x0, teacher_x0, critic_x0).requires_grad


def test_pull_injects_the_gradient_over_the_number_of_elements() -> None:
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    loss = pull(x, grad)
    (by_x,) = torch.autograd.grad(loss, x)
    assert_close(by_x, grad.detach() / 30, rtol=1e-12, atol=1e-14)
    assert_close(loss.detach(), 0.5 * grad.detach().square().mean(), rtol=1e-12, atol=1e-14)
    assert loss.shape == ()


def test_pull_passes_the_gradient_on_and_none_to_the_direction() -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    pull(scale * x, scale * grad).backward()
    assert grad.grad is None
    assert_close(scale.grad, (x * 1.5 * grad.detach()).sum() / 8)


def test_means_are_taken_over_all_but_the_batch() -> None:
    x = torch.arange(24.0).view(2, 3, 2, 2)
    assert_close(mean_but_batch(x), torch.tensor([5.5, 17.5]).view(2, 1, 1, 1))
    assert_close(mean_but_batch(x.view(2, 12)), torch.tensor([[5.5], [17.5]]))
