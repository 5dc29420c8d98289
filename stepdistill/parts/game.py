"""The game of student and critic: samples made once in a step, and judged by teacher and critic at one noise level."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, no_grad

from stepdistill.models.denoiser import Cond
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Step
from stepdistill.parts.critic import denoising_loss
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import Rollout
from stepdistill.parts.times import Times, renoise
from stepdistill.schedule import Kind, Schedule


def new_samples(rollout: Rollout, nets: Nets, batch: Batch, step: Step) -> Tensor:
    """Student samples (B, ...) with a graph, left without it for the later turns of this step."""
    x0 = rollout(nets.student, batch, step)
    step.shared["student_x0"] = x0.detach()
    return x0


def timed_samples(rollout: Rollout, nets: Nets, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
    """``new_samples`` and the times (B,) at which the student was called for them, last of all."""
    seen: list[Tensor] = []
    hook = nets.student.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    try:
        x0 = new_samples(rollout, nets, batch, step)
    finally:
        hook.remove()
    return x0, seen[-1]


def student_samples(rollout: Rollout, nets: Nets, batch: Batch, step: Step) -> Tensor:
    """The samples (B, ...) that the student's turn of this step has made, or new ones if it was not its turn; no graph.

    Critic and discriminator are fitted to these: one rollout in a step, whoever moves.
    """
    if "student_x0" not in step.shared:
        with no_grad():
            new_samples(rollout, nets, batch, step)
    return step.shared["student_x0"]


def fitted_critic(rollout: Rollout, times: Times, nets: Nets, batch: Batch, step: Step) -> Loss:
    """The critic's loss: denoise the student's samples under their own conditions, at noise levels from ``times``."""
    return Loss(denoising_loss(nets.critic, student_samples(rollout, nets, batch, step), batch.cond, times, step))


def look_real(rollout: Rollout, gan: Gan, nets: Nets, batch: Batch, step: Step) -> Loss:
    """The student's loss where there is no other: its samples are to be taken for real."""
    x0 = new_samples(rollout, nets, batch, step)
    adv = gan.student_term(nets.disc, nets.teacher.schedule, x0, batch.cond, step, real=batch.x0)
    return Loss(gan.weight * adv)


def fitted_disc(rollout: Rollout, gan: Gan, nets: Nets, batch: Batch, step: Step) -> Loss:
    """The discriminator's loss: tell the student's samples from real ones of the same conditions."""
    fake = student_samples(rollout, nets, batch, step)
    loss, accuracy = gan.disc_term(nets.disc, nets.teacher.schedule, batch.x0, fake, batch.cond, step)
    return Loss(loss, disc_accuracy=accuracy)


class Judged(NamedTuple):
    """What teacher and critic predict at the same noised samples; all (B, ...) but ``t``."""

    x_t: Tensor
    t: Tensor
    """(B,)."""
    eps: Tensor
    """The noise that was added."""
    teacher: Tensor
    critic: Tensor


def judged(nets: Nets, x0: Tensor, cond: Cond, times: Times, step: Step, *, want: Kind = "x0") -> Judged:
    """Noise samples and ask teacher and critic.

    Gradients flow through both into ``x0`` where they are enabled: call it under ``torch.no_grad()`` for distribution
    matching, whose gradient does not pass through the scores, and without for score identities, whose gradient does.

    Args:
        nets: the game's networks.
        x0: student samples, (B, ...).
        cond: their conditions.
        times: law of the noise levels.
        step: source of randomness.
        want: kind of prediction to ask for.
    """
    x_t, t, eps = renoise(nets.teacher.schedule, x0, times, step)
    return Judged(x_t, t, eps, nets.teacher(x_t, t, cond, want=want), nets.critic(x_t, t, cond, want=want))


def eps_gap(schedule: Schedule, t: Tensor, teacher_eps: Tensor, own_eps: Tensor) -> Tensor:
    """The direction to *subtract* from a student sample, in noise predictions: ``sigma^2 (teacher_eps - own_eps)``.

    Score distillation's weight on variance-preserving paths (arXiv:2209.14988, arXiv:2312.05239); on others
    ``sigma^2 / (alpha^2 + sigma^2)``, the same at the same signal-to-noise ratio.

    Args:
        schedule: the noise path.
        t: times of the noised samples, (B,).
        teacher_eps: the teacher's prediction there, (B, ...).
        own_eps: the critic's, or the noise itself where there is none, (B, ...).

    Returns:
        (B, ...), no gradient attached.
    """
    c = schedule.coeffs(t, teacher_eps)
    return (c.sigma**2 / (c.alpha**2 + c.sigma**2) * (teacher_eps - own_eps)).detach()
