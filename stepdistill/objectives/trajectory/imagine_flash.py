"""Imagine Flash: backward distillation with a shifted reconstruction loss. arXiv:2405.05224"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stepdistill.functional.distances import L2, Distance
from stepdistill.functional.ode import jump
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.gan import Gan
from stepdistill.sampling import Ddim, Sampler, StepRule, at, refuse_solver, trailing
from stepdistill.student import Student


@register("imagine_flash", family="trajectory", paper="2405.05224")
@dataclass(frozen=True)
class ImagineFlash(Objective):
    """Move the student's clean estimate at its own state onto what the teacher makes of that very estimate, noised to
    ``gamma(t)`` (sec. 4, whose symbols and numbers are *unverified* here).

    The states come from the student's own sampling (backward distillation), so no signal of real data leaks into them
    and none are needed. ``gamma`` grows with t (shifted reconstruction): early in sampling the teacher may change the
    layout, late it adds detail alone. KD's targets are fixed beforehand; these follow the student.

    With fresh noise the target forgets where the sample came from: what the teacher makes of many noisings is averaged,
    which draws samples together, to the mean of Gaussian data. So the paper's loss wants few updates, or an adversarial
    term beside it. With ``noise="own"`` the teacher goes on from where the student's own jump to gamma(t) lands. With
    ``gamma=(0, 1)`` that is its present state: plain backward distillation, whose optimum is the teacher's
    sampler from there; its ends have the right law if the states have, so sample several steps by ``Renoise``.
    """

    needs = frozenset({"student", "teacher"})
    between_images = frozenset({"distance"})
    optional = frozenset({"disc"})

    gamma: tuple[float, float] = (0.1, 0.8)
    """The noise level that the teacher starts from, as fractions of t_max: at t = 0 and at t_max, linear between.
    *Unverified* in the paper."""
    noise: Literal["fresh", "own"] = "fresh"
    """What the estimate is noised with: fresh draws, or the noise that it leaves over in the student's state."""
    teacher_steps: int = 1
    """Steps of the teacher from gamma(t) to its clean sample; one is its plain estimate. *Unverified* in the paper."""
    solver: StepRule = field(default_factory=Ddim)
    """One of these steps."""
    distance: Distance = field(default_factory=L2)
    """Between the two clean samples. *Unverified* in the paper."""
    gan: Gan = field(default_factory=lambda: Gan(weight=0.0))
    """An adversarial term, which needs real data. Its weight in the paper is *unverified*."""

    def __post_init__(self) -> None:
        """Check ranges."""
        low, high = self.gamma
        if not 0 <= low <= high <= 1 or high == 0:
            raise ValueError(f"objective.gamma must rise within [0, 1]; got {list(self.gamma)}")
        if self.noise == "fresh" and high == 1:
            raise ValueError(
                "objective.gamma reaches 1, where fresh noise leaves nothing of the student's sample to the teacher; "
                "end below 1, or take noise 'own'"
            )
        if self.noise == "own" and low > 0:
            raise ValueError(
                f"objective.gamma starts at {low:g}; the student's own noise is known up to its state's level alone, "
                "so with noise 'own' let gamma start at 0"
            )
        refuse_solver(self.solver, memory=True)
        if self.teacher_steps < 1:
            raise ValueError(f"objective.teacher_steps must be at least 1; got {self.teacher_steps}")

    @property
    def data(self) -> frozenset[str]:  # type: ignore[override]
        """Real samples for the GAN; nothing without it."""
        return self.gan.data

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the discriminator's on the same samples."""
        student = Turn(self.student_loss, moves=("student",))
        return (student, Turn(self.disc_loss, moves=("disc",))) if self.gan.on else (student,)

    def estimate(self, student: Student, batch: Batch, step: Step) -> tuple[Tensor, Tensor, float]:
        """A state that the student itself reaches and its estimate there, both (B, ...), and the time of all states, a
        fraction of t_max.
        """
        stop, noise = step.shared_integer(student.sampler.steps), step.randn(batch.shape)
        fraction = student.sampler.times[stop]
        with torch.no_grad():
            x_t = student.sampler.run(student, noise, batch.cond, step.rng, stop=stop)
        return x_t, student(x_t, at(fraction * student.schedule.t_max, x_t), batch.cond), fraction

    def target(self, nets: Nets, batch: Batch, step: Step, x_t: Tensor, x0: Tensor, fraction: float) -> Tensor:
        """What the teacher makes of the estimate ``x0`` at the state ``x_t``; all (B, ...)."""
        schedule, (low, high) = nets.teacher.schedule, self.gamma
        level = low + (high - low) * fraction
        t, tau = at(fraction * schedule.t_max, x_t), at(level * schedule.t_max, x_t)
        if self.noise == "fresh":
            x_tau = schedule.add_noise(x0, step.randn(batch.shape), tau)
        else:
            x_tau = jump(x_t, x0, schedule.coeffs(t, x_t), schedule.coeffs(tau, x_t))
        refine = Sampler(tuple(level * u for u in trailing(self.teacher_steps)), self.solver)
        return refine.run(nets.teacher, x_tau / schedule.prior_std, batch.cond, step.rng)  # which scales it back

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Shifted reconstruction plus the adversarial term."""
        x_t, x0, fraction = self.estimate(nets.student, batch, step)
        step.shared["student_x0"] = x0.detach()
        with torch.no_grad():
            target = self.target(nets, batch, step, x_t, x0, fraction)
        loss = self.distance(x0, target).mean()
        if not self.gan.on:
            return Loss(loss)
        adv = self.gan.student_term(nets.disc, nets.teacher.schedule, x0, batch.cond, step, batch.x0)
        return Loss(loss + self.gan.weight * adv, reconstruction=loss, adv=adv)

    def disc_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Tell the student's samples from real ones of the same conditions."""
        fake = step.shared["student_x0"]  # the student's turn is taken in every step
        loss, accuracy = self.gan.disc_term(nets.disc, nets.teacher.schedule, batch.x0, fake, batch.cond, step)
        return Loss(loss, disc_accuracy=accuracy)
