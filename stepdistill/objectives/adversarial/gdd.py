"""GDD: a GAN loss and no other on clean images, by frozen vision features. arXiv:2405.20750"""

from __future__ import annotations

from dataclasses import dataclass, field

from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.game import fitted_disc, look_real
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim, Rollout, refuse_one_step
from stepdistill.parts.times import OnGrid
from stepdistill.sampling import Sampler


@register("gdd", family="adversarial", paper="2405.20750")
@dataclass(frozen=True)
class GDD(Objective):
    """Move the law of the student's samples onto the data's by the non-saturating GAN game (arXiv:1406.2661 sec. 3)
    alone: no sample has to land where the teacher's trajectory does.

    Against LADD the discriminator sees clean samples, and what it reads is made elsewhere: in the paper a VGG16-BN and
    an EfficientNet, here ``heads.backbone`` "vgg16_bn". Those networks are told neither time nor condition; with the
    teacher's features, which are, let ``gan.times`` lie just above 0. GDD-I is this with most convolutions of the
    student at the teacher's weights: ``student.freeze``. The authors' runs augment nothing.
    """

    needs = frozenset({"student", "teacher", "disc"})
    data = frozenset({"x0"})
    guides = False

    rollout: Rollout = field(default_factory=BackwardSim)
    """How the student makes its samples; the paper's has one step."""
    gan: Gan = field(default_factory=lambda: Gan(weight=1.0, loss="softplus", times=OnGrid((0.0,)), r1=5e-5))
    """Loss, noise levels (none), and R1: half the paper's gamma of 1e-4, since ours is the whole square."""
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
