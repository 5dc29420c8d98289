"""What is read of attributes: logits of all heads side by side, and their loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.shapes import ABSENT, HEADS


def split_heads(logits: Tensor) -> dict[str, Tensor]:
    """Logits (B, 31) of each attribute."""
    return dict(zip(HEADS, logits.split([len(values) for values in HEADS.values()], 1), strict=True))


def attribute_loss(logits: dict[str, Tensor], attributes: Tensor) -> Tensor:
    """Sum over attributes of the cross-entropies of those that are there."""
    pairs = zip(logits.values(), attributes.T, strict=True)
    return torch.stack([F.cross_entropy(each, target, ignore_index=ABSENT) for each, target in pairs]).sum()
