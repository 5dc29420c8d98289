"""The Inception network of FID: Google's of 2015-12-05, as pytorch-fid and torch-fidelity ported it from TensorFlow.

It is torchvision's Inception v3 (arXiv:1512.00567) but for three things that the graph of 2015 does: average pools do
not count the padding; the last block pools by maximum; 1008 classes. Parameters carry the names of
``pt_inception-2015-12-05-6726825d.pth``. Read-out and classes are not needed for features and are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, FEATURES = 299, 2048

Kernel = tuple[int, int]
Stage = tuple[tuple[str, int, Kernel], ...]
"""Convolutions side by side, each its name, width and kernel; their outputs are concatenated."""
Chain = tuple[Stage, ...]
"""Stages one after the other."""


class Convolution(nn.Module):
    """Convolution without bias, normalisation with TensorFlow's epsilon, ReLU."""

    def __init__(self, channels: int, width: int, kernel: Kernel, stride: int = 1, padding: Kernel = (0, 0)):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block: chains of convolutions and a pool side by side.

    Args:
        channels: of its input.
        chains: of convolutions.
        pool: "average" (padding not counted) or "maximum", 3x3, before the convolution ``branch_pool``.
        pooled: width of that convolution; None for a block that halves the resolution: the last stage of each chain
            then has stride 2 and no padding, and the pool, by maximum, no convolution.
    """

    def __init__(self, channels: int, chains: tuple[Chain, ...], pool: str = "average", pooled: int | None = None):
        super().__init__()
        self.chains, self.pool = chains, pool
        for chain in chains:
            width = channels
            for stage in chain:
                halves = pooled is None and stage is chain[-1]
                for name, out, kernel in stage:
                    padding = (0, 0) if halves else (kernel[0] // 2, kernel[1] // 2)
                    self.add_module(name, Convolution(width, out, kernel, 2 if halves else 1, padding))
                width = sum(out for _, out, _ in stage)
        if pooled is not None:
            self.branch_pool = Convolution(channels, pooled, (1, 1))
        self.halves = pooled is None

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            h = x
            for stage in chain:
                h = torch.cat([getattr(self, name)(h) for name, _, _ in stage], 1)
            outputs.append(h)
        if self.halves:
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*outputs, self.branch_pool(pooled)], 1)


def _chain(prefix: str, *stages: tuple[int, Kernel]) -> Chain:
    """Single convolutions, ``prefix_1``, ``prefix_2`` and so on."""
    return tuple(((f"{prefix}_{i}", width, kernel),) for i, (width, kernel) in enumerate(stages, 1))


ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _at_35(channels: int, pooled: int) -> Mixed:
    chains = (
        ((("branch1x1", 64, ONE),),),
        _chain("branch5x5", (48, ONE), (64, FIVE)),
        _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
    )
    return Mixed(channels, chains, pooled=pooled)


def _at_17(width: int) -> Mixed:
    chains = (
        ((("branch1x1", 192, ONE),),),
        _chain("branch7x7", (width, ONE), (width, ROW), (192, COLUMN)),
        _chain("branch7x7dbl", (width, ONE), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)),
    )
    return Mixed(768, chains, pooled=192)


def _at_8(channels: int, pool: str) -> Mixed:
    def split(name: str) -> Stage:
        return ((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1)))

    chains = (
        ((("branch1x1", 320, ONE),),),
        ((("branch3x3_1", 384, ONE),), split("branch3x3_2")),
        ((("branch3x3dbl_1", 448, ONE),), (("branch3x3dbl_2", 384, THREE),), split("branch3x3dbl_3")),
    )
    return Mixed(channels, chains, pool, pooled=192)


class InceptionV3(nn.Module):
    """Features (B, 2048) of images (B, 3, 299, 299) in about [-1, 1]; 21.8 M parameters, float32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, THREE, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, THREE)
        self.Conv2d_2b_3x3 = Convolution(32, 64, THREE, padding=(1, 1))
        self.Conv2d_3b_1x1 = Convolution(64, 80, ONE)
        self.Conv2d_4a_3x3 = Convolution(80, 192, THREE)
        self.Mixed_5b = _at_35(192, 32)
        self.Mixed_5c = _at_35(256, 64)
        self.Mixed_5d = _at_35(288, 64)
        self.Mixed_6a = Mixed(
            288, (((("branch3x3", 384, THREE),),), _chain("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)))
        )
        self.Mixed_6b = _at_17(128)
        self.Mixed_6c = _at_17(160)
        self.Mixed_6d = _at_17(160)
        self.Mixed_6e = _at_17(192)
        self.Mixed_7a = Mixed(
            768,
            (
                _chain("branch3x3", (192, ONE), (320, THREE)),
                _chain("branch7x7x3", (192, ONE), (192, ROW), (192, COLUMN), (192, THREE)),
            ),
        )
        self.Mixed_7b = _at_8(1280, "average")
        self.Mixed_7c = _at_8(2048, "maximum")

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))
