"""Heads over tapped features of a denoiser: the discriminator of DMD2, LADD and their kin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Cond, Denoiser
from stepdistill.models.lora import network_of
from stepdistill.models.taps import Tap, tapped
from stepdistill.models.vision import Vision


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
        backbone: the denoiser whose features are read, or a frozen network of images.
        taps: the features to read; a family's row lists some.
        width: channels inside each head.
    """

    def __init__(self, backbone: Denoiser | Vision, taps: Sequence[Tap], width: int = 64):
        super().__init__()
        self._backbone = (backbone,)  # in a tuple: not a submodule
        self.taps = tuple(taps)
        self.stops_early = True
        """Layers behind the last tap are not run. Off where the backbone is sharded: its own hooks come after them."""
        self.heads = nn.ModuleList(Head(tap.channels, width) for tap in taps)

    @property
    def backbone(self) -> Denoiser | Vision:
        """Whose features are read."""
        return self._backbone[0]

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Tapped feature maps (B, C, H, W) of noised samples ``x_t`` (B, ...) at times ``t`` (B,).

        Tokens are laid out as their patches lie; frames stand side by side.
        """
        (backbone,) = self._backbone
        names, outputs = [tap.name for tap in self.taps], [tap.output for tap in self.taps]

        def run() -> Tensor:
            return backbone(x_t, t, cond, want=backbone.kind)

        found = tapped(network_of(backbone.net), names, run, outputs=outputs, stop=self.stops_early)
        return [_map_of(features, tap, x_t) for features, tap in zip(found, self.taps, strict=True)]

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits (B, L), all heads' positions side by side."""
        return self.judge(self.features(x_t, t, cond))

    def judge(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, L) of features computed before, in float32 whatever the backbone's arithmetic."""
        return torch.cat([head(f.float()) for head, f in zip(self.heads, features, strict=True)], 1)


def _map_of(features: Tensor, tap: Tap, x_t: Tensor) -> Tensor:
    """What a tap gives, as a map (B, C, H, W)."""
    if tap.patch:
        features = features[:, : math.prod(x_t.shape[2:]) // tap.patch**2]
    if tap.tokens:  # (B, L, C): patches of side p in raster order, of each frame in turn
        patch = round((math.prod(x_t.shape[2:]) / features.shape[1]) ** 0.5)
        width = x_t.shape[-1] // patch
        return features.transpose(1, 2).unflatten(2, (-1, width))
    if len(features) != len(x_t):  # frames in the batch: (B T, C, H, W)
        return features.unflatten(0, (len(x_t), -1)).transpose(1, 2).flatten(2, 3)
    return features
