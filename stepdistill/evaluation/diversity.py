"""Diversity: of one bank of features (Vendi), and between seeds for the same prompt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stepdistill.evaluation.metrics import check_bank

PerceptualNetwork = Callable[[Tensor, Tensor], Tensor]
"""Two batches of float images (B, 3, H, W) in [-1, 1] -> distances, (B,) or anything with B elements; LPIPS is one."""


def vendi(features: Tensor) -> float:
    """Vendi score, arXiv:2210.02410: the effective number of different samples, 1 to N, under cosine similarity.

    The exponential of the entropy of the eigenvalues of ``X X^T / N`` with rows of length 1; for N > D those of
    ``X^T X / N``, which are the same but for zeros. It cannot exceed D: read it beside that of real images.

    Args:
        features: (N, D) float, N >= 1.

    Raises:
        ValueError: if the bank is empty, not finite, or has a row of zeros.
    """
    check_bank("features", features)
    if not len(features) or not bool(features.any(1).all()):
        raise ValueError(f"features need at least one row and none of zeros, got {tuple(features.shape)}")
    x = normalize(features.double(), dim=1)
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    shares = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)
    return float(torch.special.entr(shares).sum().exp())


def vendi_per_prompt(features: Tensor) -> Tensor:
    """Vendi score over the seeds of each prompt.

    Args:
        features: (S, P, D), one bank of P prompts for each of S seeds.

    Returns:
        float64 (P,), from 1, seeds alike, to S.

    Raises:
        ValueError: if the shape is another, or a bank is not finite.
    """
    _check_seeds(features, 3)
    return torch.tensor([vendi(seeds) for seeds in features.unbind(1)], dtype=torch.float64)


def seed_diversity(features: Tensor) -> Tensor:
    """Mean Euclidean distance between the seeds of each prompt, over all pairs of seeds.

    Args:
        features: (S, P, D), one bank of P prompts for each of S >= 2 seeds; normalise rows for cosine-like distances.

    Returns:
        float64 (P,); bootstrap over prompts for error bars.

    Raises:
        ValueError: if the shape is another, or a feature is not finite.
    """
    _check_seeds(features, 3)
    check_bank("features", features.flatten(0, 1))
    pairs = list(combinations(features.double().unbind(0), 2))
    return torch.stack([(a - b).norm(dim=1) for a, b in pairs]).mean(0).cpu()


@torch.no_grad()
def perceptual_diversity(images: Tensor, network: PerceptualNetwork, batch_size: int = 64) -> Tensor:
    """Mean perceptual distance between the seeds of each prompt, over all pairs of seeds.

    The network is the caller's, for example torchmetrics' or lpips' LPIPS with local weights; nothing is fetched. It
    gets images in [-1, 1]: DMD2's script feeds [0, 1] after resizing to 512, and its numbers compare with none.

    Args:
        images: uint8 (S, P, 3, H, W), P prompts for each of S >= 2 seeds.
        network: see ``PerceptualNetwork``.
        batch_size: pairs at once.

    Returns:
        float64 (P,) on the CPU.

    Raises:
        ValueError: if the images break the contract, or the network returns other than one number a pair.
    """
    _check_seeds(images, 5)
    if images.dtype != torch.uint8 or images.shape[2] != 3:
        raise ValueError(f"images must be uint8 (S, P, 3, H, W), got {tuple(images.shape)} of {images.dtype}")
    rows = []
    for a, b in combinations(images.unbind(0), 2):
        parts = []
        for x, y in zip(a.split(batch_size), b.split(batch_size), strict=True):
            distances = network(x.float() / 127.5 - 1, y.float() / 127.5 - 1)
            if distances.numel() != len(x):
                raise ValueError(
                    f"the network must return one distance a pair, {len(x)}; got {tuple(distances.shape)} "
                    "(LPIPS modules average unless told otherwise: reduction='none')"
                )
            parts.append(distances.double().flatten().cpu())
        rows.append(torch.cat(parts))
    return torch.stack(rows).mean(0)


def _check_seeds(stack: Tensor, dims: int) -> None:
    if stack.ndim != dims or len(stack) < 2:
        raise ValueError(f"need at least two seeds, (S, P, ...) with {dims} dimensions; got {tuple(stack.shape)}")
