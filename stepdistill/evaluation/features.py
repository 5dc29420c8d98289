"""From images to feature vectors: the uint8 image contract and the extractors of the digits benchmark.

Every image that is judged is ``uint8 (B, 3, H, W)``, what a PNG would hold. Rounding happens once, in ``to_uint8``, for
real and generated images alike: half a grey level of difference is enough to move a Frechet distance.
"""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stepdistill.evaluation.classifier import load_digit_classifier


def to_uint8(x: Tensor) -> Tensor:
    """Images as they would be saved: [-1, 1] to 0..255, rounded to the nearest level, grey repeated to three channels.

    Args:
        x: float images, (B, 1, H, W) or (B, 3, H, W), nominally in [-1, 1]; what lies outside is clipped.

    Returns:
        uint8 (B, 3, H, W) on the same device; a value in the middle between two levels takes the even one.

    Raises:
        ValueError: if x is not float, has another shape, or holds a NaN or an infinity.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.is_floating_point():
        raise ValueError(f"x must be float (B, 1 or 3, H, W) in [-1, 1], got {tuple(x.shape)} of {x.dtype}")
    finite = x.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(f"x holds NaN or infinity in {int((~finite).sum())} of {len(x)} images")
    # Float32 first: bfloat16 has steps of a whole level near 255.
    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.expand(-1, 3, -1, -1).contiguous()


def check_images(images: Tensor) -> None:
    """Makes sure that images are uint8 (B, 3, H, W).

    Raises:
        ValueError: if they are not.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 (B, 3, H, W), got {tuple(images.shape)} of {images.dtype}; "
            "to_uint8 makes them from floats in [-1, 1]"
        )


class Extractor(Protocol):
    """A fixed map from images to features."""

    name: str
    sha256: str
    """Identifies the map: hash of the weights file, or of the description where there are no weights."""
    dim: int
    resize: str
    """How images reach the size that it takes; "none" if they must have it."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) float32 of images uint8 (B, 3, H, W)."""
        ...


class Pixels:
    """The grey values themselves, scaled to [-1, 1]: a space that no training can have bent.

    Args:
        height: of the images it takes.
        width: of the images it takes.
    """

    resize = "none"

    def __init__(self, height: int = 8, width: int = 8):
        self.name = f"grey-pixels-{height}x{width}"
        self.sha256 = hashlib.sha256(self.name.encode()).hexdigest()
        self.dim = height * width
        self.size = (height, width)

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, H * W) float32 of grey images uint8 (B, 3, H, W).

        Raises:
            ValueError: if the images break the contract, have another size or are not grey.
        """
        return _grey(images, self.size).flatten(1)


class DigitFeatures:
    """The penultimate layer of the digit classifier, and its verdicts.

    Args:
        path: the classifier's safetensors file; its hash identifies the extractor.
        device: where the classifier runs.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a digit classifier.
    """

    name = "digit-classifier"
    dim = 64
    resize = "none"

    def __init__(self, path: str | PathLike[str], device: torch.device | str = "cpu", batch_size: int = 1000):
        self.model = load_digit_classifier(path).to(device)
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.device = device
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 64) float32, on the CPU, of grey images uint8 (B, 3, 8, 8).

        Raises:
            ValueError: if the images break the contract, have another size or are not grey.
        """
        return torch.cat([self.model.features(batch).cpu() for batch in self._batches(images)])

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The most likely digit of each image, (B,) int64 in 0..9, on the CPU; same images as ``__call__``.

        Raises:
            ValueError: if the images break the contract, have another size or are not grey.
        """
        return torch.cat([self.model(batch).argmax(1).cpu() for batch in self._batches(images)])

    def _batches(self, images: Tensor) -> list[Tensor]:
        return [batch.to(self.device) for batch in _grey(images, (8, 8)).split(self.batch_size)]


def _grey(images: Tensor, size: tuple[int, int]) -> Tensor:
    """One channel in [-1, 1], float32 (B, 1, H, W), of grey images uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, *size):
        raise ValueError(
            f"images must be uint8 (B, 3, {size[0]}, {size[1]}), got {tuple(images.shape)} of {images.dtype}; "
            "to_uint8 makes them from floats in [-1, 1]"
        )
    if not bool((images == images[:, :1]).all()):
        raise ValueError("images must be grey: the three channels differ, and one of them would be judged for all")
    return images[:, :1].float() / 127.5 - 1
