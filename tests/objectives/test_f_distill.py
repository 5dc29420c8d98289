"""f-distill: its weights against derivatives of f and of integrals, its ratio, and a student trained by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn

from stepdistill.functional.divergence import dmd_gap
from stepdistill.functional.f_divergence import f_weight
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import DMD2, FDistill
from stepdistill.objectives.score.f_distill import RatioMeans
from stepdistill.parts.game import Judged
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import OneStep
from stepdistill.parts.times import OnGrid, Uniform
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.schedule import DiscreteVP, RectifiedFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, MixtureTeacher, sliced_wasserstein
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained

ONE = Sampler(trailing(1), Ddim())
OPTIM = {
    "student": AdamW(1e-3, (0.0, 0.99), decay="linear"),
    "critic": AdamW(2e-3, (0.0, 0.99), decay="linear"),
    "disc": AdamW(1e-3, (0.0, 0.99)),
}
F: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "sh": lambda r: 2 * (1 - r.sqrt()) ** 2,
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "softened": lambda r: (1 + r) * ((1 + r) / r).log(),
}


@pytest.mark.parametrize("kind", F)
def test_the_weight_is_the_squared_ratio_times_the_curvature_of_f(kind: str) -> None:
    r = torch.tensor([0.05, 0.4, 1.0, 3.0, 17.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F[kind](r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(f_weight(r.detach(), kind), r.detach() ** 2 * curvature, rtol=1e-10, atol=1e-12)


def test_an_unknown_divergence_is_named() -> None:
    with pytest.raises(ValueError, match="got 'wasserstein'"):
        f_weight(torch.ones(2), "wasserstein")


class LogRatio(nn.Module):
    """The best discriminator there is; ``offset`` is its error, ``spread`` that of its patches about their mean."""

    def __init__(self, real: GaussianTeacher, fake: GaussianTeacher, spread: float = 0.0):
        super().__init__()
        self.real, self.fake, self.spread = real, fake, spread
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        logit = self.real.log_density(x_t, t) - self.fake.log_density(x_t, t) + self.offset
        return torch.stack([logit - self.spread, logit + self.spread], 1)


def on_a_line(mean: float, variance: float) -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([mean]), torch.tensor([[variance]], dtype=torch.float64), RectifiedFlow())


@pytest.mark.parametrize("kind", F)
def test_the_weighted_direction_is_the_gradient_of_the_f_divergence(kind: str) -> None:
    """``int q f(p / q)`` on a grid, differentiated by the student's mean and factor; and the mean over samples of
    h(r) times the direction of the reverse KL, with the ratio as a discriminator gives it."""
    time, c = 0.5, (0.5, 0.5)
    mu, sigma, m, scale = 0.3, 1.4, -0.2, 1.1
    mean, factor = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, scale))
    y = torch.linspace(-7, 7, 20001, dtype=torch.float64)
    q = torch.distributions.Normal(c[0] * mean, (c[0] ** 2 * factor**2 + c[1] ** 2).sqrt()).log_prob(y)
    p = torch.distributions.Normal(c[0] * mu, (c[0] ** 2 * sigma + c[1] ** 2) ** 0.5).log_prob(y)
    expected = torch.autograd.grad(torch.trapezoid(q.exp() * F[kind]((p - q).exp()), y), (mean, factor))

    nodes, weights = (torch.from_numpy(a) for a in hermegauss(80))
    pairs, weights = torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(1)
    z, eps, weights = pairs[:, :1], pairs[:, 1:], weights / weights.sum()
    x0 = mean + factor * z
    teacher, critic = on_a_line(mu, sigma), on_a_line(m, scale**2)
    t = torch.full((len(z),), time, dtype=torch.float64)
    x_t = teacher.schedule.add_noise(x0.detach(), eps, t)
    at = Judged(x_t, t, eps, teacher(x_t, t), critic(x_t, t))
    nets = Nets({"teacher": teacher, "disc": LogRatio(teacher, critic, spread=2.0)})
    objective = FDistill(divergence=kind, ratio_clip=(1e-9, 1e9), ratio_bins=0, normalise=False)
    with torch.no_grad():
        weight = objective.weight(nets, at, {})
    gap = dmd_gap(x0, at.teacher, at.critic, normalise=False) * weight[:, None]
    got = torch.autograd.grad((c[0] ** 2 / c[1] ** 2 * weights[:, None] * gap * x0).sum(), (mean, factor))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def game(spread: float = 0.0) -> Nets:
    """A student of two numbers, its exact critic, the teacher, and the best discriminator."""
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    teacher = GaussianTeacher(torch.tensor([0.4, -0.3]), cov, DiscreteVP.linear())
    made = GaussianTeacher(torch.zeros(2), torch.eye(2), DiscreteVP.linear())
    nets = Nets({"teacher": teacher, "critic": made, "disc": LogRatio(teacher, made, spread)})
    nets["student"] = Student(ONE, Shifted(), teacher.schedule, "x0").double()
    nets["ratio_means"] = RatioMeans(10)
    return nets


class Shifted(nn.Module):
    """Noise and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t + self.mean


class Doubled(Step):
    """Draws in float64."""

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.rng, dtype=torch.float64)


def test_reverse_kl_is_dmd2_under_every_adversarial_loss() -> None:
    for loss in ("softplus", "hinge", "relativistic"):
        base = DMD2(rollout=OneStep(), gan=Gan(weight=0.5, loss=loss, times=OnGrid((0.45,))), times=OnGrid((0.45,)))
        batch = Batch({}, (8, 2), x0=torch.randn(8, 2, dtype=torch.float64))
        terms = [
            objective.student_loss(game(spread=3.0), batch, Doubled.at(3)).terms
            for objective in (base, FDistill(base=base, divergence="rkl"))
        ]
        torch.testing.assert_close(terms[0], terms[1])


def test_the_students_gradient_is_the_weighted_one_and_nothing_flows_through_the_weight() -> None:
    """Sample by sample: exp of the mean logit, clipped, over the running mean of its range of noise levels (here one
    range and a first visit, so halfway from 1 to the mean), h = r / (1 + r) over its mean."""
    nets, base = (
        game(spread=3.0),
        DMD2(rollout=OneStep(), gan=Gan(weight=1e-9, times=OnGrid((0.45,))), times=OnGrid((0.45,))),
    )
    objective = FDistill(base=base, ratio_clip=(0.8, 1.15))
    objective.student_loss(nets, Batch({}, (16, 2)), Doubled.at(3)).total.backward()

    step = Doubled.at(3)
    x0 = step.randn((16, 2))
    step.integers(1, 16)
    t = torch.full((16,), 0.45, dtype=torch.float64)
    x_t = nets.teacher.schedule.add_noise(x0, step.randn((16, 2)), t)
    p, q = nets.teacher(x_t, t), nets.critic(x_t, t)
    ratio = (nets.teacher.log_density(x_t, t) - nets.critic.log_density(x_t, t)).exp()
    assert bool((ratio < 0.8).any() and (ratio > 1.15).any())
    ratio = torch.tensor([min(max(float(r), 0.8), 1.15) for r in ratio], dtype=torch.float64)
    ratio = ratio / (0.5 + 0.5 * ratio.mean())
    h = ratio / (1 + ratio)
    expected = torch.zeros(2, dtype=torch.float64)
    for i in range(16):
        expected += h[i] / h.mean() * (q[i] - p[i]) / (x0[i] - p[i]).abs().mean() / 32
    torch.testing.assert_close(nets.student.net.mean.grad, expected, rtol=1e-5, atol=1e-7)
    assert nets.disc.offset.grad is not None and float(nets.disc.offset.grad.abs()) < 1e-8  # the GAN's alone


def test_reverse_kl_is_dmd2_bit_for_bit(gaussian: GaussianTeacher) -> None:
    base = DMD2(student_every=2, gan=Gan(weight=0.03))
    start = pretrained(gaussian, 1)
    one, other = (
        distilled(objective, gaussian, start, ONE, OPTIM, 5, batch=32)
        for objective in (base, FDistill(base=base, divergence="rkl"))
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert not torch.equal(one.net.leave.bias, start.net.leave.bias)


def test_running_means_follow_a_naive_loop() -> None:
    means, expected = RatioMeans(4), [1.0] * 4
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        ratio, share = torch.rand(9, generator=rng) * 5, torch.rand(9, generator=rng) * 0.7
        share[0] = 0.0
        got = means(ratio, share, 0.8)
        for b in range(4):
            inside = [float(r) for r, s in zip(ratio, share, strict=True) if b / 4 <= float(s) < (b + 1) / 4]
            if inside:
                expected[b] = 0.8 * expected[b] + 0.2 * sum(inside) / len(inside)
        torch.testing.assert_close(got, torch.tensor([expected[int(float(s) * 4)] for s in share]))
    torch.testing.assert_close(means.means, torch.tensor(expected))
    assert means.means[3] == 1.0  # no time fell there
    assert float(means(torch.tensor([2.0]), torch.tensor([1.0]), 0.0)) == 2.0  # t_max belongs to the last


def test_a_discriminator_that_is_wrong_by_a_constant_is_put_right() -> None:
    objective = FDistill(ratio_clip=(1e-9, 1e9), ratio_decay=0.0, normalise=False)
    weights = []
    for offset in (0.0, 1.5):
        nets = game()
        nets.disc.offset.data.fill_(offset)
        x_t, t = (
            torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double(),
            torch.full((64,), 0.5).double(),
        )
        with torch.no_grad():
            weights.append(objective.weight(nets, Judged(x_t, t, x_t, x_t, x_t), {}))
    torch.testing.assert_close(*weights)


def test_the_means_are_state_of_the_run_and_kept_only_where_used() -> None:
    student = Student(ONE, Shifted(), DiscreteVP.linear(), "x0")
    assert "ratio_means.means" in Nets(FDistill().extras(student)).trainable_state()
    assert FDistill(ratio_bins=0).extras(student) == FDistill(divergence="rkl").extras(student) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": DMD2(gan=Gan(weight=0.0))}, "base.gan needs a weight above 0"),
        ({"base": DMD2(gan=Gan(loss="hinge"))}, "loss 'softplus'; got 0.01 and 'hinge'"),
        ({"ratio_clip": (2.0, 1.0)}, "ratio_clip must be two rising ratios"),
        ({"ratio_decay": 1.0}, "ratio_decay in"),
    ],
)
def test_settings_without_a_ratio_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FDistill(**fields)


def test_without_a_gan_only_the_reverse_kl_is_left_and_needs_no_data() -> None:
    free = FDistill(base=DMD2(gan=Gan(weight=0.0)), divergence="rkl")
    assert free.data == frozenset() and FDistill().data == {"x0"}
    with pytest.raises(ValueError, match="OneStep trains the first"):
        FDistill(base=replace(FDistill().base, rollout=OneStep())).check(Sampler(trailing(4)))
    with pytest.raises(ValueError, match="the discriminator must look there"):
        FDistill(base=DMD2())


def test_weighted_by_a_learned_ratio_the_student_reaches_the_ring(ring: MixtureTeacher) -> None:
    """0.089 to 0.094 over three seeds, from 0.67 at the start."""
    base = DMD2(gan=Gan(weight=0.03, times=Uniform(0.02, 0.98)), student_every=2)
    objective = FDistill(base=base, ratio_bins=0)
    student = distilled(objective, ring, pretrained(ring, 600), ONE, OPTIM, 400, batch=128)
    reference = ring.sample(10_000, torch.Generator().manual_seed(3))
    assert sliced_wasserstein(drawn(student), reference, generator=torch.Generator().manual_seed(1)) < 0.18
