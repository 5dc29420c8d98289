"""TSCD: trajectory-segmented consistency distillation, Hyper-SD's first stage. arXiv:2404.13686"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from stepdistill.functional.distances import L2, Distance
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.segments import Segments, two_jumps
from stepdistill.parts.target import averages_of, check_decay
from stepdistill.sampling import Ddim, Move, Sampler, StepRule, Tcd, refuse_solver


@register("tscd", family="trajectory", paper="2404.13686")
@dataclass(frozen=True)
class TSCD(Objective):
    """Inside each segment, move the student's jump to a random end onto its target's jump from one solver step
    further down (sec. 3.1).

    A run covers one number of segments; Hyper-SD's 8 -> 4 -> 2 -> 1 is a chain of recipes, each warm-started from the
    last and kept. With ``also`` a last stage covers several, and one student serves them all: the unified LoRA. With
    every end at the segment's lower edge this is PCM (arXiv:2405.18407); with one segment it is CTM's pairing
    (arXiv:2310.02279) compared at the end itself.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})

    segments: Segments = field(default_factory=Segments)
    """How many segments, and the solver's grid."""
    also: tuple[int, ...] = ()
    """Further numbers of segments, to serve that many steps too: each batch draws one number of all. The network is not
    told which, so it learns one clean estimate for jumps of all lengths. The paper says only that its LoRA is trained
    for one to eight steps; drawing is our own way, *unverified*.
    """
    to_edge: float = 0.0
    """Share of samples whose jump ends at the segment's lower edge instead of a random point: 0 is the paper, 1 PCM."""
    solver: StepRule = field(default_factory=Ddim)
    """One step of the teacher's ODE."""
    target_decay: float = 0.95
    """Of the target's running average. *Unverified* in the paper."""
    distance: Distance = field(default_factory=L2)
    """Between the two jumps. MSE in the early stages of the paper, adversarial in the late ones."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_decay(self.target_decay)
        if not 0 <= self.to_edge <= 1:
            raise ValueError(f"objective.to_edge must lie in [0, 1]; got {self.to_edge}")
        if len({cut.count for cut in self.cuts}) < len(self.cuts):
            raise ValueError(f"objective.also must be other numbers than {self.segments.count}; got {list(self.also)}")

    @property
    def cuts(self) -> tuple[Segments, ...]:
        """All ways to cut that are trained."""
        return (self.segments, *(replace(self.segments, count=n) for n in self.also))

    def check(self, sampler: Sampler) -> None:
        """The student jumps from edge to edge, so its grid is the segments' upper edges."""
        refuse_solver(self.solver)
        if all(sampler.times != cut.edges for cut in self.cuts):
            raise ValueError(
                f"sampler.times {list(sampler.times)} are not the upper edges of {self.segments.count} segments, "
                f"{list(self.segments.edges)}; let objective.segments.count and the sampler's steps agree"
            )
        if not isinstance(sampler.rule, Ddim | Tcd):
            raise ValueError(f"sampler.rule {sampler.rule} does not jump from edge to edge; use Ddim() or Tcd(gamma)")
        if sampler.rule not in (Ddim(), Tcd(0.0)) and sampler.steps > 1 and all(cut.count > 1 for cut in self.cuts):
            raise ValueError(
                f"sampler.rule {sampler.rule} jumps below the next edge, where nothing is trained; use Tcd(0.0), or "
                "train one segment too, with objective.also"
            )

    def serves(self, sampler: Sampler) -> tuple[Sampler, ...]:
        """The same rule on the edges of every cut."""
        return tuple(replace(sampler, times=cut.edges) for cut in self.cuts)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def averages(self) -> Mapping[str, float]:
        """The target network."""
        return averages_of(self.target_decay)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement of two jumps to the same end, from neighbours on the teacher's ODE."""
        schedule, n = nets.student.schedule, len(batch)
        segments = self.cuts[step.shared_integer(len(self.cuts))] if self.also else self.segments
        eps = step.randn(batch.shape)
        i = step.integers(segments.solver_steps, n) + 1  # t is grid point i, s the one below
        edge = segments.lower_edge(i)
        share = torch.where(step.rand(n) < self.to_edge, 0.0, step.rand(n))
        t, s, low = (segments.time(k) * schedule.t_max for k in (i, i - 1, edge))
        end = low + share * (s - low)  # uniform in [edge, s]

        x_t = schedule.add_noise(batch.x0, eps, t)
        moved, target = two_jumps(nets, nets.target, self.solver, x_t, Move(t, s, batch.cond, step.rng), end)
        return Loss(self.distance(moved, target).mean())
