"""Adversarial losses on logits, real = positive."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GanLoss = Literal["softplus", "hinge"]


def disc_loss(real: Tensor, fake: Tensor, kind: GanLoss = "softplus") -> Tensor:
    """What a discriminator minimises.

    Args:
        real: logits of real samples, any shape.
        fake: logits of generated samples, any shape.
        kind: "softplus" is the non-saturating loss (2 ln 2 at chance), "hinge" the hinge loss (2 at chance).

    Returns:
        A scalar.
    """
    if kind == "softplus":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    raise ValueError(f"GAN loss must be 'softplus' or 'hinge'; got {kind!r}")


def student_loss(fake: Tensor, kind: GanLoss = "softplus") -> Tensor:
    """What a generator minimises, given the logits of its own samples; a scalar."""
    if kind == "softplus":
        return F.softplus(-fake).mean()
    if kind == "hinge":
        return -fake.mean()
    raise ValueError(f"GAN loss must be 'softplus' or 'hinge'; got {kind!r}")


@torch.no_grad()
def disc_accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Share of logits on the right side of zero, balanced over real and fake: 0.5 is chance, 1 is perfect."""
    return 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
