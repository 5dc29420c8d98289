"""Adversarial losses on logits, real = positive."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GanLoss = Literal["softplus", "hinge", "hinge_both", "lsgan", "relativistic"]


def disc_loss(real: Tensor, fake: Tensor, kind: GanLoss = "softplus") -> Tensor:
    """What a discriminator minimises.

    With p and q the densities of real and generated samples, the best logit is ``log p / q`` for "softplus", that up
    to a constant for "relativistic", the sign of ``p - q`` for both hinges and ``(p - q) / (p + q)`` for "lsgan".

    Args:
        real: logits of real samples, any shape.
        fake: logits of generated samples, any shape; for "relativistic" the shape of ``real``.
        kind: "softplus" is the non-saturating loss (2 ln 2 at chance), "hinge" and "hinge_both" the hinge loss (2 at
            chance; they differ for the student), "lsgan" least squares to 1 and -1 (arXiv:1611.04076; 1 at chance),
            "relativistic" the softplus of each real logit's lead over a generated one's (arXiv:1807.00734; ln 2 at
            chance).

    Returns:
        A scalar.

    Raises:
        ValueError: for an unknown kind, or relativistic logits that do not pair up.
    """
    if kind == "softplus":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind in ("hinge", "hinge_both"):
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "lsgan":
        return 0.5 * ((real - 1).square().mean() + (fake + 1).square().mean())
    if kind == "relativistic":
        return F.softplus(-_lead(real, fake)).mean()
    raise _unknown(kind)


def student_loss(fake: Tensor, kind: GanLoss = "softplus", real: Tensor | None = None) -> Tensor:
    """What a generator minimises, given the logits of its own samples; a scalar.

    Args:
        fake: logits of generated samples, any shape.
        kind: see ``disc_loss``. Under "hinge" the student goes on raising its logits, under "hinge_both" it is content
            with 1; under "lsgan" it aims at 1, what the discriminator calls real.
        real: logits of real samples, the shape of ``fake``; for "relativistic" only.

    Raises:
        ValueError: for an unknown kind, or relativistic logits that do not pair up.
    """
    if kind == "softplus":
        return F.softplus(-fake).mean()
    if kind == "hinge":
        return -fake.mean()
    if kind == "hinge_both":
        return F.relu(1 - fake).mean()
    if kind == "lsgan":
        return 0.5 * (fake - 1).square().mean()
    if kind == "relativistic":
        if real is None:
            raise ValueError("the relativistic loss compares with logits of real samples; none were given")
        return F.softplus(_lead(real, fake)).mean()
    raise _unknown(kind)


@torch.no_grad()
def disc_accuracy(real: Tensor, fake: Tensor, kind: GanLoss = "softplus") -> Tensor:
    """Share of logits on the right side of zero, balanced over real and fake: 0.5 is chance, 1 is perfect.

    Relativistic logits have no zero; theirs is the share of pairs in the right order.
    """
    if kind == "relativistic":
        return (_lead(real, fake) > 0).float().mean()
    return 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())


def _lead(real: Tensor, fake: Tensor) -> Tensor:
    if real.shape != fake.shape:
        raise ValueError(
            f"the relativistic loss pairs logits of one shape; got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    return real - fake


def _unknown(kind: str) -> ValueError:
    return ValueError(f"GAN loss must be 'softplus', 'hinge', 'hinge_both', 'lsgan' or 'relativistic'; got {kind!r}")
