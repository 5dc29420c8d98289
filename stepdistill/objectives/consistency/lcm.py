"""LCM: latent consistency, distilled from a guided teacher over skipped time steps. arXiv:2310.04378"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stepdistill.functional.distances import Distance, ElementHuber
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.neighbours import on_ode, refuse_jumps, refuse_off_grid
from stepdistill.parts.target import averages_of, check_decay, target_of
from stepdistill.sampling import Ddim, Sampler, StepRule, refuse_solver


@register("lcm", family="consistency", paper="2310.04378")
@dataclass(frozen=True)
class LCM(Objective):
    """Move the student's clean estimate at t onto its target's, one long solver step down the *guided* teacher's ODE
    (alg. 1; sec. 4.2 on guidance, sec. 4.3 on skipped steps).

    Unlike CD, the grid is fixed and as coarse as a solver can be trusted, so that neighbours are far enough apart to
    learn from; the distance is taken element by element. The paper's c_skip is below 7e-6 at every time of its grid
    and 1 at the data: here the consistency function is the clean estimate, and the state itself at t = 0.

    The scale of guidance is the teacher's alone. ``Teacher.guidance`` fixes one, ``Teacher.guidance_range`` draws one
    for each sample into the conditions; a student with ``Weights.told_guidance`` reads the same number there (the
    paper's omega), any other learns what the range amounts to on average. Nobody guides the student again.

    LCM-LoRA (arXiv:2311.05556) is this objective with adapters for a student, not told the scale, and without a running
    average: ``Weights(form="lora")`` and ``target_decay=None``.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})
    between_images = frozenset({"distance"})

    intervals: int = 48
    """Solver steps over the whole range. The paper has 50, 20 of 1000 time steps each; 48 hold the even grids of 1, 2,
    3, 4, 6 and 8 steps."""
    solver: StepRule = field(default_factory=Ddim)
    """One step of the guided teacher's ODE."""
    target_decay: float | None = 0.95
    """Of the target's running average; None aims at the student as it is, which saves a copy. That target runs ahead of
    whoever follows it quickly, and wants lower learning rates."""
    distance: Distance = field(default_factory=ElementHuber)
    """Between the two clean estimates."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.intervals < 1:
            raise ValueError(f"objective.intervals must be at least 1; got {self.intervals}")
        check_decay(self.target_decay)

    def check(self, sampler: Sampler) -> None:
        """The student ends at the data, from points of its grid; whoever goes on from there adds noise."""
        refuse_solver(self.solver)
        refuse_off_grid("objective.intervals", self.intervals, sampler)
        refuse_jumps("LCM", sampler)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def averages(self) -> Mapping[str, float]:
        """The target network, where there is one."""
        return averages_of(self.target_decay)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement of neighbours on the guided teacher's ODE."""
        target = target_of(nets, self.target_decay)
        x0, aim = on_ode(nets, target, self.solver, batch, step, self.intervals)
        return Loss(self.distance(x0, aim).mean())
