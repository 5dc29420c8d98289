"""Production trainers on exact teachers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Denoiser, plain_call
from stepdistill.models.nets import Nets
from stepdistill.models.two_time import TwoTime
from stepdistill.objective import Batch, Objective, Step
from stepdistill.sampling import Sampler, sample
from stepdistill.schedule import DiscreteVP
from stepdistill.student import Student
from stepdistill.testing import ExactTeacher, GaussianTeacher, MixtureTeacher, fit_network, mlp
from stepdistill.trainer import AdamW, Run, Trainer


@pytest.fixture(scope="session")
def gaussian() -> GaussianTeacher:
    """A rotated Gaussian in two dimensions with standard deviations 1 and 0.2, off centre."""
    angle = torch.tensor(0.5, dtype=torch.float64)
    rotation = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    cov = rotation @ torch.diag(torch.tensor([1.0, 0.04], dtype=torch.float64)) @ rotation.T
    return GaussianTeacher(torch.tensor([0.4, -0.3]), cov, DiscreteVP.linear())


@pytest.fixture(scope="session")
def ring() -> MixtureTeacher:
    """Eight narrow Gaussians on a circle."""
    return MixtureTeacher.ring(DiscreteVP.linear())


def pretrained(teacher: ExactTeacher, steps: int = 700) -> Denoiser:
    """A small v-predicting network regressed onto the teacher."""
    torch.manual_seed(0)
    denoiser = Denoiser(mlp(teacher.dim), teacher.schedule, "v", plain_call)
    fit_network(denoiser, teacher, steps)
    return denoiser


class VectorDisc(nn.Module):
    """A discriminator of plain vectors; it looks at the noised sample and the noise level."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim + 1, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.net(torch.cat([x_t, t[:, None].to(x_t)], 1))


def student_like(denoiser: Denoiser, sampler: Sampler, two_time: bool = False) -> Student:
    """A student that starts from a pretrained network."""
    net = mlp(2)
    net.load_state_dict(denoiser.net.state_dict())
    net = TwoTime(net, at="enter") if two_time else net
    return Student(sampler, net, denoiser.schedule, denoiser.kind)


def distilled(
    objective: Objective,
    teacher: ExactTeacher,
    start: Denoiser,
    sampler: Sampler,
    optim: dict[str, AdamW],
    steps: int,
    *,
    batch: int = 512,
    data: Callable[[Step], Batch] | None = None,
) -> Student:
    """Run ``objective`` through the production trainer with an exact teacher; the averaged student."""
    torch.manual_seed(0)
    nets = Nets()
    nets["teacher"] = teacher
    nets["student"] = student_like(start, sampler, objective.two_time)
    if "critic" in optim:
        nets["critic"] = Denoiser(student_like(start, sampler).net, start.schedule, start.kind)
    if "disc" in optim:
        nets["disc"] = VectorDisc(teacher.dim)

    def real(step: Step) -> Batch:
        return Batch({}, (batch, teacher.dim), x0=teacher.sample(batch, step.rng))

    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in optim.items()}
    run = Run(steps=steps, batch=batch, ema=0.98, clip=10.0, log_every=100)
    trainer = Trainer(nets, objective, optimizers, data or real, run, specs=optim)
    for index in range(steps):
        trainer.step(index)
    return trainer.nets.ema


def drawn(student: Student, n: int = 10_000, seed: int = 7) -> Tensor:
    """Samples of a student, (n, 2)."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return student.sampler.run(student, torch.randn(n, 2, generator=rng), {}, rng)


__all__ = ["distilled", "drawn", "pretrained", "sample", "student_like"]
