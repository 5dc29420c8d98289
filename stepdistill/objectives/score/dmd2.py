"""DMD2: distribution matching with a fake-score critic and a GAN. arXiv:2405.14867"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.functional.divergence import dmd_gap, pull
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.game import Judged, fitted_critic, fitted_disc, judged, new_samples
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim, Rollout, refuse_one_step
from stepdistill.parts.times import Times, Uniform
from stepdistill.sampling import Sampler


@register("dmd2", family="score", paper="2405.14867")
@dataclass(frozen=True)
class DMD2(Objective):
    """Move each student sample along (teacher - critic), the KL gradient of DMD eq. 7 under the weight of eq. 8.

    The critic tracks the student by denoising its samples; critic and discriminator move ``student_every`` times per
    student update (two time scales, sec. 4.2); the GAN brings in real data (sec. 4.3); a student of several steps is
    trained on its own states (backward simulation, sec. 4.5). With ``gan.weight`` 0 no real data are needed.
    """

    needs = frozenset({"student", "teacher", "critic"})
    optional = frozenset({"disc"})

    rollout: Rollout = field(default_factory=BackwardSim)
    """How the student makes its samples."""
    times: Times = field(default_factory=lambda: Uniform(0.02, 0.98))
    """Where teacher and critic are compared."""
    critic_times: Times = field(default_factory=Uniform)
    """Where the critic is fitted."""
    gan: Gan = field(default_factory=Gan)
    """The adversarial term."""
    disc_weight: float = 1.0
    """Of the discriminator's loss beside the critic's. The paper's 0.01 is for heads on the critic itself
    (``heads.backbone`` "critic"), which both losses then move."""
    student_every: int = 5
    """Critic updates per student update."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.disc_weight > 0:
            raise ValueError(f"objective.disc_weight must be above 0; got {self.disc_weight}")

    def check(self, sampler: Sampler) -> None:
        """A student of several steps must be trained on its own states."""
        refuse_one_step(self.rollout, sampler)

    @property
    def data(self) -> frozenset[str]:  # type: ignore[override]
        """Real samples for the GAN; nothing without it."""
        return self.gan.data

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the critic's and the discriminator's on the same samples."""
        fit = (self.critic_loss, self.disc_loss) if self.gan.on else (self.critic_loss,)
        moves = ("critic", "disc") if self.gan.on else ("critic",)
        return (
            Turn(self.student_loss, moves=("student",), every=self.student_every),
            Turn(*fit, moves=moves),
        )

    def score_gap(self, nets: Nets, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Judged]:
        """Student samples (with a graph) and the direction to subtract from them, both (B, ...), and what teacher and
        critic said.
        """
        x0 = new_samples(self.rollout, nets, batch, step)
        with torch.no_grad():
            at = judged(nets, x0, batch.cond, self.times, step)
        return x0, dmd_gap(x0, at.teacher, at.critic), at

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Distribution matching plus the adversarial term."""
        x0, gap, _ = self.score_gap(nets, batch, step)
        return self.matched(nets, batch, step, x0, gap)

    def matched(self, nets: Nets, batch: Batch, step: Step, x0: Tensor, gap: Tensor) -> Loss:
        """The student's loss, given its samples and the direction to subtract."""
        dm = pull(x0, gap)
        if not self.gan.on:
            return Loss(dm)
        adv = self.gan.student_term(nets.disc, nets.teacher.schedule, x0, batch.cond, step, real=batch.x0)
        return Loss(dm + self.gan.weight * adv, dm=dm, adv=adv)

    def critic_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Denoise the student's samples."""
        return fitted_critic(self.rollout, self.critic_times, nets, batch, step)

    def disc_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Tell the student's samples from real ones of the same conditions."""
        fit = fitted_disc(self.rollout, self.gan, nets, batch, step)
        return Loss(self.disc_weight * fit.total, disc=fit.total, **fit.terms)
