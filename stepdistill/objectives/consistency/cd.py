"""CD: consistency distillation. arXiv:2303.01469"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stepdistill.functional.distances import L2, Distance
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.discretisation import Doubling
from stepdistill.parts.neighbours import on_ode, refuse_jumps, refuse_off_grid
from stepdistill.parts.target import averages_of, check_decay, target_of
from stepdistill.sampling import Ddim, Sampler, StepRule, refuse_solver


@register("cd", family="consistency", paper="2303.01469")
@dataclass(frozen=True)
class CD(Objective):
    """Move the student's clean estimate at t onto its target's estimate one solver step further down (alg. 2).

    The consistency function is the clean estimate itself: at t = 0 it returns its input on every path, which is the
    boundary condition. The target is a running average of the student, replaced by the state at t = 0. With a
    one-step solver the fixed point is that solver's own composition over the grid, not the exact ODE map.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})
    between_images = frozenset({"distance"})

    intervals: Doubling = field(default_factory=lambda: Doubling(4, 8, 1000))
    """Solver steps over the whole range; few make the target travel far, many make it exact."""
    solver: StepRule = field(default_factory=Ddim)
    """One step of the teacher's ODE. The paper uses Heun."""
    target_decay: float = 0.95
    """Of the target's running average (mu in the paper)."""
    distance: Distance = field(default_factory=L2)
    """Between the two clean estimates."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_decay(self.target_decay)

    def check(self, sampler: Sampler) -> None:
        """The student is called at points of the grid that it was trained on."""
        refuse_solver(self.solver)
        refuse_jumps("CD", sampler)
        refuse_off_grid("objective.intervals.end", self.intervals.end, sampler)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def averages(self) -> Mapping[str, float]:
        """The target network."""
        return averages_of(self.target_decay)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement of neighbours on the teacher's ODE."""
        target = target_of(nets, self.target_decay)
        x0, aim = on_ode(nets, target, self.solver, batch, step, self.intervals.at(step.index))
        return Loss(self.distance(x0, aim).mean())
