"""iCT: improved techniques for consistency training. arXiv:2310.14189"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.functional.distances import Distance, Huber
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.discretisation import Doubling, Karras
from stepdistill.parts.neighbours import refuse_crowded, refuse_jumps, same_noise
from stepdistill.parts.times import LogNormal
from stepdistill.sampling import Sampler


@register("ict", family="consistency", paper="2310.14189")
@dataclass(frozen=True)
class ICT(Objective):
    """Move the student's clean estimate at t onto its own, without gradient, at the grid's next lower time, for the
    same sample and the same noise (sec. 3).

    Unlike CT: no running average for a target (sec. 3.2), a pseudo-Huber distance (sec. 3.3), twice as many intervals
    stage by stage (sec. 3.4), intervals drawn by a log-normal law and weighted by the inverse of their length
    (sec. 3.5). Lengths and levels are those of sigma / alpha, so they mean the same on every path. The student starts
    from the teacher, the paper's from nothing.
    """

    needs = frozenset({"student"})
    guides = False
    data = frozenset({"x0"})
    between_images = frozenset({"distance"})

    intervals: Doubling = field(default_factory=Doubling)
    """How many there are at which step."""
    spacing: Karras = field(default_factory=Karras)
    """Where they end."""
    times: LogNormal = field(default_factory=lambda: LogNormal(-1.1, 2.0))
    """Law of the noise levels; an interval is drawn with the probability that lies in it."""
    distance: Distance = field(default_factory=Huber)
    """Between the two clean estimates."""

    def check(self, sampler: Sampler) -> None:
        """The student's times are ends of the intervals from the first step on, and it adds noise between them."""
        refuse_jumps("iCT", sampler)
        if self.intervals.start < 2:
            raise ValueError(f"objective.intervals.start must be at least 2; got {self.intervals.start}")
        refuse_crowded(self.intervals.start, sampler)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def shares(self, levels: Tensor) -> Tensor:
        """Probability of each interval between rising ``levels`` (N + 1,) of sigma / alpha; (N,), sums to 1."""
        below = torch.special.ndtr((levels.log() - self.times.mean) / self.times.std)
        return below.diff() / (below[-1] - below[0])

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement of neighbours that share one noise."""
        student, n = nets.student, self.intervals.at(step.index)
        eps, share = step.randn(batch.shape), step.rand(len(batch))
        grid = self.spacing.grid(student.schedule, student.sampler.times, n)
        levels = self.spacing.levels(student.schedule, grid)
        grid, levels = grid.to(share.device), levels.to(share.device)
        i = torch.searchsorted(self.shares(levels).cumsum(0), share).clamp_max(n - 1)

        x0, target = same_noise(student, student, batch.x0, eps, grid[i + 1], grid[i], batch.cond)
        weight = 1 / (levels[i + 1] - levels[i])
        return Loss((weight.to(x0) * self.distance(x0, target)).mean())
