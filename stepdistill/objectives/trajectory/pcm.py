"""PCM: phased consistency, one consistency function per segment. arXiv:2405.18407"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.functional.distances import Distance, ElementHuber
from stepdistill.functional.gan import disc_accuracy, disc_loss, student_loss
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.gan import Gan
from stepdistill.parts.segments import Segments, two_jumps
from stepdistill.parts.target import averages_of, check_decay, target_of
from stepdistill.parts.times import Uniform
from stepdistill.sampling import Ddim, Move, Sampler, StepRule, Tcd, refuse_solver


@register("pcm", family="trajectory", paper="2405.18407")
@dataclass(frozen=True)
class PCM(Objective):
    """Inside each segment, move the student's jump to the segment's lower edge onto its own jump from one solver step
    further down (sec. 3), and its distribution there onto that jump's (adversarial consistency).

    The consistency part is TSCD's with every end at the lower edge, ``to_edge=1``. What differs: the target is the
    student as it is and not a running average, the distance is taken element by element, and there is the
    adversarial term. The discriminator compares no real data: it tells the student's states at the edge from the
    target's, both noised up into the segment. With one segment this is LCM. The released LoRA students are
    ``Weights(form="lora")``, rank 64.
    """

    needs = frozenset({"student", "teacher"})
    optional = frozenset({"disc"})
    data = frozenset({"x0"})

    segments: Segments = field(default_factory=lambda: Segments(4, 48))
    """How many segments, and the solver's grid: 48 steps, where the paper has 50 and rounds the edges to them."""
    solver: StepRule = field(default_factory=Ddim)
    """One step of the teacher's ODE, under the teacher's guidance."""
    target_decay: float | None = None
    """Of the target's running average; None aims at the student as it is."""
    distance: Distance = field(default_factory=ElementHuber)
    """Between the two jumps."""
    gan: Gan = field(default_factory=lambda: Gan(weight=0.0, loss="hinge_both", times=Uniform()))
    """The adversarial term, 0.1 in the paper's code, whose hinge stops at 1 for the student, too. ``times`` are
    fractions of the segment, from its lower edge up."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_decay(self.target_decay)
        if self.gan.r1 or self.gan.loss == "relativistic":
            raise ValueError(
                "PCM's discriminator sees no real data: objective.gan.r1 must be 0, and objective.gan.loss not "
                f"'relativistic'; got {self.gan.r1} and {self.gan.loss!r}"
            )

    def check(self, sampler: Sampler) -> None:
        """The student jumps from edge to edge and nowhere else."""
        refuse_solver(self.solver)
        if sampler.times != self.segments.edges:
            raise ValueError(
                f"sampler.times {list(sampler.times)} are not the upper edges of {self.segments.count} segments, "
                f"{list(self.segments.edges)}; let objective.segments.count and the sampler's steps agree"
            )
        if sampler.rule not in (Ddim(), Tcd(0.0)):
            raise ValueError(f"sampler.rule {sampler.rule} leaves the edges; use Ddim() or Tcd(0.0)")

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the discriminator's on the same states."""
        student = Turn(self.student_loss, moves=("student",))
        return (student, Turn(self.disc_loss, moves=("disc",))) if self.gan.on else (student,)

    def averages(self) -> Mapping[str, float]:
        """The target network, where there is one."""
        return averages_of(self.target_decay)

    def at_edge(self, nets: Nets, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """The student's states at lower edges, with a graph, its target's (both (B, ...)), and the edges (B,)."""
        schedule, segments = nets.student.schedule, self.segments
        eps = step.randn(batch.shape)
        i = step.integers(segments.solver_steps, len(batch)) + 1  # t is grid point i, s the one below
        t, s, edge = (segments.time(k) * schedule.t_max for k in (i, i - 1, segments.lower_edge(i)))

        x_t = schedule.add_noise(batch.x0, eps, t)
        target = target_of(nets, self.target_decay)
        moved, aim = two_jumps(nets, target, self.solver, x_t, Move(t, s, batch.cond, step.rng), edge)
        step.shared.update(moved=moved.detach(), aim=aim, edge=edge)
        return moved, aim, edge

    def into_segment(self, nets: Nets, edge: Tensor, step: Step, *states: Tensor) -> tuple[Tensor, Tensor]:
        """States at ``edge`` (B,) noised further to random times of the segment above, all together, and the times."""
        schedule, like = nets.teacher.schedule, states[0]
        share = self.gan.times.fractions(schedule, len(edge), step)
        t = edge + share * schedule.t_max / self.segments.count
        c, low = schedule.coeffs(t, like), schedule.coeffs(edge, like)
        ratio = c.alpha / low.alpha
        spread = (c.sigma**2 - (ratio * low.sigma) ** 2).clamp_min(0).sqrt()  # below 0 by rounding, at the edge itself
        return torch.cat([ratio * x + spread * step.randn(x.shape) for x in states]), t.repeat(len(states))

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement at the edges, point by point and in distribution."""
        moved, aim, edge = self.at_edge(nets, batch, step)
        match = self.distance(moved, aim).mean()
        if not self.gan.on:
            return Loss(match)
        adv = student_loss(nets.disc(*self.into_segment(nets, edge, step, moved), batch.cond), self.gan.loss)
        return Loss(match + self.gan.weight * adv, match=match, adv=adv)

    def disc_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Tell the student's states at the edge from its target's."""
        if "moved" not in step.shared:
            with torch.no_grad():
                self.at_edge(nets, batch, step)
        aim, moved, edge = (step.shared[name] for name in ("aim", "moved", "edge"))
        both = {k: torch.cat([v, v]) for k, v in batch.cond.items()}
        real, fake = nets.disc(*self.into_segment(nets, edge, step, aim, moved), both).chunk(2)
        loss = disc_loss(real, fake, self.gan.loss)
        return Loss(loss, disc_accuracy=disc_accuracy(real, fake))
