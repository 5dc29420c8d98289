"""PD: progressive distillation, half as many steps each round. arXiv:2202.00512"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.functional.distances import L2, Distance
from stepdistill.functional.ode import jump_target
from stepdistill.functional.weights import TruncatedSnr, Weight
from stepdistill.models.denoiser import Cond, Denoiser, Predictor
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.sampling import Ddim, Move, Rng, Sampler, StepRule, refuse_noise, refuse_solver


@register("pd", family="trajectory", paper="2202.00512")
@dataclass(frozen=True)
class PD(Objective):
    """Move the student's one jump onto two jumps of whoever was distilled last, from noised data (alg. 2).

    A run is one round; the paper's halving is a chain of recipes, each warm-started from the last and kept. The first
    round follows the teacher, under its guidance; each later one follows ``"previous"``, the student that it was
    warm-started with, frozen. KD regresses on whole trajectories made before; here every round looks two steps ahead
    and its errors add up, but it needs no trajectories. At the optimum the student *is* the last round's sampler, so
    k rounds to one step are the teacher's own 2^k steps.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})
    between_images = frozenset({"distance"})

    follow: Literal["teacher", "previous"] = "teacher"
    """Whose jumps: the teacher's, or those of the student as this run finds it, the warm start's."""
    jumps: int = 2
    """Of the followed per jump of the student, at even times. A followed student must have been trained for them: its
    sampler had ``jumps`` times as many steps as this one's."""
    solver: StepRule = field(default_factory=Ddim)
    """One step of the teacher's ODE; a followed student jumps by DDIM."""
    weight: Weight = field(default_factory=TruncatedSnr)
    """Of the noise levels. ``SnrPlusOne()`` is the paper's alternative."""
    distance: Distance = field(default_factory=L2)
    """Between the student's clean estimate and the one whose jump lands where the jumps of the followed do."""

    def __post_init__(self) -> None:
        """Check what goes together."""
        if self.jumps < 2:
            raise ValueError(f"objective.jumps must be at least 2; got {self.jumps}")
        if self.follow == "previous" and self.solver != Ddim():
            raise ValueError(f"objective.solver {self.solver}: a followed student jumps by DDIM; use Ddim()")

    def check(self, sampler: Sampler) -> None:
        """The student is trained to jump from time to time of its grid, as the followed does."""
        refuse_noise(sampler)
        refuse_solver(self.solver, memory=True)

    def check_start(self, sampler: Sampler, start: Sampler | None) -> None:
        """The followed student jumps ``jumps`` times in each of this one's intervals."""
        if self.follow == "teacher":
            return
        grid = (*sampler.times, 0.0)
        fine = [a + (b - a) * k / self.jumps for a, b in pairwise(grid) for k in range(self.jumps)]
        if start is None or not np.array_equal(np.round(start.times, 9), np.round(fine, 9)):
            found = f"of {start.steps} steps" if start else "missing"
            raise ValueError(
                f"warm_start is {found}: objective.follow 'previous' needs one whose student was trained for "
                f"{self.jumps} times the {sampler.steps} steps of this one's, on the same grid; or follow 'teacher'"
            )

    def extras(self, student: Denoiser) -> dict[str, nn.Module]:
        """The followed student: a frozen copy, taken when the warm start's weights are in; checkpoints hold it."""
        if self.follow == "teacher":
            return {}
        return {"previous": copy.deepcopy(student).requires_grad_(False).eval()}

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def walk(self, followed: Predictor, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """The state (B, ...) at s (B,) to which the jumps of the followed lead from ``x_t`` at t (B,)."""
        x, previous = x_t, None
        for i in range(self.jumps):
            high, low = (t + (s - t) * (k / self.jumps) for k in (i, i + 1))
            low = s if i + 1 == self.jumps else low  # to the last digit
            x, x0 = self.solver(followed, x, Move(high, low, cond, rng, previous))
            previous = x0, high
        return x

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Regression on one interval of the student's grid per sample."""
        student, schedule = nets.student, nets.student.schedule
        grid = torch.tensor((*student.sampler.times, 0.0), dtype=torch.float64, device=step.rng.device)
        j, eps = step.integers(len(grid) - 1, len(batch)), step.randn(batch.shape)
        t, s = grid[j] * schedule.t_max, grid[j + 1] * schedule.t_max

        x_t = schedule.add_noise(batch.x0, eps, t)
        with torch.no_grad():
            x_s = self.walk(nets[self.follow], x_t, t, s, batch.cond, step.rng)
            target = jump_target(x_t, x_s, schedule.coeffs(t, x_t), schedule.coeffs(s, x_t))
        error = self.distance(student(x_t, t, batch.cond), target)
        return Loss((self.weight(schedule.logsnr(t)).to(error) * error).mean(), error=error.mean())
