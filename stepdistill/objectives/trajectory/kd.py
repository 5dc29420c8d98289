"""KD: regression onto noise-image pairs of the teacher. arXiv:2101.02388"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stepdistill.functional.distances import L2, Distance
from stepdistill.functional.ode import jump_target
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.sampling import Ddim, Sampler, Tcd


@register("kd", family="trajectory", paper="2101.02388")
@dataclass(frozen=True)
class KD(Objective):
    """Move the student's jump from each stored teacher state onto the teacher's next state (Luhman & Luhman, sec. 3).

    A batch holds the teacher's path at the student's grid; one of its K intervals is drawn per sample. With one step
    the path is (noise, image) and this is the paper's regression; with more it is the same regression per interval.
    The optimum is the teacher's own map, so the student's ceiling is the solver that made the pairs.
    """

    needs = frozenset({"student"})
    data = frozenset({"path"})
    between_images = frozenset({"distance"})

    distance: Distance = field(default_factory=L2)
    """Between the student's clean estimate and the one whose jump lands on the teacher's next state."""

    def check(self, sampler: Sampler) -> None:
        """Between its steps the student is trained to jump, so it must be sampled by jumps."""
        if sampler.steps > 1 and sampler.rule not in (Ddim(), Tcd(0.0)):
            raise ValueError(f"sampler.rule {sampler.rule} adds noise between steps; KD trains jumps, use Ddim()")

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Regression on one interval per sample."""
        student = nets.student
        grid = torch.tensor((*student.sampler.times, 0.0), dtype=torch.float64, device=batch.path.device)
        j = step.integers(len(grid) - 1, len(batch))
        rows = torch.arange(len(batch), device=j.device)
        t, s = grid[j] * student.schedule.t_max, grid[j + 1] * student.schedule.t_max
        x_t, x_s = batch.path[rows, j], batch.path[rows, j + 1]

        target = jump_target(x_t, x_s, student.schedule.coeffs(t, x_t), student.schedule.coeffs(s, x_t))
        return Loss(self.distance(student(x_t, t, batch.cond), target).mean())
