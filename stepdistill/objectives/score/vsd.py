"""VSD: variational score distillation of one-step generators, SwiftBrush. arXiv:2312.05239"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.functional.divergence import pull
from stepdistill.models.denoiser import with_null
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.critic import denoising_loss
from stepdistill.parts.game import eps_gap, new_samples, student_samples
from stepdistill.parts.rollout import BackwardSim, Rollout, refuse_one_step
from stepdistill.parts.times import Times, Uniform, renoise
from stepdistill.sampling import Sampler


@register("vsd", family="score", paper="2312.05239")
@dataclass(frozen=True)
class VSD(Objective):
    """Move each student sample along (critic's noise - teacher's noise), weighted by sigma^2 (alg. 1).

    It is ``sds`` with the critic's prediction in the place of the added noise: the critic knows the student's own
    spread, so the student does not shrink. Next to ``dmd2`` the gap is taken in noise, without a normaliser and
    without a GAN, and the critic is guided as the teacher is; for that its conditions are dropped now and then.
    Image-free. In the paper the critic is a LoRA on the teacher (``critic.form`` "lora", rank 64), moves once per
    student update and a thousand times as fast (rates 1e-6 and 1e-3).
    """

    needs = frozenset({"student", "teacher", "critic"})

    rollout: Rollout = field(default_factory=BackwardSim)
    """How the student makes its samples; with a one-step sampler, as in the paper, from pure noise in one call."""
    times: Times = field(default_factory=lambda: Uniform(0.02, 0.98))
    """Where teacher and critic are compared."""
    critic_times: Times = field(default_factory=Uniform)
    """Where the critic is fitted; all times weigh alike in the kind that it predicts. *Unverified* in the paper, whose
    code multiplies the noise by alpha."""
    critic_guided: bool = True
    """Guide the critic at the teacher's scale, as the paper does: the student's fixed point is then the teacher without
    guidance. Off compares the guided teacher with the plain critic, as ``dmd2`` does, and the fixed point is guided.
    The same thing where ``teacher.guidance`` is 1; the paper's is 4.5 to 7.5. A teacher that is told its scale
    (FLUX.1 dev) has no null condition, and its critic is plain."""
    null_rate: float = 0.1
    """Share of conditions dropped when a guided critic is fitted, so that it knows the unconditional answer."""
    student_every: int = 1
    """Critic updates per student update."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.null_rate < 1:
            raise ValueError(f"objective.null_rate must lie in [0, 1); got {self.null_rate}")

    def check(self, sampler: Sampler) -> None:
        """A student of several steps must be trained on its own states."""
        refuse_one_step(self.rollout, sampler)

    def check_guidance(self, *, guided: bool, varies: bool, told: bool) -> None:
        """A guided critic must know both of its answers, and is not told what it is to be guided by."""
        if told and self.critic_guided:
            raise ValueError("student.told_guidance: its critic is told, too; set objective.critic_guided False")
        if guided and self.critic_guided and self.null_rate == 0:
            raise ValueError("objective.null_rate 0: a guided critic must know the null condition; use 0.1")

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the critic's on the same samples."""
        return (
            Turn(self.student_loss, moves=("student",), every=self.student_every),
            Turn(self.critic_loss, moves=("critic",)),
        )

    def score_gap(self, nets: Nets, batch: Batch, step: Step, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Student samples (with a graph) and the direction to subtract from them, both (B, ...).

        Args:
            nets: student, teacher and critic.
            batch: conditions.
            step: source of randomness.
            guidance: a scale for each sample, (B,), in place of the teacher's own.
        """
        schedule = nets.teacher.schedule
        x0 = new_samples(self.rollout, nets, batch, step)
        cond = batch.cond if guidance is None else {**batch.cond, "guidance": guidance}
        with torch.no_grad():
            x_t, t, _ = renoise(schedule, x0, self.times, step)
            teacher_eps = nets.teacher(x_t, t, cond, want="eps")
            if self.critic_guided and not nets.teacher.told:
                critic_eps = nets.teacher.guide(nets.critic, x_t, t, cond, want="eps")
            else:
                critic_eps = nets.critic(x_t, t, batch.cond, want="eps")
        return x0, eps_gap(schedule, t, teacher_eps, critic_eps)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Distribution matching, nothing else."""
        return Loss(pull(*self.score_gap(nets, batch, step)))

    def critic_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Denoise the student's samples, some of them without their conditions."""
        cond = batch.cond
        if self.critic_guided and self.null_rate > 0 and cond and not nets.teacher.told:
            dropped = step.rand(len(batch)) < self.null_rate
            cond = with_null(cond, nets.teacher.null, dropped)
        x0 = student_samples(self.rollout, nets, batch, step)
        return Loss(denoising_loss(nets.critic, x0, cond, self.critic_times, step))
