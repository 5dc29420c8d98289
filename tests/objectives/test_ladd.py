"""LADD: its losses by hand, where gradients go, and a run on a mixture."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.nets import Nets
from stepdistill.models.taps import Tap
from stepdistill.objective import Batch, Step
from stepdistill.objectives import LADD
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import OneStep
from stepdistill.parts.times import LogNormal
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.schedule import DiscreteVP
from stepdistill.student import Student
from stepdistill.testing import MixtureTeacher, energy_distance, exact_student
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained


class Quadratic(nn.Module):
    """Logits that a hand can check."""

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return x_t.square().sum(1, keepdim=True) - 1


def test_both_hinge_losses_equal_a_loop_over_samples(ring: MixtureTeacher) -> None:
    student = exact_student(ring_1d(ring), Sampler(trailing(1), Ddim()))
    nets = Nets({"student": student, "teacher": ring_1d(ring), "disc": Quadratic()})
    objective = LADD(rollout=OneStep())
    batch = Batch({}, (16, 1), x0=torch.linspace(-1, 1, 16)[:, None])
    step = Step.at(0, 1)
    student_total = objective.student_loss(nets, batch, step).total.item()
    fake = step.shared["student_x0"]
    disc_total = objective.disc_loss(nets, batch, step).total.item()

    schedule, replay = nets.teacher.schedule, Step.at(0, 1)
    replay.randn((16, 1))  # the rollout's noise
    t, eps = objective.gan.times(schedule, 16, replay), replay.randn((16, 1))
    logits = [float(a * x + s * e) ** 2 - 1 for a, s, x, e in noised(schedule, t, fake, eps)]
    assert student_total == pytest.approx(-sum(logits) / 16, rel=1e-5)

    t = objective.gan.times(schedule, 16, replay)
    eps = replay.randn((32, 1))
    real = [float(a * x + s * e) ** 2 - 1 for a, s, x, e in noised(schedule, t, batch.x0, eps[:16])]
    made = [float(a * x + s * e) ** 2 - 1 for a, s, x, e in noised(schedule, t, fake, eps[16:])]
    by_hand = sum(max(0.0, 1 - r) for r in real) / 16 + sum(max(0.0, 1 + f) for f in made) / 16
    assert disc_total == pytest.approx(by_hand, rel=1e-5)


def ring_1d(ring: MixtureTeacher) -> MixtureTeacher:
    return MixtureTeacher(
        torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.tensor([0.2, 0.2]), ring.schedule
    )


def noised(schedule: DiscreteVP, t: Tensor, x: Tensor, eps: Tensor) -> list[tuple[float, float, float, float]]:
    c = schedule(t)
    return list(zip(c.alpha.tolist(), c.sigma.tolist(), x[:, 0].tolist(), eps[:, 0].tolist(), strict=True))


def digits_like_nets() -> Nets:
    """A tiny UNet in all roles."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return net(x_t, t * 1000 - 1, return_dict=False)[0]

    schedule = DiscreteVP.linear()
    other = UNet2DModel.from_config(net.config)
    nets = Nets()
    nets["teacher"] = Guided(Denoiser(net, schedule, "v", call))
    nets["student"] = Student(Sampler(trailing(1), Ddim()), other, schedule, "v", call)
    nets["disc"] = Discriminator(nets.teacher.denoiser, (Tap("down_blocks.0", 8), Tap("mid_block", 8)), width=8)
    return nets


def test_the_student_learns_through_the_frozen_teacher_and_the_teacher_does_not() -> None:
    nets = digits_like_nets()
    batch = Batch({}, (4, 1, 8, 8), x0=torch.randn(4, 1, 8, 8))
    LADD(rollout=OneStep()).student_loss(nets, batch, Step.at(0)).total.backward()
    assert all(p.grad is None for p in nets.teacher.parameters())
    assert sum(p.grad.abs().sum() for p in nets.student.parameters() if p.grad is not None) > 0


def test_the_discriminators_turn_reaches_its_heads_alone() -> None:
    nets = digits_like_nets()
    batch = Batch({}, (4, 1, 8, 8), x0=torch.randn(4, 1, 8, 8))
    LADD(rollout=OneStep()).disc_loss(nets, batch, Step.at(0)).total.backward()
    assert all(p.grad is None for name in ("teacher", "student") for p in nets[name].parameters())
    assert all(p.grad is not None for p in nets.disc.parameters())


def test_training_moves_the_student_onto_the_mixture(ring: MixtureTeacher) -> None:
    """From the pretrained network's own one-step samples, the adversarial loss alone closes most of the distance."""
    optim = {"student": AdamW(3e-4, (0.0, 0.99), decay="linear"), "disc": AdamW(1e-3, (0.0, 0.99), decay="linear")}
    sampler = Sampler(trailing(1), Ddim())
    objective = LADD(rollout=OneStep(), gan=Gan(weight=1.0, loss="softplus", times=LogNormal(-1.0, 1.0)))
    start = pretrained(ring, 1200)
    before = Student(sampler, start.net, start.schedule, start.kind)
    reference = ring.sample(4000, torch.Generator().manual_seed(3))
    far = energy_distance(drawn(before, 4000), reference)
    near = energy_distance(drawn(distilled(objective, ring, start, sampler, optim, 1200), 4000), reference)
    assert near < 0.1 * far
