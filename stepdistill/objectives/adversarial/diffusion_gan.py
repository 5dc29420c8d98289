"""DiffusionGAN: a GAN on samples noised along a chain of adaptive length. arXiv:2206.02262"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from stepdistill.functional.gan import disc_accuracy, disc_loss
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.chain import ChainLength, NoiseChain
from stepdistill.parts.game import new_samples, student_samples
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim, Rollout, refuse_one_step
from stepdistill.sampling import Sampler


@register("diffusion_gan", family="adversarial", paper="2206.02262")
@dataclass(frozen=True)
class DiffusionGAN(Objective):
    """Move the student's samples to where a discriminator of noised samples takes them for real (sec. 3, alg. 1).

    The paper trains generators from nothing; here the generator is the pretrained student, and nothing else teaches it.
    Against LADD, whose noise levels are fixed, the levels follow the discriminator: the chain that noises real and
    generated samples alike starts short and grows while ``r_d``, the mean sign of the logits of real samples, is above
    its target, and shrinks while it is below.
    """

    needs = frozenset({"student", "teacher", "disc"})
    data = frozenset({"x0"})
    guides = False

    rollout: Rollout = field(default_factory=BackwardSim)
    """How the student makes its samples."""
    gan: Gan = field(default_factory=lambda: Gan(weight=1.0, loss="softplus", times=NoiseChain()))
    """Loss, penalty and the chain at its longest."""
    shortest: float = 0.01
    """Share of the chain's steps that are always used: 10 of 1000 for StyleGAN2, 5 of 500 for projected GANs."""
    target: float = 0.6
    """Of ``r_d``: .6 for StyleGAN2, .45 for projected GANs and FastGAN on small data."""
    every: int = 4
    """Discriminator batches between two changes of the chain's length."""
    ramp: int = 100_000
    """Real samples over which the chain grows from shortest to longest. *Unverified* in the paper."""
    student_every: int = 1
    """Discriminator updates per student update."""

    def __post_init__(self) -> None:
        """Check ranges, and that the length means something."""
        if not isinstance(self.gan.times, NoiseChain):
            raise ValueError(f"objective.gan.times must be a NoiseChain, whose length adapts; got {self.gan.times}")
        if self.gan.loss == "relativistic":
            raise ValueError("objective.gan.loss 'relativistic' has no zero for r_d to count from; use 'softplus'")
        if not 0 < self.shortest <= self.gan.times.length:
            longest = f"{self.gan.times.length:g}"
            raise ValueError(f"objective.shortest must lie in (0, {longest}], the chain's length; got {self.shortest}")
        if not -1 < self.target < 1 or self.every < 1 or self.ramp < 1:
            raise ValueError(
                "objective needs target in (-1, 1), every and ramp of at least 1; "
                f"got {self.target}, {self.every} and {self.ramp}"
            )

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

    def extras(self, student: Denoiser) -> dict[str, nn.Module]:
        """The chain's present length."""
        return {"chain": ChainLength(self.target, self.every, self.ramp)}

    def length(self, nets: Nets) -> float:
        """Share of the chain's steps in use."""
        return self.shortest + float(nets.chain.reach) * (self.gan.times.length - self.shortest)

    def at_present(self, nets: Nets) -> Gan:
        """The adversarial term on the chain as long as it is now."""
        return replace(self.gan, times=replace(self.gan.times, length=self.length(nets)))

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Look real, through the noise."""
        x0 = new_samples(self.rollout, nets, batch, step)
        adv = self.at_present(nets).student_term(nets.disc, nets.teacher.schedule, x0, batch.cond, step)
        return Loss(self.gan.weight * adv)

    def disc_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Tell noised samples from noised real ones; then let the chain follow."""
        fake, gan = student_samples(self.rollout, nets, batch, step), self.at_present(nets)
        real_logits, fake_logits, penalty = gan.verdicts(
            nets.disc, nets.teacher.schedule, batch.x0, fake, batch.cond, step
        )
        r_d = nets.chain.watch(real_logits)
        loss = disc_loss(real_logits, fake_logits, gan.loss) + penalty
        reach = nets.chain.reach.clone()  # the module's own goes on
        return Loss(loss, disc_accuracy=disc_accuracy(real_logits, fake_logits), r_d=r_d, reach=reach)
