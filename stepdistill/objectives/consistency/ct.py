"""CT: consistency training, on data alone. arXiv:2303.01469"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stepdistill.functional.distances import L2, Distance
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.discretisation import Doubling, Karras, Spacing
from stepdistill.parts.neighbours import refuse_crowded, refuse_jumps, same_noise
from stepdistill.parts.target import averages_of, check_decay
from stepdistill.sampling import Sampler


@register("ct", family="consistency", paper="2303.01469")
@dataclass(frozen=True)
class CT(Objective):
    """Move the student's clean estimate at t onto its target's at the grid's next lower time, for the same sample and
    the same noise (alg. 3).

    Where CD takes a step of the teacher's ODE, CT noises the sample anew with the noise it has: no teacher is
    evaluated, the student merely starts from its weights. The target then averages over all samples that may lie
    behind a state: exact for fine grids only (theorem 2), blurred on coarse ones. So the number of intervals grows. In
    the paper it does so as a square root and the target's decay rises with it; here it doubles, and the decay stands.
    """

    needs = frozenset({"student"})
    guides = False
    data = frozenset({"x0"})
    between_images = frozenset({"distance"})

    intervals: Doubling = field(default_factory=lambda: Doubling(2, 150, 800_000))
    """How many there are at which step."""
    spacing: Spacing = field(default_factory=Karras)
    """Where they end."""
    target_decay: float = 0.95
    """Of the target's running average (mu_0 in the paper)."""
    distance: Distance = field(default_factory=L2)
    """Between the two clean estimates. ``LPIPS()`` in the paper."""

    def __post_init__(self) -> None:
        """Check the range."""
        check_decay(self.target_decay)

    def check(self, sampler: Sampler) -> None:
        """The student's times are ends of the intervals from the first step on, and it adds noise between them."""
        refuse_jumps("CT", sampler)
        refuse_crowded(self.intervals.start, sampler)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def averages(self) -> Mapping[str, float]:
        """The target network."""
        return averages_of(self.target_decay)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement of neighbours that share one noise."""
        student, n = nets.student, self.intervals.at(step.index)
        eps = step.randn(batch.shape)
        i = step.integers(n, len(batch))
        grid = self.spacing.grid(student.schedule, student.sampler.times, n).to(i.device)

        x0, target = same_noise(student, nets.target, batch.x0, eps, grid[i + 1], grid[i], batch.cond)
        return Loss(self.distance(x0, target).mean())
