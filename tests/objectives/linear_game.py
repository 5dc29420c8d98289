"""Linear generators on Gaussian data, where every expectation of score distillation is a closed form.

``x0 = m + L z``, so student, teacher and critic are all Gaussian. With S = L L^T, C_p = a^2 Sigma + s^2,
C_q = a^2 S + s^2, A = s^2 / C_p and B = s^2 / C_q: E[D_q - D_p] = A (m - mu) and E[(D_q - D_p) z^T] = (A - B) L.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Objective, Step
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import ExactTeacher, GaussianTeacher, fit_network, mlp
from stepdistill.trainer import AdamW, Run, Trainer

ONE = Sampler(trailing(1), Ddim())


def given(*normals: Tensor) -> Step:
    """A step that hands out these normal draws, in order, and refuses any other."""
    queue = list(normals)

    class Given(Step):
        def randn(self, shape: tuple[int, ...]) -> Tensor:
            drawn = queue.pop(0)
            assert drawn.shape == shape
            return drawn

    return Given.at(0)


def design(dim: int, parts: int) -> tuple[Tensor, ...]:
    """``parts`` vectors of ``dim`` with mean zero and unit covariance over few points: the expectation of anything
    linear in them, and of its product with one of them, is the plain mean over the batch."""
    n = dim * parts
    points = n**0.5 * torch.cat([torch.eye(n), -torch.eye(n)]).double()
    return points.split(dim, 1)


@dataclass(frozen=True)
class Golden:
    """One column of the table for mu = 0.3, Sigma = 1.4, m = -0.2, L = 1.1, in one dimension."""

    schedule: Schedule
    time: float
    """As a fraction of t_max."""
    alpha: float
    sigma: float
    c_p: float
    c_q: float
    gap: float
    """E[D_q - D_p]."""
    gap_z: float
    """E[(D_q - D_p) z]."""

    @property
    def weight(self) -> float:
        """Turns a gap of clean estimates, critic - teacher, into the weighted gap of noises, teacher - critic."""
        return self.alpha * self.sigma / (self.alpha**2 + self.sigma**2)


_VP = DiscreteVP.linear()
_AT = float(_VP.t_from_logsnr(torch.tensor(0.64 / 0.36, dtype=torch.float64).log()))
GOLDEN = {
    "flow": Golden(RectifiedFlow(), 0.5, 0.5, 0.5, 0.6, 0.5525, -0.208333, -0.039404),
    "vp": Golden(_VP, _AT, 0.8, 0.6, 1.256, 1.1344, -0.143312, -0.033797),
    "edm": Golden(EDM(80.0), 2 / 80, 1.0, 2.0, 5.4, 5.21, -0.370370, -0.029715),
}


class Linear(nn.Module):
    """``m + L z`` of the standard normal z that the sampler starts from."""

    def __init__(self, mean: Tensor, factor: Tensor, scale: float):
        super().__init__()
        self.mean, self.factor, self.scale = nn.Parameter(mean.clone()), nn.Parameter(factor.clone()), scale

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.mean + x_t / self.scale @ self.factor.T


def linear_nets(teacher: nn.Module, mean: Tensor, factor: Tensor) -> Nets:
    """A linear generator of one step, its exact critic, and the teacher; float64."""
    nets, schedule = Nets(), teacher.schedule
    nets["teacher"] = teacher
    net = Linear(mean.double(), factor.double(), schedule.prior_std)
    nets["student"] = Student(ONE, net, schedule, "x0").double()
    nets["critic"] = GaussianTeacher(mean, factor @ factor.T, schedule, mean.expand(2, -1))  # whatever the label
    return nets


def golden_nets(column: Golden) -> Nets:
    """The table's generator, critic and teacher."""
    teacher = GaussianTeacher(
        torch.tensor([0.3], dtype=torch.float64), torch.tensor([[1.4]], dtype=torch.float64), column.schedule
    )
    return linear_nets(teacher, torch.tensor([-0.2], dtype=torch.float64), torch.tensor([[1.1]], dtype=torch.float64))


def gradients(loss: Tensor, nets: Nets) -> tuple[Tensor, Tensor]:
    """Of the generator's mean (D,) and factor (D, D), per unit of a loss that is a sum over dimensions."""
    net = nets.student.net
    dim = len(net.mean)
    mean, factor = torch.autograd.grad(loss, (net.mean, net.factor))
    return dim * mean, dim * factor


CLASSES = torch.tensor([[0.8, 0.2], [-0.4, 0.5]], dtype=torch.float64)
NULL_MEAN = torch.tensor([0.1, 0.0], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)


def classes(schedule: Schedule | None = None) -> GaussianTeacher:
    """Two classes of one covariance around other means than the null label's."""
    return GaussianTeacher(NULL_MEAN, COV, schedule or DiscreteVP.linear(), CLASSES)


def guided(teacher: ExactTeacher, scale: float = 1.0) -> Guided:
    """An exact teacher under guidance, as a run's teacher is."""
    return Guided(teacher, scale, {"labels": torch.tensor([teacher.null])})


def labels(n: int, label: int) -> dict[str, Tensor]:
    """One label for all."""
    return {"labels": torch.full((n,), label)}


def shrink(teacher: GaussianTeacher, time: float) -> Tensor:
    """``A = sigma^2 (alpha^2 cov + sigma^2)^-1`` at a fraction of t_max, (D, D)."""
    c = teacher.schedule(torch.tensor(time * teacher.schedule.t_max, dtype=torch.float64))
    eye = torch.eye(teacher.dim, dtype=torch.float64)
    return c.sigma**2 * torch.linalg.inv(c.alpha**2 * teacher.cov + c.sigma**2 * eye)


def pretrained_on_labels(teacher: ExactTeacher, steps: int = 500) -> Denoiser:
    """A small v-predicting network that takes labels, regressed onto the teacher."""
    torch.manual_seed(0)
    denoiser = Denoiser(mlp(teacher.dim, 64, 3, teacher.null), teacher.schedule, "v")
    fit_network(denoiser, teacher, steps, labelled=True, batch=256)
    return denoiser


def student_of_law(start: Denoiser, law: GaussianTeacher, steps: int = 200) -> Student:
    """A one-step student regressed onto the exact map of ``law``, so that it has a spread to begin with."""
    student = Student(ONE, copy.deepcopy(start.net), start.schedule, start.kind)
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    t = torch.ones(256, dtype=torch.float64)
    for _ in range(steps):
        noise, cond = (
            torch.randn(256, law.dim, generator=rng),
            {"labels": torch.randint(law.null, (256,), generator=rng)},
        )
        loss = (student(noise, t, cond) - law.consistency(noise, t, cond)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def distilled_on_labels(
    objective: Objective,
    teacher: Guided,
    start: Denoiser,
    law: GaussianTeacher,
    optim: dict[str, AdamW],
    steps: int,
    *,
    seed: int = 0,
) -> Student:
    """Run ``objective`` through the production trainer on random labels, from a student of ``law`` and a critic that
    is the network ``start``; the averaged one-step student."""
    nets, dim, null = Nets(), law.dim, law.null
    nets["teacher"] = teacher
    nets["student"] = student_of_law(start, law)
    nets["critic"] = Denoiser(copy.deepcopy(start.net), start.schedule, start.kind)

    def data(step: Step) -> Batch:
        return Batch({"labels": step.integers(null, 256)}, (256, dim))

    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in optim.items()}
    run = Run(steps=steps, batch=256, ema=0.98, clip=10.0, log_every=100, seed=seed)
    trainer = Trainer(nets, objective, optimizers, data, run, specs=optim)
    for index in range(steps):
        trainer.step(index)
    return trainer.nets.ema


def drawn_of(student: Student, label: int, n: int = 10_000) -> Tensor:
    """Samples of one label, (n, D)."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return student.sampler.run(student, torch.randn(n, 2, generator=rng), labels(n, label), rng)


__all__ = [
    "CLASSES",
    "COV",
    "GOLDEN",
    "NULL_MEAN",
    "ONE",
    "Golden",
    "classes",
    "design",
    "distilled_on_labels",
    "drawn_of",
    "given",
    "golden_nets",
    "gradients",
    "guided",
    "labels",
    "linear_nets",
    "pretrained_on_labels",
    "shrink",
    "student_of_law",
]
