"""DMD: distribution matching plus regression onto noise-image pairs. arXiv:2311.18828"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stepdistill.functional.divergence import dmd_gap, pull
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.objectives.trajectory.kd import KD
from stepdistill.parts.game import fitted_critic, judged, new_samples
from stepdistill.parts.rollout import BackwardSim, Rollout, refuse_one_step
from stepdistill.parts.times import Times, Uniform
from stepdistill.sampling import Sampler


@register("dmd", family="score", paper="2311.18828")
@dataclass(frozen=True)
class DMD(Objective):
    """Move each student sample along (teacher - critic), the KL gradient of eq. 7 under the weight of eq. 8, while a
    regression holds the student to the teacher's own noise-image pairs (eq. 9, alg. 1).

    The regression keeps modes from being dropped where the critic lags behind; ``dmd2`` replaces it by more critic
    updates and a GAN. The paper's student has one step; with more, the regression is ``kd``'s, interval by interval of
    the teacher's path, and the samples are the student's own. With ``regression_weight`` 0 no pairs are needed.
    """

    needs = frozenset({"student", "teacher", "critic"})

    rollout: Rollout = field(default_factory=BackwardSim)
    """How the student makes the samples that are matched."""
    times: Times = field(default_factory=lambda: Uniform(0.02, 0.98))
    """Where teacher and critic are compared."""
    critic_times: Times = field(default_factory=Uniform)
    """Where the critic is fitted."""
    regression: KD = field(default_factory=KD)
    """Of the student onto the pairs; the paper's ``regression.distance`` is ``LPIPS()``."""
    regression_weight: float = 0.25
    """Of the regression next to the matching term; *Unverified* in the paper's text-to-image runs."""
    normalise: bool = True
    """Weight each sample's direction by eq. 8; off is the plain difference of clean estimates."""
    student_every: int = 1
    """Critic updates per student update."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.regression_weight >= 0:
            raise ValueError(f"objective.regression_weight must be at least 0; got {self.regression_weight}")

    @property
    def data(self) -> frozenset[str]:  # type: ignore[override]
        """The teacher's pairs; nothing without the regression."""
        return self.regression.data if self.regression_weight > 0 else frozenset()

    def check(self, sampler: Sampler) -> None:
        """A student of several steps must be trained on its own states, and by jumps if it regresses onto a path."""
        refuse_one_step(self.rollout, sampler)
        if self.regression_weight > 0:
            self.regression.check(sampler)

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the critic's on the same samples."""
        return (
            Turn(self.student_loss, moves=("student",), every=self.student_every),
            Turn(self.critic_loss, moves=("critic",)),
        )

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Distribution matching on fresh noise plus regression on the batch's pairs, of the same conditions."""
        x0 = new_samples(self.rollout, nets, batch, step)
        with torch.no_grad():
            at = judged(nets, x0, batch.cond, self.times, step)
        dm = pull(x0, dmd_gap(x0, at.teacher, at.critic, normalise=self.normalise))
        if self.regression_weight == 0:
            return Loss(dm)
        regression = self.regression.student_loss(nets, batch, step).total
        return Loss(dm + self.regression_weight * regression, dm=dm, regression=regression)

    def critic_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Denoise the student's samples."""
        return fitted_critic(self.rollout, self.critic_times, nets, batch, step)
