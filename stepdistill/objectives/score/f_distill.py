"""f-distill: DMD2 whose gradient is weighted by the density ratio, for any f-divergence. arXiv:2502.15681"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stepdistill import distributed
from stepdistill.functional.f_divergence import FDivergence, f_weight
from stepdistill.models.denoiser import Cond, Denoiser
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.objectives.score.dmd2 import DMD2
from stepdistill.parts.game import Judged
from stepdistill.parts.gan import Gan
from stepdistill.parts.times import Uniform
from stepdistill.sampling import Sampler


@register("f_distill", family="score", paper="2502.15681")
@dataclass(frozen=True)
class FDistill(Objective):
    """Move each student sample along DMD2's direction, as far as an f-divergence asks at its density ratio (sec. 3).

    The discriminator's logit on noised samples is ``log r``, the ratio of real to generated density, and
    ``h(r) = r^2 f''(r)`` is the weight. Reverse KL has h = 1 and is DMD2 itself; the others follow the student less
    where the teacher has nothing to say. The discriminator must know the noise levels at which it is asked, so unlike
    in DMD2 it looks at those of ``base.times``.
    """

    needs = frozenset({"student", "teacher", "critic"})
    optional = frozenset({"disc"})

    base: DMD2 = field(default_factory=lambda: DMD2(gan=Gan(times=Uniform(0.02, 0.98))))
    """Everything but the weight."""
    divergence: FDivergence = "js"
    """rkl, kl, js, sh (squared Hellinger), neyman, jeffreys or softened (reverse KL); js and kl did best."""
    ratio_clip: tuple[float, float] = (0.1, 20.0)
    """Bounds of the ratio. *Unverified* in the paper, as are the next two."""
    ratio_bins: int = 10
    """Equal ranges of noise levels, in each of which the ratio is divided by its running mean (1, if the discriminator
    were right); 0 takes it as it is."""
    ratio_decay: float = 0.5
    """Of those running means."""
    normalise: bool = True
    """Divide the weight by its mean over the micro-batch of all processes, so that no divergence asks for a learning
    rate of its own. With few samples little of the weight is left, with one nothing."""

    def __post_init__(self) -> None:
        """Check ranges, and that there is a ratio to weight by."""
        low, high = self.ratio_clip
        if not 0 < low < high:
            raise ValueError(f"objective.ratio_clip must be two rising ratios above 0; got {list(self.ratio_clip)}")
        if self.ratio_bins < 0 or not 0 <= self.ratio_decay < 1:
            raise ValueError(
                f"objective.ratio_bins must be at least 0 and ratio_decay in [0, 1); got {self.ratio_bins} and "
                f"{self.ratio_decay}"
            )
        if self.weighted and (not self.base.gan.on or self.base.gan.loss != "softplus"):
            raise ValueError(
                f"objective.divergence {self.divergence!r} takes its density ratio from the discriminator: base.gan "
                f"needs a weight above 0 and loss 'softplus'; got {self.base.gan.weight} and {self.base.gan.loss!r}"
            )
        if self.weighted and self.base.gan.times != self.base.times:
            raise ValueError(
                f"objective.base.gan.times {self.base.gan.times}: the density ratio is asked where teacher and critic "
                f"are compared, so the discriminator must look there: {self.base.times}"
            )

    @property
    def weighted(self) -> bool:
        """Whether the weight is anything but 1."""
        return self.divergence != "rkl"

    @property
    def data(self) -> frozenset[str]:  # type: ignore[override]
        """Real samples for the discriminator."""
        return self.base.data

    def check(self, sampler: Sampler) -> None:
        """As DMD2."""
        self.base.check(sampler)

    def extras(self, student: Denoiser) -> dict[str, nn.Module]:
        """The ratio's running means."""
        return {"ratio_means": RatioMeans(self.ratio_bins)} if self.weighted and self.ratio_bins else {}

    def turns(self) -> tuple[Turn, ...]:
        """DMD2's, with another loss for the student."""
        student, *others = self.base.turns()
        return (Turn(self.student_loss, moves=student.moves, every=student.every), *others)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Weighted distribution matching plus the adversarial term."""
        x0, gap, at = self.base.score_gap(nets, batch, step)
        if self.weighted:
            gap = self.weight(nets, at, batch.cond).view(-1, *[1] * (x0.ndim - 1)) * gap
        return self.base.matched(nets, batch, step, x0, gap)

    @torch.no_grad()
    def weight(self, nets: Nets, at: Judged, cond: Cond) -> Tensor:
        """h(r) of each sample, (B,); a discriminator of many logits speaks by their mean."""
        low, high = self.ratio_clip
        ratio = nets.disc(at.x_t, at.t, cond).flatten(1).mean(1).exp().clamp(low, high)
        if self.ratio_bins:
            ratio = ratio / nets.ratio_means(ratio, at.t / nets.teacher.schedule.t_max, self.ratio_decay)
        weight = f_weight(ratio, self.divergence)
        return weight / distributed.mean(weight.mean()) if self.normalise else weight


class RatioMeans(nn.Module):
    """Running means of the density ratio by noise level.

    Args:
        bins: equal ranges of noise levels.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.register_buffer("means", torch.ones(bins))

    def forward(self, ratio: Tensor, share: Tensor, decay: float) -> Tensor:
        """Take in ``ratio`` (B,) at times ``share`` (B,) in [0, 1], and return the mean that goes with each, (B,)."""
        bins = len(self.means)
        index = (share * bins).long().clamp(0, bins - 1)
        count, sums = (
            distributed.total(torch.zeros_like(self.means).index_add_(0, index, each.to(self.means)))
            for each in (torch.ones_like(ratio), ratio)
        )
        self.means.lerp_(torch.where(count > 0, sums / count.clamp_min(1), self.means), 1 - decay)
        return self.means[index].to(ratio)
