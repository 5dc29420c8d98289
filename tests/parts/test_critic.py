"""The critic's loss: its target in every kind, its floor at the exact teacher, and where its gradient goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.denoiser import Denoiser
from stepdistill.objective import Step
from stepdistill.parts.critic import denoising_loss
from stepdistill.parts.times import OnGrid, Uniform
from stepdistill.schedule import EDM, KINDS, DiscreteVP, Kind, RectifiedFlow, Schedule, TrigFlow
from stepdistill.testing import GaussianTeacher, mlp

PATHS = [RectifiedFlow(), EDM(3.0), TrigFlow(0.5), DiscreteVP.linear()]
NAMES = ["flow", "edm", "trig", "vp"]


class Exact(nn.Module):
    """An exact teacher as a network of one kind, with a shift to be wrong by."""

    def __init__(self, teacher: GaussianTeacher, kind: Kind):
        super().__init__()
        self.teacher, self.kind = teacher, kind
        self.shift = nn.Parameter(torch.zeros(teacher.dim, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.teacher(x_t, t, cond, want=self.kind) + self.shift


class Silent(nn.Module):
    """Predicts nothing and keeps what it was asked."""

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.x_t, self.t, self.cond = x_t, t, cond
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", PATHS, ids=NAMES)
@pytest.mark.parametrize("time", [0.0, 1e-6])
def test_close_to_the_data_the_target_keeps_its_digits(schedule: Schedule, kind: Kind, time: float) -> None:
    x0 = torch.randn(64, 3)
    times, draws = OnGrid((time,)), Step.at(4)
    loss = denoising_loss(Denoiser(Silent(), schedule, kind), x0, {}, times, draws)
    twin = Step.at(4)
    c = schedule.coeffs(times(schedule, 64, twin), x0.double())
    eps, x0 = twin.randn((64, 3)).double(), x0.double()
    rows = {"x0": (1.0, 0.0), "eps": (0.0, 1.0), "v": (-c.sigma, c.alpha), "velocity": (c.dalpha, c.dsigma)}
    p, q = rows[kind]
    assert_close(loss, (p * x0 + q * eps).square().mean().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", PATHS, ids=NAMES)
def test_the_target_is_the_drawn_pair_in_the_networks_kind(schedule: Schedule, kind: Kind) -> None:
    x0 = torch.randn(5, 3)
    net = Silent()
    loss = denoising_loss(Denoiser(net, schedule, kind), x0, {"k": torch.arange(5)}, Uniform(0.2, 0.9), Step.at(4))
    twin = Step.at(4)
    t = Uniform(0.2, 0.9)(schedule, 5, twin)
    eps, x0 = twin.randn((5, 3)).double(), x0.double()
    c = schedule.coeffs(t, x0)
    target = {
        "x0": x0,
        "eps": eps,
        "v": c.alpha * eps - c.sigma * x0,
        "velocity": c.dalpha * x0 + c.dsigma * eps,
    }[kind]
    assert_close(loss, target.square().mean().float(), rtol=1e-5, atol=1e-5)
    assert_close(net.x_t.double(), c.alpha * x0 + c.sigma * eps, rtol=1e-5, atol=1e-5)
    assert_close(net.t.double(), t, rtol=1e-6, atol=1e-6)
    assert list(net.cond) == ["k"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", PATHS, ids=NAMES)
def test_an_exact_denoiser_reaches_the_posterior_variance_and_no_gradient(schedule: Schedule, kind: Kind) -> None:
    """kind = p x0 + q eps has variance (p sigma - q alpha)^2 cov / V given x_t, with V = alpha^2 cov + sigma^2."""
    variances = torch.tensor([1.4, 0.2], dtype=torch.float64)
    teacher = GaussianTeacher(torch.tensor([0.3, -1.0]), variances.diag(), schedule)
    net = Denoiser(Exact(teacher, kind), schedule, kind)
    n, share = 60000, 0.6
    x0 = teacher.sample(n, torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = denoising_loss(net, x0, {}, OnGrid((share,)), Step.at(0))
    c = schedule(torch.tensor(share * schedule.t_max, dtype=torch.float64))
    p, q = {"x0": (1, 0), "eps": (0, 1), "v": (-c.sigma, c.alpha), "velocity": (c.dalpha, c.dsigma)}[kind]
    floor = ((p * c.sigma - q * c.alpha) ** 2 * variances / (c.alpha**2 * variances + c.sigma**2)).mean()
    assert_close(loss.detach(), floor, rtol=0.02, atol=0)
    loss.backward()  # the mean of 60000 residuals of variance about floor, doubled and halved over two coordinates
    assert float(net.net.shift.grad.abs().max()) < 5 * float(floor) ** 0.5 / n**0.5
    with torch.no_grad():
        net.net.shift.fill_(0.3)
    worse = denoising_loss(net, x0, {}, OnGrid((share,)), Step.at(0))
    assert_close((worse - loss).detach(), torch.tensor(0.09, dtype=torch.float64), rtol=0.05, atol=0.02 * float(floor))


def test_samples_get_no_gradient_and_the_critic_does() -> None:
    x0 = torch.randn(6, 2, requires_grad=True)
    critic = Denoiser(mlp(2, 8, 2), RectifiedFlow(), "velocity")
    denoising_loss(critic, x0, {}, Uniform(), Step.at(0)).backward()
    assert x0.grad is None
    assert all(p.grad is not None for p in critic.parameters())


def test_the_loss_repeats_with_its_step_and_is_a_scalar() -> None:
    x0 = torch.randn(6, 2)
    critic = Denoiser(mlp(2, 8, 2), RectifiedFlow(), "velocity")
    first, again, other = (denoising_loss(critic, x0, {}, Uniform(), Step.at(i, 2)).detach() for i in (0, 0, 1))
    assert first.shape == ()
    assert_close(first, again, rtol=0, atol=0)
    assert float(first) != float(other)


def test_a_fitted_critic_recovers_the_closed_form_line() -> None:
    """Least squares over x0 = a x_t + b at one noise level, against slope alpha cov / V and the matching intercept."""
    schedule = RectifiedFlow()
    teacher = GaussianTeacher(torch.tensor([0.7]), torch.tensor([[0.36]], dtype=torch.float64), schedule)

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.a * x_t + self.b

    critic = Denoiser(Line(), schedule, "x0")
    x0 = teacher.sample(100000, torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = denoising_loss(critic, x0, {}, OnGrid((0.4,)), Step.at(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    v = 0.6**2 * 0.36 + 0.4**2
    assert_close(float(critic.net.a.detach()), 0.6 * 0.36 / v, rtol=0.01, atol=0)
    assert_close(float(critic.net.b.detach()), 0.7 - 0.6 * 0.36 / v * 0.6 * 0.7, rtol=0.02, atol=0)
