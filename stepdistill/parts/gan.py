"""The adversarial term: both players look at samples noised to random times (Diffusion-GAN, arXiv:2206.02262)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.functional.gan import GanLoss, disc_accuracy, disc_loss, student_loss
from stepdistill.models.denoiser import Cond
from stepdistill.models.discriminator import Discriminator
from stepdistill.objective import Step
from stepdistill.parts.times import LogNormal, Times, renoise
from stepdistill.schedule import Schedule


@dataclass(frozen=True)
class Gan:
    """Weight, loss and noise levels of an adversarial term."""

    weight: float = 0.01
    """Of the student's adversarial loss, next to the method's main term; 0 leaves the term out altogether."""
    loss: GanLoss = "softplus"
    times: Times = field(default_factory=lambda: LogNormal(-1.5, 1.0))
    """Where the discriminator looks. At high noise real and fake are alike, so that uniform times leave it at chance on
    schedules that destroy the data early."""
    r1: float = 0.0
    """Weight of the approximate R1 penalty, the change of the logits under a small perturbation of real samples."""
    r1_noise: float = 0.1
    """Its standard deviation, in units of the noised samples."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.weight >= 0 or not self.r1 >= 0 or not self.r1_noise > 0:
            raise ValueError(
                f"gan.weight and gan.r1 must be at least 0 and gan.r1_noise above 0; got {self.weight}, {self.r1}, "
                f"{self.r1_noise}"
            )

    @property
    def on(self) -> bool:
        """Whether there is a discriminator."""
        return self.weight > 0

    @property
    def data(self) -> frozenset[str]:
        """What it asks of the data: real samples."""
        return frozenset({"x0"}) if self.on else frozenset()

    def alone(self) -> None:
        """Refuse a weight of 0 where there is no other loss.

        Raises:
            ValueError: saying so.
        """
        if self.weight == 0:
            raise ValueError("objective.gan.weight 0 leaves nothing to learn from: there is no other loss")

    def student_term(
        self,
        disc: Discriminator,
        schedule: Schedule,
        x0: Tensor,
        cond: Cond,
        step: Step,
        real: Tensor | None = None,
    ) -> Tensor:
        """The student's loss on its samples ``x0`` (B, ...): a scalar, with a graph through the discriminator.

        ``real`` samples (B, ...) of the same conditions are looked at by the relativistic loss alone.

        Raises:
            ValueError: if the loss is relativistic and there are none.
        """
        x_t, t, _ = renoise(schedule, x0, self.times, step)
        logits = disc(x_t, t, cond)
        if self.loss != "relativistic":
            return student_loss(logits, self.loss)
        if real is None:
            raise ValueError("gan.loss 'relativistic' needs real samples in the student's turn; use 'softplus' here")
        with torch.no_grad():  # the student has no part in these
            real_logits = disc(schedule.add_noise(real, step.randn(real.shape), t), t, cond)
        return student_loss(logits, self.loss, real_logits)

    def verdicts(
        self, disc: Discriminator, schedule: Schedule, real: Tensor, fake: Tensor, cond: Cond, step: Step
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, L) of real and of generated samples, and the weighted penalty; arguments as in ``disc_term``."""
        t = self.times(schedule, len(real), step).repeat(2)
        both = {k: torch.cat([v, v]) for k, v in cond.items()}
        eps = torch.cat([step.randn(real.shape), step.randn(fake.shape)])
        x_t = schedule.add_noise(torch.cat([real, fake.detach()]), eps, t)
        real_logits, fake_logits = disc(x_t, t, both).chunk(2)  # one evaluation of the backbone
        if self.r1 == 0:
            return real_logits, fake_logits, real_logits.new_zeros(())
        near = x_t[: len(real)] + self.r1_noise * step.randn(real.shape)
        moved = disc(near, t[: len(real)], cond)
        return real_logits, fake_logits, self.r1 * ((moved - real_logits) / self.r1_noise).square().mean()

    def disc_term(
        self, disc: Discriminator, schedule: Schedule, real: Tensor, fake: Tensor, cond: Cond, step: Step
    ) -> tuple[Tensor, Tensor]:
        """The discriminator's loss on real and generated samples noised to the same times.

        Args:
            disc: the discriminator.
            schedule: the noise path.
            real: real samples, (B, ...).
            fake: student samples of the same conditions, (B, ...); detached here.
            cond: conditions, each (B, ...).
            step: source of randomness.

        Returns:
            The loss and the accuracy (0.5 is chance), scalars.
        """
        real_logits, fake_logits, penalty = self.verdicts(disc, schedule, real, fake, cond, step)
        loss = disc_loss(real_logits, fake_logits, self.loss) + penalty
        return loss, disc_accuracy(real_logits, fake_logits, self.loss)
