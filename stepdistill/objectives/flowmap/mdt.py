"""MDT: marginal-data transport distillation, velocity matching and velocity distillation. arXiv:2509.04406"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.models.denoiser import Cond
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.flow import CLOSEST, STRAIGHT, on_straight, start_state, start_time, straight
from stepdistill.parts.neighbours import refuse_jumps
from stepdistill.parts.times import LogNormal, Times
from stepdistill.sampling import Sampler, at


@register("mdt", family="flowmap", paper="2509.04406")
@dataclass(frozen=True)
class MDT(Objective):
    """Move the student's average velocity phi to the data onto ``v - t dphi/dt`` (velocity matching, sec. 3), and its
    one-step samples along the gap between its own implied velocity ``phi + t dphi/dt`` and the teacher's (velocity
    distillation).

    The first is MeanFlow with s = 0 always, so the student knows one time only; the second is a score distillation in
    which the student is its own critic. The derivative is a difference along the teacher's velocity.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})

    times: Times = field(default_factory=lambda: LogNormal(1.0, 1.0))
    """Where both terms look. The default is logit-normal on the straight path."""
    delta: float = 0.01
    """How far back the derivative looks, as a share of t; its bias is of this order. The paper looks as far at every t,
    and so only at those above: a student of several steps is asked at the others, too. In half precision it is at
    least 0.005 of the whole way, so that rounding does not drown it."""
    normalise: float = 0.1
    """c in ``dphi/dt / (|dphi/dt| + c)``, the norm over a whole sample, in both terms. A stabiliser that moves the
    fixed point towards the teacher's velocity, the further the larger samples are; 0 leaves the derivative as it is."""
    distil: float = 1.0
    """Weight of velocity distillation; 0 leaves it out."""
    distil_guidance: float = 0.0
    """Guidance scale of the teacher in velocity distillation, in place of teacher.guidance; 0 is that one. The paper
    has 41 in matching and 101 here."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.delta < 0.5:
            raise ValueError(f"objective.delta must lie in (0, 0.5); got {self.delta}")
        for name in ("normalise", "distil", "distil_guidance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name} must be at least 0; got {getattr(self, name)}")

    def check(self, sampler: Sampler) -> None:
        """The student jumps to the data, from where a next step starts."""
        refuse_jumps("MDT", sampler)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Matching on noised data and distillation on noised samples, at the same times."""
        schedule, phi = nets.student.schedule, straight(nets.student)
        eps, noise = step.randn(batch.shape), step.randn(batch.shape)
        top = start_time(schedule)
        t = on_straight(schedule, self.times(schedule, len(batch), step)).clamp_min(CLOSEST)

        x_t = STRAIGHT.add_noise(batch.x0, eps, t)
        now = phi(x_t, t, batch.cond, want="velocity")
        match = (now - self.target(nets, now, x_t, t, batch.cond, batch.cond)).square().mean()
        if not self.distil:
            return Loss(match)

        start = start_state(schedule, noise)
        jump = phi(start, at(top, start), batch.cond, want="velocity")
        cond = batch.cond
        if self.distil_guidance:
            cond = {**cond, "guidance": torch.full((len(batch),), self.distil_guidance, device=x_t.device)}
        with torch.no_grad():
            x_t = STRAIGHT.add_noise(start - top * jump, eps, t)
            now = phi(x_t, t, batch.cond, want="velocity")
            gap = now - self.target(nets, now, x_t, t, batch.cond, cond)
        distil = (gap + jump - jump.detach()).square().mean()  # phi falls by the gap, so the sample rises by it
        return Loss(match + self.distil * distil, match=match, distil=distil)

    @torch.no_grad()
    def target(self, nets: Nets, now: Tensor, x_t: Tensor, t: Tensor, cond: Cond, guided: Cond) -> Tensor:
        """``v - t dphi/dt``, (B, ...): what phi would be if its implied velocity were the teacher's.

        Args:
            nets: the networks.
            now: phi at ``x_t``, (B, ...).
            x_t: states on the straight path, (B, ...).
            t: their times, (B,), above 0.
            cond: conditions of the student.
            guided: conditions of the teacher.
        """
        v, column = straight(nets.teacher)(x_t, t, guided, want="velocity"), (-1, *[1] * (x_t.ndim - 1))
        back = self.delta * t
        if nets.student.dtype in (torch.bfloat16, torch.float16):
            back = back.clamp_min(5e-3).minimum(t / 2)
        length = back.to(x_t).view(column)
        before = straight(nets.student)(x_t - length * v, t - back, cond, want="velocity")
        slope = (now - before) / length
        if self.normalise:
            slope = slope / (slope.flatten(1).norm(dim=1).view(column) + self.normalise)
        return v - t.to(x_t).view(column) * slope
