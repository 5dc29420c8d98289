"""Decoupled DMD: guidance augmentation and distribution matching as two terms. arXiv:2511.22677"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.functional.divergence import dmd_gap, pull
from stepdistill.models.denoiser import both_predictions, unscaled
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.game import fitted_critic, timed_samples
from stepdistill.parts.rollout import BackwardSim, Rollout, refuse_one_step
from stepdistill.parts.times import Times, Uniform
from stepdistill.sampling import Sampler


@register("decoupled_dmd", family="score", paper="2511.22677")
@dataclass(frozen=True)
class DecoupledDMD(Objective):
    """Move each student sample along (teacher - critic), both without guidance, and along the teacher's guidance
    (conditional - null) times (scale - 1), each asked at a time of its own (eq. 8).

    At one shared time the two add up to the gradient of ``dmd2`` under a guided teacher (eq. 6): distribution matching
    (DM), which regularises, and guidance augmentation (CA), a push that no student satisfies and that makes guided
    few-step samples. CA is asked where less noise is left than in the student's own input, DM everywhere (the hybrid
    of sec. 4.3). The scale is ``teacher.guidance``; at 1 the push is nothing and is not evaluated. No GAN, no data.
    """

    needs = frozenset({"student", "teacher", "critic"})

    rollout: Rollout = field(default_factory=BackwardSim)
    """How the student makes its samples."""
    dm_times: Times = field(default_factory=Uniform)
    """Where teacher and critic are compared."""
    ca_times: Times = field(default_factory=Uniform)
    """Where the push is taken, as fractions of the time of the student's own input, not of ``t_max``."""
    dm_weight: float = 1.0
    """Of the matching term; 0 leaves the push without its brake."""
    ca_weight: float = 1.0
    """Of the push, beside scale - 1."""
    normalise: bool = True
    """Divide each term by the mean distance of the sample to the conditional teacher's estimate at that term's time.
    *Unverified* in the paper, whose equations carry no weight."""
    critic_times: Times = field(default_factory=Uniform)
    """Where the critic is fitted, by plain conditional denoising."""
    student_every: int = 5
    """Critic updates per student update; ``dmd2``'s. *Unverified* in the paper."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not (self.dm_weight >= 0 and self.ca_weight >= 0 and self.dm_weight + self.ca_weight > 0):
            raise ValueError(
                f"objective.dm_weight and ca_weight must be at least 0 and one of them above; got {self.dm_weight} "
                f"and {self.ca_weight}"
            )

    def check(self, sampler: Sampler) -> None:
        """A student of several steps must be trained on its own states."""
        refuse_one_step(self.rollout, sampler)

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the critic's on the same samples."""
        return (
            Turn(self.student_loss, moves=("student",), every=self.student_every),
            Turn(self.critic_loss, moves=("critic",)),
        )

    @torch.no_grad()
    def dm_gap(self, nets: Nets, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What matching subtracts from samples ``x0`` seen as ``x_t`` at times ``t`` (B,); (B, ...)."""
        teacher_x0 = nets.teacher.denoiser(x_t, t, unscaled(batch.cond))
        return dmd_gap(x0, teacher_x0, nets.critic(x_t, t, batch.cond), normalise=self.normalise)

    @torch.no_grad()
    def ca_gap(self, nets: Nets, batch: Batch, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What the push subtracts, ``(scale - 1) (null - conditional)``; as ``dm_gap``.

        Raises:
            ValueError: if the teacher is guided and has no null condition, because it is told its scale.
        """
        if nets.teacher.scale == 1 and "guidance" not in batch.cond:
            return torch.zeros_like(x0)
        null, cond = nets.teacher.null, unscaled(batch.cond)
        if not null or not cond:
            raise ValueError("decoupled_dmd pushes from a null condition, and this teacher has none; use dmd2")
        conditional, unconditional = both_predictions(nets.teacher.denoiser, null, x_t, t, cond)
        push = dmd_gap(x0, conditional, unconditional, normalise=self.normalise)
        extra = nets.teacher.scales(t, batch.cond) - 1
        return extra.to(x0).view(-1, *[1] * (x0.ndim - 1)) * push

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Both terms, at two times and two noises."""
        schedule, n = nets.teacher.schedule, len(batch)
        x0, own_t = timed_samples(self.rollout, nets, batch, step)
        dm_t, dm_eps = self.dm_times(schedule, n, step), step.randn(x0.shape)
        ca_t, ca_eps = self.ca_times.fractions(schedule, n, step) * own_t, step.randn(x0.shape)

        seen = x0.detach()
        dm = ca = torch.zeros_like(seen)
        if self.dm_weight > 0:
            dm = self.dm_weight * self.dm_gap(nets, batch, seen, schedule.add_noise(seen, dm_eps, dm_t), dm_t)
        if self.ca_weight > 0:
            ca = self.ca_weight * self.ca_gap(nets, batch, seen, schedule.add_noise(seen, ca_eps, ca_t), ca_t)
        return Loss(pull(x0, dm + ca), dm=dm.square().mean(), ca=ca.square().mean())

    def critic_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Denoise the student's samples."""
        return fitted_critic(self.rollout, self.critic_times, nets, batch, step)
