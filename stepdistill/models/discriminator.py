"""Heads over tapped features of a denoiser: the discriminator of DMD2, LADD and their kin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Cond, Denoiser
from stepdistill.models.taps import tapped


class Head(nn.Module):
    """One feature map (B, C, H, W) to a map of logits: two 3x3 convolutions, so that feedback stays local.

    Args:
        channels: C.
        width: channels inside.
    """

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, H * W)."""
        return self.layers(features).flatten(1)


class Discriminator(nn.Module):
    """Logits of noised samples, real = positive, from features that a denoiser computes anyway.

    The backbone is *not* part of this module's parameters or state: a frozen teacher stays frozen (LADD), a critic is
    trained in its own turn (DMD2). Gradients flow through it to the sample.

    Args:
        backbone: the denoiser whose features are read.
        taps: its submodules, as the network's ``named_modules`` spells them.
        channels: feature channels at each tap.
        width: channels inside each head.
    """

    def __init__(self, backbone: Denoiser, taps: Sequence[str], channels: Sequence[int], width: int = 64):
        super().__init__()
        self._backbone = (backbone,)  # in a tuple: not a submodule
        self.taps = tuple(taps)
        self.heads = nn.ModuleList(Head(c, width) for c in channels)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Tapped features of noised samples ``x_t`` (B, ...) at times ``t`` (B,); the layers behind are not run."""
        (backbone,) = self._backbone
        return tapped(backbone.net, self.taps, lambda: backbone(x_t, t, cond, want=backbone.kind))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits (B, L), all heads' positions side by side."""
        return self.judge(self.features(x_t, t, cond))

    def judge(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, L) of features computed before, in float32 whatever the backbone's arithmetic."""
        return torch.cat([head(f.float()) for head, f in zip(self.heads, features, strict=True)], 1)
