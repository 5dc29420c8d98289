"""Frozen networks of images: features for a discriminator, and how alike two images look."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.models.denoiser import Cond
from stepdistill.schedule import Kind


class Images(nn.Module):
    """The images behind samples, with gradients through the decoder.

    Args:
        decode: samples (B, ...) to images (B, C, H, W), or videos (B, C, T, H, W), nominally in [-1, 1].
        decoder: the network behind ``decode``, if any; frozen here.
        size: side that images are resized to; 0 leaves them as they are.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor] = lambda samples: samples,
        decoder: nn.Module | None = None,
        size: int = 0,
    ):
        super().__init__()
        self.decode, self.decoder, self.size = decode, decoder, size

    def forward(self, samples: Tensor) -> Tensor:
        """(B, ...) to images (N, C, H, W), a video's frames one after the other."""
        images = self.decode(samples)
        if images.ndim == 5:
            images = images.transpose(1, 2).flatten(0, 1)
        if self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return images


class OfImages(nn.Module):
    """A network of the images behind samples: frozen, and in eval mode whatever the networks around it do.

    Args:
        net: takes images.
        images: what it is shown of samples.
    """

    def __init__(self, net: nn.Module, images: Images | None = None):
        super().__init__()
        self.net, self.images = net, images or Images()
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> OfImages:
        """Stays in eval mode."""
        return super().train(False)


class Vision(OfImages):
    """A frozen network of images in a denoiser's place: what a projected GAN reads (arXiv:2111.01007).

    It sees the images that samples decode to and is told neither the time nor conditions. It was trained on clean
    images, so let the adversarial term's times be at or near 0; and nothing but its start keeps a student of this
    discriminator alone to its conditions.

    Args:
        net: takes images (N, C, H, W).
        images: what it is shown of samples.
        mean: of each channel in [0, 1] that ``net`` was trained with; grey images are repeated to as many channels.
        std: likewise; None for both hands over images in [-1, 1].
    """

    kind: Kind = "x0"
    """Of nothing: there is a kind because a denoiser has one."""

    def __init__(
        self,
        net: nn.Module,
        images: Images | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__(net, images)
        middle = torch.tensor(mean or (0.5,)).view(-1, 1, 1)  # ((x + 1) / 2 - mean) / std = (x - shift) / scale
        width = torch.tensor(std or (0.5,)).view(-1, 1, 1)
        self.register_buffer("shift", 2 * middle - 1)
        self.register_buffer("scale", 2 * width)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        """What the network says of the images behind ``x_t`` (B, ...); the rest is there because denoisers take it."""
        return self.net((self.images(x_t) - self.shift) / self.scale)


class Perceptual(OfImages):
    """How alike the images behind two batches of samples look, (B, ...), (B, ...) -> (B,): a distance with a network.

    ``net`` takes two batches of colour images (N, 3, H, W) in [-1, 1] and gives one value for each pair. Grey images
    are repeated to three channels; a video's distance is the mean over its frames.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of ``a`` to ``b`` per sample, in float32."""
        one, other = (self.images(x).float().expand(-1, 3, -1, -1) for x in (a, b))
        return self.net(one, other).view(len(a), -1).mean(1)
