"""LADD: latent adversarial diffusion distillation. arXiv:2403.12015"""

from __future__ import annotations

from dataclasses import dataclass, field

from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.game import fitted_disc, look_real
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import FromData, Rollout, refuse_one_step
from stepdistill.parts.times import LogitNormal
from stepdistill.sampling import Sampler


@register("ladd", family="adversarial", paper="2403.12015")
@dataclass(frozen=True)
class LADD(Objective):
    """Move the student's samples to where heads on the frozen teacher's features take them for real (sec. 3).

    There is no other loss. The noise level at which the discriminator looks sets the kind of feedback: structure at
    high noise, texture at low. The paper trains on samples of the teacher instead of real data; both are a matter of
    what ``x0`` holds.
    """

    needs = frozenset({"student", "teacher", "disc"})
    data = frozenset({"x0"})
    guides = False

    rollout: Rollout = field(default_factory=FromData)
    """How the student makes its samples."""
    gan: Gan = field(default_factory=lambda: Gan(weight=1.0, loss="hinge", times=LogitNormal(0.0, 1.0)))
    """Loss, noise levels and penalty."""
    student_every: int = 1
    """Discriminator updates per student update."""

    def check(self, sampler: Sampler) -> None:
        """A student of several steps must be trained at all of its times."""
        self.gan.alone()
        refuse_one_step(self.rollout, sampler)

    def turns(self) -> tuple[Turn, ...]:
        """The student's update, then the discriminator's on the same samples."""
        return (
            Turn(self.student_loss, moves=("student",), every=self.student_every),
            Turn(self.disc_loss, moves=("disc",)),
        )

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Look real."""
        return look_real(self.rollout, self.gan, nets, batch, step)

    def disc_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Tell the student's samples from real ones."""
        return fitted_disc(self.rollout, self.gan, nets, batch, step)
