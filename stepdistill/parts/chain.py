"""The noising chain whose length follows the discriminator (Diffusion-GAN, arXiv:2206.02262)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill import distributed
from stepdistill.objective import Step
from stepdistill.parts.times import Times
from stepdistill.schedule import DiscreteVP, Schedule

LINEAR = DiscreteVP.linear()
"""The chain: a thousand steps of DDPM's linear betas."""


@dataclass(frozen=True)
class NoiseChain(Times):
    """Where on the chain a sample is looked at: at step 0, or at one of the first ``length`` of its steps.

    The chain is the paper's, ``y = sqrt(abar) x + sqrt(1 - abar) noise eps``, with the betas of a thousand steps,
    however many are used; the authors' code spreads them anew over those in use, so that theirs begins noisier. On a
    teacher's schedule the time is the one with the same ratio of noise to data: all teachers see the same levels.
    """

    length: float = 1.0
    """Share of the chain that is used, at most."""
    noise: float = 0.05
    """Standard deviation of the chain's noise, in units of the data: .05 for StyleGAN2, .5 for projected GANs."""
    clean: float = 0.25
    """Share of samples that are not noised: .25 in the authors' code for projected GANs, .5 in that for StyleGAN2."""
    priority: bool = True
    """Draw steps in proportion to their number, so that a longer chain is felt at once; otherwise all alike."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.length <= 1 or not 0 < self.noise < math.inf or not 0 <= self.clean < 1:
            raise ValueError(
                "a noise chain needs length in (0, 1], noise above 0 and clean in [0, 1); "
                f"got {self.length}, {self.noise} and {self.clean}"
            )

    def fractions(self, schedule: Schedule, n: int, step: Step) -> Tensor:
        """See ``Times``; a sample that is not noised is looked at at time 0."""
        share, clean = step.rand(n), step.rand(n) < self.clean
        reached = self.length * (share.sqrt() if self.priority else share)
        logsnr = LINEAR.logsnr(reached) - 2 * math.log(self.noise)
        t = (schedule.t_from_logsnr(logsnr) / schedule.t_max).clamp(0.0, 1.0)
        return torch.where(clean, 0.0, t)


class ChainLength(nn.Module):
    """How long the chain is at present, as the discriminator's certainty about real samples has made it.

    Every few batches the mean sign ``r`` of the logits of real samples is held against a target: above it the
    discriminator overfits, and the chain grows; below it the chain shrinks (sec. 3). Buffers, no parameters: it is part
    of a run's checkpoints, and no update waits for the host.

    Args:
        target: of the mean sign, in (-1, 1).
        every: batches between two changes.
        ramp: real samples over which it grows from none of its range to all of it.
    """

    def __init__(self, target: float, every: int, ramp: int):
        super().__init__()
        self.target, self.every, self.ramp = target, every, ramp
        self.register_buffer("reach", torch.zeros(()))
        """Share of the range between the shortest and the longest chain, in [0, 1]."""
        self.register_buffer("signs", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def watch(self, real: Tensor) -> Tensor:
        """Take in the logits (B, L) of a batch of real samples; returns their mean sign."""
        sign = distributed.mean(real.float().sign().mean())
        self.signs += sign
        self.seen += 1
        due = (self.seen >= self.every).float()
        samples = len(real) * distributed.world()
        pull = torch.sign(self.signs / self.seen - self.target) * samples * self.every / self.ramp
        self.reach.add_(due * pull).clamp_(0.0, 1.0)
        self.signs *= 1 - due
        self.seen *= 1 - due
        return sign
