"""Diffusion-GAN: the best discriminator in closed form, the chain that follows it, and a run on a mixture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import DiffusionGAN
from stepdistill.parts.chain import NoiseChain
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import OneStep
from stepdistill.parts.times import OnGrid
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.schedule import DiscreteVP, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, MixtureTeacher, energy_distance
from stepdistill.trainer import AdamW, Run, Trainer

from .conftest import VectorDisc, drawn, pretrained, student_like

ONE_STEP = Sampler(trailing(1), Ddim())
CHAIN = NoiseChain(length=0.6, noise=1.0, clean=0.0)


def gaussian_1d(mean: float, std: float, schedule: Schedule) -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([mean]), torch.tensor([[std**2]]), schedule)


class Ratio(nn.Module):
    """The logit ``log p_t / q_t`` between two Gaussians, or another one: ``scale`` times that plus ``shift``."""

    def __init__(self, p: GaussianTeacher, q: GaussianTeacher, scale: float = 1.0, shift: float = 0.0):
        super().__init__()
        self.p, self.q, self.scale, self.shift = p, q, scale, shift
        self.times: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.times.append(t)
        return self.scale * (self.p.log_density(x_t, t) - self.q.log_density(x_t, t))[:, None] + self.shift


class Affine(nn.Module):
    """A generator ``mean + std z`` in the student's place."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), std


class Draw(OneStep):
    """Samples of ``Affine``."""

    def __call__(self, student: Affine, batch: Batch, step: Step) -> Tensor:
        return student.mean + student.std * step.randn(batch.shape)


def game(objective: DiffusionGAN, schedule: Schedule, n: int, **logit: float) -> tuple[Nets, Batch, Ratio]:
    p, q = gaussian_1d(0.5, 0.4, schedule), gaussian_1d(-0.2, 0.7, schedule)
    nets = Nets({"student": Affine(-0.2, 0.7), "teacher": p, "disc": Ratio(p, q, **logit)})
    for name, module in objective.extras(nets.student).items():
        nets[name] = module
    return nets, Batch({}, (n, 1), x0=p.sample(n, torch.Generator().manual_seed(1))), nets.disc


def quadrature(schedule: Schedule, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Times of the chain with their weights (T,), and noised densities p and q on a grid x of the line, (T, X)."""
    t = lengths * (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    weight = t / t.sum()  # priority: P(t) ~ t
    c = schedule(t)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)

    def density(mean: float, std: float) -> Tensor:
        spread = (c.alpha**2 * std**2 + c.sigma**2)[:, None]
        return (-0.5 * (x - c.alpha[:, None] * mean) ** 2 / spread).exp() / (2 * math.pi * spread).sqrt()

    return t, weight, x, density(0.5, 0.4), density(-0.2, 0.7)


@pytest.mark.parametrize("loss", ["softplus", "hinge"])
def test_at_the_log_density_ratio_the_discriminators_loss_is_the_quadratures(loss: str) -> None:
    """For softplus 2 ln 2 - 2 JSD, averaged over the chain: the least that any discriminator reaches."""
    schedule = DiscreteVP.linear()
    objective = DiffusionGAN(rollout=Draw(), gan=Gan(weight=1.0, loss=loss, times=CHAIN))
    nets, batch, _ = game(objective, schedule, 60_000)
    nets.chain.reach.fill_(1.0)
    value = objective.disc_loss(nets, batch, Step.at(0)).total
    _, weight, x, p, q = quadrature(schedule, torch.tensor(0.6, dtype=torch.float64))
    ratio, dx = (p / q).log(), float(x[1] - x[0])
    f = torch.nn.functional.softplus if loss == "softplus" else (lambda v: torch.relu(1 + v))
    expected = (weight * ((p * f(-ratio) + q * f(ratio)).sum(1) * dx)).sum()
    assert float(value) == pytest.approx(float(expected), abs=0.01)
    if loss == "softplus":
        jsd = 0.5 * ((p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum(1) * dx)
        assert_close(expected, 2 * math.log(2) - 2 * (weight * jsd).sum())
        for other in ({"scale": 0.7}, {"scale": 1.4}, {"shift": 0.3}, {"shift": -0.3}):
            nets, batch, _ = game(objective, schedule, 60_000, **other)
            nets.chain.reach.fill_(1.0)
            assert float(objective.disc_loss(nets, batch, Step.at(0)).total) > float(value)


@pytest.mark.parametrize("schedule", [DiscreteVP.linear(), RectifiedFlow()], ids=["vp", "flow"])
def test_the_students_gradient_is_that_of_a_quadrature(schedule: Schedule) -> None:
    """d/dmean of E_t E_x softplus(-l(alpha (mean + std z) + sigma eps)), with the noise between the two integrated."""
    objective = DiffusionGAN(rollout=Draw(), gan=Gan(weight=2.0, times=NoiseChain(length=0.6, noise=1.0, clean=0.0)))
    nets, batch, disc = game(objective, schedule, 150_000)
    nets.chain.reach.fill_(1.0)
    (grad,) = torch.autograd.grad(objective.student_loss(nets, batch, Step.at(2)).total, nets.student.mean)
    chain_t, weight, x, _, _ = quadrature(DiscreteVP.linear(), torch.tensor(0.6, dtype=torch.float64))
    t = schedule.t_from_logsnr(DiscreteVP.linear().logsnr(chain_t))
    c = schedule(t)
    mean = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    spread = (c.alpha**2 * 0.7**2 + c.sigma**2)[:, None]
    density = (-0.5 * (x - c.alpha[:, None] * mean) ** 2 / spread).exp() / (2 * math.pi * spread).sqrt()
    logits = torch.stack([disc(x[:, None], u.expand(len(x)), {})[:, 0] for u in t])
    expected = (weight * ((density * torch.nn.functional.softplus(-logits)).sum(1) * (x[1] - x[0]))).sum()
    (by_hand,) = torch.autograd.grad(2.0 * expected, mean)
    assert float(grad) == pytest.approx(float(by_hand), rel=0.03)
    assert float(grad) < 0  # towards the data, whose mean is larger


def test_the_chain_grows_under_a_sure_discriminator_and_shrinks_under_an_unsure_one() -> None:
    objective = DiffusionGAN(rollout=Draw(), gan=Gan(weight=1.0, times=CHAIN), every=2, ramp=64, shortest=0.1)
    nets, batch, disc = game(objective, DiscreteVP.linear(), 16, shift=50.0)  # everything is real: r_d = 1
    lengths = []
    for index in range(6):
        logs = objective.disc_loss(nets, batch, Step.at(index)).logs()
        lengths.append(objective.length(nets))
        assert float(logs["r_d"]) == 1.0 and float(logs["reach"]) == pytest.approx((lengths[-1] - 0.1) / 0.5)
    assert lengths == pytest.approx([0.1, 0.35, 0.35, 0.6, 0.6, 0.6])  # by 16 * 2 / 64 of .5, and no further
    assert float(disc.times[0].max()) <= 0.1 < float(torch.cat(disc.times[-3:]).max()) <= 0.6
    disc.shift = -50.0
    for index in range(6, 12):
        objective.disc_loss(nets, batch, Step.at(index))
        lengths.append(objective.length(nets))
    assert lengths[6:] == pytest.approx([0.6, 0.35, 0.35, 0.1, 0.1, 0.1])


def test_the_students_turn_looks_through_the_chain_and_leaves_it_alone() -> None:
    objective = DiffusionGAN(rollout=Draw(), gan=Gan(weight=1.0, times=CHAIN), shortest=0.05, every=1, ramp=1)
    nets, batch, disc = game(objective, DiscreteVP.linear(), 500, shift=50.0)
    objective.student_loss(nets, batch, Step.at(0))
    assert objective.length(nets) == 0.05 and 0.03 < float(disc.times[0].max()) <= 0.05
    objective.disc_loss(nets, batch, Step.at(0))
    objective.student_loss(nets, batch, Step.at(1))
    assert objective.length(nets) == 0.6 and 0.5 < float(disc.times[-1].max()) <= 0.6


def test_real_and_generated_samples_share_their_noise_level_and_the_students_samples_are_made_once() -> None:
    objective = DiffusionGAN(rollout=Draw(), gan=Gan(weight=1.0, times=CHAIN))
    nets, batch, disc = game(objective, DiscreteVP.linear(), 32)
    step = Step.at(0)
    objective.student_loss(nets, batch, step)
    fake = step.shared["student_x0"]
    loss = objective.disc_loss(nets, batch, step)
    assert step.shared["student_x0"] is fake and not loss.total.requires_grad
    assert_close(disc.times[-1][:32], disc.times[-1][32:], rtol=0, atol=0)


def test_the_chain_is_state_of_the_run_and_nobody_trains_it() -> None:
    objective = DiffusionGAN()
    (chain,) = objective.extras(None).values()
    assert list(chain.parameters()) == [] and len(chain.state_dict()) == 3
    assert (chain.target, chain.every, chain.ramp) == (0.6, 4, 100_000)
    assert {name for turn in objective.turns() for name in turn.moves} == {"student", "disc"}


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (
            {"gan": Gan(weight=1.0, times=OnGrid((0.5,)))},
            r"objective.gan.times must be a NoiseChain, whose length adapts",
        ),
        ({"gan": Gan(loss="relativistic", times=NoiseChain())}, r"'relativistic' has no zero for r_d to count from"),
        ({"shortest": 0.0}, r"objective.shortest must lie in \(0, 1\], the chain's length; got 0.0"),
        ({"gan": Gan(times=NoiseChain(length=0.2)), "shortest": 0.3}, r"objective.shortest must lie in \(0, 0.2\]"),
        ({"target": 1.0}, r"objective needs target in \(-1, 1\), every and ramp of at least 1; got 1.0, 4 and 100000"),
        ({"every": 0}, r"every and ramp of at least 1"),
        ({"ramp": 0}, r"every and ramp of at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(bad: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        DiffusionGAN(**bad)


def test_a_student_of_several_steps_is_not_trained_at_its_first_alone() -> None:
    with pytest.raises(ValueError, match="OneStep trains the first of the sampler's 2 steps only"):
        DiffusionGAN(rollout=OneStep()).check(Sampler(trailing(2)))


def test_training_moves_the_student_onto_the_mixture(ring: MixtureTeacher) -> None:
    """From the pretrained network's one-step samples; over three seeds .025 to .035 of .71."""
    optim = {"student": AdamW(5e-4, (0.0, 0.99), decay="linear"), "disc": AdamW(2e-3, (0.0, 0.99), decay="linear")}
    gan = Gan(weight=1.0, times=NoiseChain(noise=1.0, length=0.5))
    objective = DiffusionGAN(rollout=OneStep(), gan=gan, shortest=0.2, target=0.2, ramp=20_000)
    start = pretrained(ring, 300)
    before = Student(ONE_STEP, start.net, start.schedule, start.kind)
    reference = ring.sample(4000, torch.Generator().manual_seed(3))
    assert energy_distance(drawn(before, 4000), reference) > 0.6

    torch.manual_seed(0)
    nets = Nets({"teacher": ring, "student": student_like(start, ONE_STEP), "disc": VectorDisc(2)})
    nets["chain"] = objective.extras(nets.student)["chain"]

    def real(step: Step) -> Batch:
        return Batch({}, (256, 2), x0=ring.sample(256, step.rng))

    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in optim.items()}
    run = Run(steps=400, batch=256, ema=0.98, clip=10.0)
    trainer = Trainer(nets, objective, optimizers, real, run, specs=optim)
    for index in range(run.steps):
        trainer.step(index)
    assert energy_distance(drawn(trainer.nets.ema, 4000), reference) < 0.07
    assert float(nets.chain.reach) > 0.5  # the discriminator was sure of itself, and the chain grew
