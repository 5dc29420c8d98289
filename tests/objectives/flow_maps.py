"""Exact flow maps as students, for the methods that learn them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.functional.ode import jump_target
from stepdistill.models.denoiser import Cond
from stepdistill.sampling import Sampler, at, trailing
from stepdistill.schedule import Kind, Schedule, convert
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher

from .conftest import drawn


class ExactFlowMap(nn.Module):
    """A student of two times whose jumps follow the teacher's ODE exactly; without ``s`` it jumps to the data.

    At negative second times it is the denoiser of another teacher, its "own" law.
    """

    dtype = torch.float64

    def __init__(self, teacher: GaussianTeacher, own: GaussianTeacher | None = None, sampler: Sampler | None = None):
        super().__init__()
        self._teachers, self.sampler = (teacher, own or teacher), sampler or Sampler(trailing(1))
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

    @property
    def schedule(self) -> Schedule:
        return self._teachers[0].schedule

    next_time = Student.next_time

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0", s: Tensor | None = None) -> Tensor:
        teacher, own = self._teachers
        s = torch.zeros_like(t) if s is None else s
        c_t, c_s = self.schedule.coeffs(t, x_t), self.schedule.coeffs(s.abs(), x_t)
        jumped = jump_target(x_t, teacher.flow_map(x_t, t, s.abs()), c_t, c_s)
        near = (t - s.abs() < 1e-12).view(-1, *[1] * (x_t.ndim - 1))
        x0 = torch.where(near, teacher(x_t, t), jumped)
        x0 = torch.where((s < 0).view_as(near), own(x_t, t), x0) + self.offset
        return convert(x0, x_t, c_t, "x0", want)


def bed(schedule: Schedule, mean: float = 0.4) -> GaussianTeacher:
    """One-dimensional data, N(mean, 0.7^2)."""
    return GaussianTeacher(*(torch.tensor(v, dtype=torch.float64) for v in ([mean], [[0.49]])), schedule)


def map_error(teacher: GaussianTeacher, student: Student) -> float:
    """Root mean square distance of the samples from the ends of the exact ODE, from the same noise."""
    noise = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(7))
    exact = teacher.consistency(noise, at(teacher.schedule.t_max, noise))
    return (drawn(student) - exact).square().mean().sqrt().item()
