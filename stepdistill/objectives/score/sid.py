"""SiD: score identity distillation, a Fisher divergence with gradients through both scores. arXiv:2404.04057"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.functional.fisher import sid_loss
from stepdistill.models.denoiser import Cond, Denoiser, guided_prediction, null_like, unscaled, with_null
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.critic import denoising_loss
from stepdistill.parts.game import new_samples, student_samples
from stepdistill.parts.rollout import BackwardSim, Rollout, refuse_one_step
from stepdistill.parts.times import Times, Uniform, renoise
from stepdistill.sampling import Sampler
from stepdistill.schedule import Kind, Schedule


@register("sid", family="score", paper="2404.04057")
@dataclass(frozen=True)
class SiD(Objective):
    """Move the student to where teacher and critic agree, by a Fisher divergence written so that an inexact critic does
    little harm (alg. 1): unlike in DMD the gradient passes through teacher and critic into their inputs. Data-free.

    A student of several steps makes a uniform mixture of all its stops, judged by one critic (arXiv:2505.12674): the
    mixture is matched, and its stops may err to opposite sides. ``BackwardSim(last_only=True)`` matches the last.
    Guidance is long and short (arXiv:2406.01561): the teacher's is the recipe's ``teacher.guidance``, the critic has
    two scales here. All equal is LSG; teacher 1 and critic 0 is Zero-CFG, a negative scale of the critic Anti-CFG.
    """

    needs = frozenset({"student", "teacher", "critic"})

    rollout: Rollout = field(default_factory=BackwardSim)
    """How the student makes its samples."""
    alpha: float = 1.2
    """Weight of the squared difference: 1.2 in the paper (1.0 for one of its data sets), 1.0 in all that followed it.
    The larger, the nearer to its teacher a student must begin."""
    times: Times = field(default_factory=lambda: Uniform(0.02, 0.98))
    """Where teacher and critic are compared: the law of arXiv:2406.01561 for latent teachers. On EDM pipelines,
    whose time is Karras', the paper's is about ``Uniform(0.0, 0.8)``: noise up to 24."""
    critic_times: Times = field(default_factory=Uniform)
    """Where the critic is fitted; on EDM teachers the paper's is ``LogNormal(-1.2, 1.2)``."""
    critic_guidance: float = 1.0
    """Guidance scale of the critic when it judges the student."""
    fit_guidance: float = 1.0
    """Guidance scale under which the critic is fitted: what denoises is the guided prediction."""
    critic_null_rate: float = 0.0
    """Share of conditions replaced by the null condition where the critic is fitted; 0.1 in arXiv:2406.01561."""
    student_every: int = 1
    """Critic updates per student update."""

    def __post_init__(self) -> None:
        """Check ranges, and that the critic is not asked for a half of its guidance that it never learns."""
        if not 0 <= self.critic_null_rate < 1:
            raise ValueError(f"objective.critic_null_rate must lie in [0, 1); got {self.critic_null_rate}")
        if self.critic_guidance != 1 and self.fit_guidance == 1 and self.critic_null_rate == 0:
            raise ValueError(
                f"objective.critic_guidance {self.critic_guidance} asks the critic for its null condition, which it is "
                "never fitted to; set fit_guidance as well, or critic_null_rate (0.1)"
            )
        if self.critic_guidance != 0 and self.fit_guidance == 0:
            raise ValueError(
                f"objective.fit_guidance 0 fits the critic without conditions, and critic_guidance "
                f"{self.critic_guidance} asks it for them; let both be 0"
            )

    def check(self, sampler: Sampler) -> None:
        """A student of several steps must be trained on its own states."""
        refuse_one_step(self.rollout, sampler)

    def check_guidance(self, *, guided: bool, varies: bool, told: bool) -> None:
        """A critic that is told a scale has no other."""
        if told and (self.critic_guidance, self.fit_guidance, self.critic_null_rate) != (1.0, 1.0, 0.0):
            raise ValueError(
                "student.told_guidance: its critic is told, too; leave objective.critic_guidance and fit_guidance 1 "
                "and critic_null_rate 0"
            )

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the critic's on the same samples."""
        return (
            Turn(self.student_loss, moves=("student",), every=self.student_every),
            Turn(self.critic_loss, moves=("critic",)),
        )

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """The Fisher divergence; its value is no measure of progress."""
        x0 = new_samples(self.rollout, nets, batch, step)
        x_t, t, _ = renoise(nets.teacher.schedule, x0, self.times, step)
        teacher_x0 = nets.teacher(x_t, t, batch.cond)
        critic_x0 = critic_at(self.critic_guidance, nets)(x_t, t, batch.cond)
        return Loss(sid_loss(x0, teacher_x0, critic_x0, self.alpha).mean())

    def critic_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Denoise the student's samples."""
        cond = batch.cond
        if self.critic_null_rate:
            dropped = step.rand(len(batch)) < self.critic_null_rate
            cond = with_null(unscaled(cond), nets.teacher.null, dropped)
        x0 = student_samples(self.rollout, nets, batch, step)
        return Loss(denoising_loss(critic_at(self.fit_guidance, nets), x0, cond, self.critic_times, step))


class ScaledCritic:
    """The critic under a guidance scale of its own, in a denoiser's place."""

    def __init__(self, critic: Denoiser, null: Cond, scale: float):
        self.critic, self.null, self.scale = critic, null, scale
        self.schedule: Schedule = critic.schedule
        self.kind: Kind = critic.kind

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        """As ``Denoiser.forward``; one evaluation at scale 0, two in one batch at others."""
        cond = unscaled(cond)
        if self.scale == 0:
            return self.critic(x_t, t, null_like(self.null, cond), want=want)
        return guided_prediction(self.critic, self.null, torch.full_like(t, self.scale), x_t, t, cond, want=want)


def critic_at(scale: float, nets: Nets) -> Denoiser | ScaledCritic:
    """The critic under guidance with the teacher's null condition; itself at scale 1.

    Raises:
        ValueError: if the teacher has no null condition to guide with.
    """
    if scale == 1:
        return nets.critic
    if not nets.teacher.null:
        raise ValueError(f"a critic under guidance {scale} needs a teacher with a null condition; leave it 1")
    return ScaledCritic(nets.critic, nets.teacher.null, scale)
