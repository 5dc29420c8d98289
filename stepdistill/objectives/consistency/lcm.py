"""LCM: latent consistency, distilled from a guided teacher over skipped time steps. arXiv:2310.04378"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from stepdistill.functional.distances import Distance, ElementHuber
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.segments import two_jumps
from stepdistill.sampling import Ddim, Move, Renoise, Sampler, StepRule, refuse_solver


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
        if self.target_decay is not None and not 0 <= self.target_decay < 1:
            raise ValueError(f"objective.target_decay must lie in [0, 1), or be none; got {self.target_decay}")

    def check(self, sampler: Sampler) -> None:
        """The student ends at the data, from points of its grid; whoever goes on from there adds noise."""
        refuse_solver(self.solver)
        off = [t for t in sampler.times if abs(t * self.intervals - round(t * self.intervals)) > 1e-9]
        if off:
            raise ValueError(
                f"sampler.times {off[0]:g} is no point of the grid of {self.intervals} intervals; "
                f"let objective.intervals be a multiple of the sampler's {sampler.steps} steps"
            )
        if sampler.steps > 1 and not isinstance(sampler.rule, Renoise):
            raise ValueError(f"sampler.rule {sampler.rule}: LCM's student jumps to the data only; use Renoise()")

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def averages(self) -> Mapping[str, float]:
        """The target network, where there is one."""
        return {} if self.target_decay is None else {"target": self.target_decay}

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement of neighbours on the guided teacher's ODE."""
        schedule, n = nets.student.schedule, self.intervals
        eps = step.randn(batch.shape)
        i = step.integers(n, len(batch)) + 1
        t, s = (i.double() / n) * schedule.t_max, ((i - 1).double() / n) * schedule.t_max

        x_t = schedule.add_noise(batch.x0, eps, t)
        target = nets.student if self.target_decay is None else nets.target
        move = Move(t, s, batch.cond, step.rng)
        x0, aim = two_jumps(nets, target, self.solver, x_t, move, torch.zeros_like(t))
        return Loss(self.distance(x0, aim).mean())
