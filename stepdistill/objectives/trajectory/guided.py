"""Guided distillation: two evaluations of a guided teacher into one of the student. arXiv:2210.03142"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stepdistill.functional.distances import L2, Distance
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.times import Times, Uniform


@register("guided", family="trajectory", paper="2210.03142")
@dataclass(frozen=True)
class GuidedDistillation(Objective):
    """Move the student's prediction onto the guided teacher's at the same noised sample (sec. 3.1, stage one).

    The only objective here that saves no steps: the student follows the guided ODE in as many as the teacher needs,
    with one evaluation each instead of two, on any grid and by any rule. Stage two makes steps fewer: warm-start
    progressive distillation or another method from this student.

    The teacher's recipe says which guidance: ``Teacher.guidance_range`` with ``Weights(told_guidance=True)`` is the
    paper, one student for all scales; ``Teacher.guidance`` alone bakes one scale in, into ``Weights(form="lora")`` too.
    Both predict in the student's own kind. For v on a VP path, that is the paper's clean-sample error under the weight
    SNR + 1, and for eps under SNR.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})

    times: Times = field(default_factory=Uniform)
    """Where the two are compared."""
    distance: Distance = field(default_factory=L2)
    """Between the two predictions."""

    def check_guidance(self, *, guided: bool, varies: bool, told: bool) -> None:
        """There must be something to learn."""
        if not guided:
            raise ValueError(
                "teacher.guidance 1 leaves guided distillation nothing to learn: set it, or teacher.guidance_range"
            )

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Regression on the guided prediction."""
        student = nets.student
        t, eps = self.times(student.schedule, len(batch), step), step.randn(batch.shape)

        x_t = student.schedule.add_noise(batch.x0, eps, t)
        with torch.no_grad():
            target = nets.teacher(x_t, t, batch.cond, want=student.kind)
        return Loss(self.distance(student(x_t, t, batch.cond, want=student.kind), target).mean())
