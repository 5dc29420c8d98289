"""SNOOPI: SwiftBrush under a guidance scale drawn anew in each step (PG-SB). arXiv:2412.02687"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from stepdistill.functional.divergence import pull
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.objectives.score.vsd import VSD
from stepdistill.sampling import Sampler


@register("snoopi", family="score", paper="2412.02687")
@dataclass(frozen=True)
class SNOOPI(Objective):
    """Move each student sample as ``vsd`` does (alg. 1 there), teacher and critic under one random guidance scale.

    A fixed scale suits one backbone and breaks another; a range of them compares the two on a spread of guided
    distributions (PG-SB). A range of one point is ``vsd`` at that scale. While both are guided alike, a student with
    the teacher's conditional laws stays where it is at every scale. The paper's other half, negative prompts by
    attention (NASA), belongs to inference.
    """

    needs = frozenset({"student", "teacher", "critic"})

    base: VSD = field(default_factory=VSD)
    """The method whose guidance is drawn."""
    guidance: tuple[float, float] = (2.0, 5.0)
    """Scales between which is drawn, uniformly. ``teacher.guidance`` is then what the student is measured against, and
    trains nothing. *Unverified*: ablated around these in the paper, its final range is not known."""
    per_sample: bool = False
    """A scale for each sample instead of one for the batch. *Unverified* in the paper."""

    def __post_init__(self) -> None:
        """Check the range."""
        low, high = self.guidance
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"objective.guidance must be two scales that do not fall, from 0; got {[low, high]}")
        if self.base.null_rate == 0 and self.guidance != (1.0, 1.0):
            raise ValueError("objective.base.null_rate 0: a guided critic must know the null condition; use 0.1")
        if not self.base.critic_guided:
            raise ValueError("objective.base.critic_guided is off: teacher and critic are under one scale here")

    def check(self, sampler: Sampler) -> None:
        """As the method it varies."""
        self.base.check(sampler)

    def check_guidance(self, *, guided: bool, varies: bool, told: bool) -> None:
        """It draws the scale itself."""
        if varies:  # and so no student is told
            raise ValueError("SNOOPI draws guidance itself, from objective.guidance; leave teacher.guidance_range out")

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the critic's on the same samples."""
        return (
            Turn(self.student_loss, moves=("student",), every=self.base.student_every),
            Turn(self.base.critic_loss, moves=("critic",)),
        )

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Distribution matching at the scale just drawn.

        Raises:
            ValueError: if the teacher is told its scale, which a critic beside it would not be.
        """
        if nets.teacher.told:
            raise ValueError("SNOOPI guides teacher and critic alike, and this teacher is told its scale; use vsd")
        low, high = self.guidance
        drawn = step.rand(len(batch)) if self.per_sample else step.shared_rand()
        scale = (low + (high - low) * drawn).expand(len(batch))
        return Loss(pull(*self.base.score_gap(nets, batch, step, scale)), guidance=scale.mean())
