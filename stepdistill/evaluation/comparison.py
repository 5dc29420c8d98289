"""Images beside images: drift of colours against a reference, and a student beside its teacher on the same noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.evaluation.features import Extractor, check_images

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness; ITU-R BT.601."""


def saturation(images: Tensor) -> Tensor:
    """Mean over pixels of largest minus smallest channel, in percent of the range: (B,) float64 of uint8 (B, 3, H, W).

    Chroma rather than HSV's ratio, which is all noise where a picture is dark. 0 is grey. Guidance that is too strong,
    and students that average, show here before they show in a Frechet distance.

    Raises:
        ValueError: if the images break the contract.
    """
    check_images(images)
    x = images.double()
    return (x.amax(1) - x.amin(1)).mean((1, 2)) / 2.55


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of brightness over an image's pixels, in percent of the range: (B,) of uint8 (B, 3, H, W).

    Raises:
        ValueError: if the images break the contract.
    """
    check_images(images)
    luma = torch.einsum("bchw,c->bhw", images.double(), torch.tensor(LUMA, dtype=torch.float64, device=images.device))
    return luma.flatten(1).std(1, correction=0) / 2.55


@dataclass(frozen=True)
class Pairs:
    """Distances of each image from its partner."""

    pixels: Tensor
    """(B,) float64: root mean squared difference over channels and pixels, in percent of the range."""
    features: Tensor | None
    """(B,) float64: Euclidean distance of features; None without an extractor."""


def paired(images: Tensor, partners: Tensor, extractor: Extractor | None = None) -> Pairs:
    """How far a student's images are from those that its teacher makes of the same noise and prompts.

    Distillation of the teacher's path should bring both down; distillation of its distribution need not. Compare two
    students by ``intervals.paired_bootstrap`` of their distances.

    Args:
        images: uint8 (B, 3, H, W).
        partners: as many of the same size, in the same order.
        extractor: for distances in features.

    Raises:
        ValueError: if the shapes differ or the images break the contract.
    """
    check_images(images)
    check_images(partners)
    if images.shape != partners.shape:
        raise ValueError(
            f"pairs need images of one number and size; got {tuple(images.shape)} and {tuple(partners.shape)}"
        )
    pixels = (images.double() - partners.to(images.device).double()).square().flatten(1).mean(1).sqrt() / 2.55
    if extractor is None:
        return Pairs(pixels.cpu(), None)
    return Pairs(pixels.cpu(), (extractor(images).double() - extractor(partners).double()).norm(dim=1).cpu())
