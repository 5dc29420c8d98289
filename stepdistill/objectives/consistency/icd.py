"""iCD: invertible consistency distillation, a student and its inverse. arXiv:2406.14539"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stepdistill.editing import Inverter, refuse_fresh_noise
from stepdistill.functional.distances import Distance, ElementHuber
from stepdistill.functional.ode import jump
from stepdistill.models.denoiser import Cond, Denoiser
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.segments import Boundaries, two_jumps
from stepdistill.sampling import Ddim, Move, Sampler, StepRule, refuse_solver


@register("icd", family="consistency", paper="2406.14539")
@dataclass(frozen=True)
class ICD(Objective):
    """Move the student's jumps down to the edges of segments, and a second network's jumps up to them, each onto its
    own jump from one solver step further along the teacher's ODE (fig. 3).

    Each half is PCM's pairing without a running average, the other half in the other direction; preservation losses
    ask that one undo the other. Guidance is the student's alone: where a batch brings a scale for the networks to be
    told, the inverter and the round trips go without. Students that are not told one have one ODE, the teacher's as
    guided, and so have their inverters. The inverter is exported beside the student, for ``stepdistill.editing``.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})

    boundaries: Boundaries = field(default_factory=lambda: Boundaries((1.0, 0.75, 0.5, 0.25), 48))
    """The edges, and the solver's grid. In the paper (1, .78, .52, .26) on 50; stock schedulers walk even ones."""
    start: float = 0.02
    """Where inversion begins, as a fraction of t_max: data are taken for the state there."""
    preserve: float = 1.5
    """Weight of the preservation losses; 0 leaves their turns out."""
    unguided: float = 0.2
    """Share of samples whose guidance is switched off, where it varies: the paper draws from five scales, none among
    them."""
    solver: StepRule = field(default_factory=Ddim)
    """One step of the teacher's ODE, in either direction."""
    distance: Distance = field(default_factory=ElementHuber)
    """Between two states at an edge."""

    def __post_init__(self) -> None:
        """Check ranges."""
        first = self.boundaries.edges[-1]
        if not 0 < self.start < first:
            raise ValueError(f"objective.start must lie between 0 and the first edge, {first:g}; got {self.start}")
        if not 0 <= self.preserve < math.inf or not 0 <= self.unguided <= 1:
            found = f"{self.preserve} and {self.unguided}"
            raise ValueError(f"objective needs preserve of at least 0 and unguided in [0, 1]; got {found}")

    def check(self, sampler: Sampler) -> None:
        """The student jumps from edge to edge, without noise."""
        refuse_solver(self.solver)
        if sampler.times != self.boundaries.edges:
            raise ValueError(
                f"sampler.times {list(sampler.times)} are not objective.boundaries.edges "
                f"{list(self.boundaries.edges)}; let both be the same"
            )
        refuse_fresh_noise(sampler)

    def check_guidance(self, *, guided: bool, varies: bool, told: bool) -> None:
        """The inverter learns one ODE, so an untold student must have one too."""
        if varies and not told:
            raise ValueError("teacher.guidance_range: iCD's inverter undoes one scale; use student.told_guidance too")

    def extras(self, student: Denoiser) -> dict[str, nn.Module]:
        """The forward model, which starts as the student does."""
        return {"inverter": Inverter.beside(student, self.start)}

    def turns(self) -> tuple[Turn, ...]:
        """Both halves, then what ties them."""
        halves = (
            Turn(self.reverse_loss, moves=("student",), name="reverse"),
            Turn(self.forward_loss, moves=("inverter",), name="forward"),
        )
        if self.preserve == 0:
            return halves
        return (
            *halves,
            Turn(self.forward_preservation, moves=("inverter",), name="forward_preservation"),
            Turn(self.reverse_preservation, moves=("student",), name="reverse_preservation"),
        )

    def reverse_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement of the student's jumps down to an edge, under guidance."""
        schedule, segments, n, cond = nets.student.schedule, self.boundaries, len(batch), batch.cond
        eps, i, off = step.randn(batch.shape), step.integers(segments.solver_steps, n) + 1, step.rand(n) < self.unguided
        if "guidance" in cond:
            cond = {**cond, "guidance": cond["guidance"].masked_fill(off, 1.0)}
        t, s, low = (segments.time(k) * schedule.t_max for k in (i, i - 1, segments.lower_edge(i)))
        x_t = schedule.add_noise(batch.x0, eps, t)
        moved, target = two_jumps(nets, nets.student, self.solver, x_t, Move(t, s, cond, step.rng), low)
        return Loss(self.distance(moved, target).mean())

    def forward_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement of the inverter's jumps up to an edge, without guidance."""
        schedule, segments, n = nets.inverter.schedule, self.boundaries, len(batch)
        first = math.floor(self.start * segments.solver_steps + 1e-9)  # the last grid point that is not above the start
        eps, i = step.randn(batch.shape), step.integers(segments.solver_steps - first, n) + first
        t = segments.time(i).clamp_min(self.start) * schedule.t_max
        s, high = (segments.time(k) * schedule.t_max for k in (i + 1, segments.upper_edge(i)))
        x_t, cond = schedule.add_noise(batch.x0, eps, t), without_guidance(batch)
        teacher = nets.teacher.denoiser if "guidance" in cond else nets.teacher  # of scale 1: not evaluated twice
        roles = Nets({"student": nets.inverter, "teacher": teacher})
        moved, target = two_jumps(roles, nets.inverter, self.solver, x_t, Move(t, s, cond, step.rng), high)
        return Loss(self.distance(moved, target).mean())

    def forward_preservation(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """The inverter brings the student's states at an edge back to where they came from."""
        low, high, eps = self.draw(nets, batch, step)
        x_high, cond = nets.student.schedule.add_noise(batch.x0, eps, high), without_guidance(batch)
        with torch.no_grad():
            x_low = fall(nets.student, x_high, high, low, cond)
        back = nets.inverter.rise(x_low, low, high, cond)
        return Loss(self.preserve * self.distance(back, x_high).mean())

    def reverse_preservation(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """The student brings the inverter's states at an edge, and so the noise of data, back to what they were."""
        low, high, eps = self.draw(nets, batch, step)
        x_low, cond = nets.student.schedule.add_noise(batch.x0, eps, low), without_guidance(batch)
        with torch.no_grad():
            x_high = nets.inverter.rise(x_low, low, high, cond)
        back = fall(nets.student, x_high, high, low, cond)
        return Loss(self.preserve * self.distance(back, x_low).mean())

    def draw(self, nets: Nets, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """A segment for each sample: its lower and its upper edge, (B,), the lowest at the data; and noise."""
        edges = torch.tensor((0.0, *reversed(self.boundaries.edges)), dtype=torch.float64, device=step.rng.device)
        k = step.integers(len(edges) - 1, len(batch))
        t_max = nets.student.schedule.t_max
        return edges[k] * t_max, edges[k + 1] * t_max, step.randn(batch.shape)


def fall(student: Denoiser, x: Tensor, high: Tensor, low: Tensor, cond: Cond) -> Tensor:
    """The student's jump from ``high`` down to ``low``."""
    return jump(x, student(x, high, cond), student.schedule.coeffs(high, x), student.schedule.coeffs(low, x))


def without_guidance(batch: Batch) -> Cond:
    """Conditions of the batch, with scale 1 for networks that are told one."""
    told = "guidance" in batch.cond
    return {**batch.cond, "guidance": torch.ones_like(batch.cond["guidance"])} if told else batch.cond
