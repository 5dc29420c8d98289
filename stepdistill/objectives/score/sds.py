"""SDS: score distillation sampling, DreamFusion's loss; a reference point. arXiv:2209.14988"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stepdistill.functional.divergence import pull
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.game import eps_gap
from stepdistill.parts.rollout import BackwardSim, Rollout, refuse_one_step
from stepdistill.parts.times import Times, Uniform, renoise
from stepdistill.sampling import Sampler


@register("sds", family="score", paper="2209.14988")
@dataclass(frozen=True)
class SDS(Objective):
    """Move each student sample along (added noise - teacher's prediction of it), weighted by sigma^2 (eq. 3).

    Every sample is treated as a distribution of its own, so nothing keeps samples apart: they shrink onto modes of the
    noised teacher, whatever law they had. Made to find one good sample; as a generator's loss it is the point of
    reference for ``vsd``, which puts a critic's prediction in the place of the added noise and keeps the spread.
    The paper's guidance is 100 (``teacher.guidance``). Data-free, one network beside the student.
    """

    needs = frozenset({"student", "teacher"})

    rollout: Rollout = field(default_factory=BackwardSim)
    """How the student makes its samples."""
    times: Times = field(default_factory=lambda: Uniform(0.02, 0.98))
    """Where the teacher is asked."""

    def check(self, sampler: Sampler) -> None:
        """A student of several steps must be trained at all of its times."""
        refuse_one_step(self.rollout, sampler)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Noise, ask the teacher for the noise, move along the difference; its Jacobian is left out."""
        schedule = nets.teacher.schedule
        x0 = self.rollout(nets.student, batch, step)
        with torch.no_grad():
            x_t, t, eps = renoise(schedule, x0, self.times, step)
            teacher_eps = nets.teacher(x_t, t, batch.cond, want="eps")
        return Loss(pull(x0, eps_gap(schedule, t, teacher_eps, eps)))
