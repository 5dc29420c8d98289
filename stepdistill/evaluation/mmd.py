"""Kernel distances (squared MMD) between two banks of features: KID, KID over disjoint blocks, CMMD.

Banks are float tensors (N, D); sums are taken in float64, in blocks of rows, on the device of the first bank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.evaluation.metrics import CHUNK, check_pair

Kernel = Callable[[Tensor, Tensor], Tensor]
"""(N, D), (M, D) -> (N, M)."""

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Bandwidth and factor of arXiv:2401.09603."""


def kid(real: Tensor, fake: Tensor) -> float:
    """Kernel distance: unbiased squared MMD over the whole banks, kernel ``(x.y / D + 1)^3``; arXiv:1801.01401.

    Unbiased means that equal distributions give 0 on average, so single values may be negative. The mean does not
    depend on the number of samples, unlike a Frechet distance's.

    Args:
        real: features of real samples, (N, D) float, N >= 2.
        fake: features of generated samples, (M, D) float, M >= 2.

    Raises:
        ValueError: if a bank is not finite, has fewer than two samples, or the dimensions differ.
    """
    return _unbiased(*check_pair(real, fake, 1))


def kid_blocks(real: Tensor, fake: Tensor, blocks: int = 10, seed: int = 0) -> Tensor:
    """KID of each of several disjoint blocks of both banks: independent values, whose mean is unbiased for KID.

    ``intervals.t_interval`` of them is an interval that holds what it says. The spread over 100 overlapping subsets
    that clean-fid, torch-fidelity and torchmetrics report is none: it does not fall with the number of samples.

    Args:
        real: features of real samples, (N, D) float, N >= 2 * blocks.
        fake: features of generated samples, (M, D) float, M >= 2 * blocks.
        blocks: how many; up to ``blocks - 1`` samples of each bank are left over.
        seed: of the shuffling.

    Returns:
        float64 (blocks,) on the CPU.

    Raises:
        ValueError: if a bank is not finite or too small, the dimensions differ, or there are fewer than two blocks.
    """
    if blocks < 2:
        raise ValueError(f"blocks must be at least 2, got {blocks}")
    real, fake = check_pair(real, fake, 1)
    for name, bank in (("real", real), ("fake", fake)):
        if len(bank) < 2 * blocks:
            raise ValueError(f"{blocks} blocks need at least {2 * blocks} {name} samples, got {len(bank)}")
    rng = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(len(bank), generator=rng).to(real.device) for bank in (real, fake))
    n, m = len(real) // blocks, len(fake) // blocks
    pairs = zip(rows[: n * blocks].split(n), columns[: m * blocks].split(m), strict=True)
    return torch.tensor([_unbiased(real[i], fake[j]) for i, j in pairs], dtype=torch.float64)


def cmmd(real: Tensor, fake: Tensor) -> float:
    """CMMD, arXiv:2401.09603: biased squared MMD of rows scaled to length 1, Gaussian kernel of width 10, times 1000.

    The paper's features are projected embeddings of CLIP ViT-L/14 at 336 pixels under the resize ``cmmd``; with other
    features it is a number of its own. Of the bias, about ``1000 (1 - E k) (1 / N + 1 / M)``, nothing is taken off.

    Args:
        real: features of real samples, (N, D) float, N >= 2.
        fake: features of generated samples, (M, D) float, M >= 2.

    Raises:
        ValueError: if a bank is not finite, has fewer than two samples or a zero row, or the dimensions differ.
    """
    real, fake = check_pair(real, fake, 1)
    for name, bank in (("real", real), ("fake", fake)):
        if not bool(bank.any(1).all()):
            raise ValueError(f"{name} features have a row of zeros, which has no direction")
    real, fake = (torch.nn.functional.normalize(bank, dim=1) for bank in (real, fake))
    n, m = len(real), len(fake)
    within = _sum(real, real, _gaussian) / n**2 + _sum(fake, fake, _gaussian) / m**2
    return CMMD_SCALE * (within - 2 * _sum(real, fake, _gaussian) / (n * m))


def _unbiased(real: Tensor, fake: Tensor) -> float:
    n, m = len(real), len(fake)
    within = (_sum(real, real, _cubic) - _cubic_diagonal(real)) / (n * (n - 1))
    within_fake = (_sum(fake, fake, _cubic) - _cubic_diagonal(fake)) / (m * (m - 1))
    return within + within_fake - 2 * _sum(real, fake, _cubic) / (n * m)


def _sum(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    return sum(float(kernel(rows, y).sum()) for rows in x.split(CHUNK))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def _cubic_diagonal(x: Tensor) -> float:
    return float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    """Of rows of length 1, where ``|x - y|^2 = 2 - 2 x.y``."""
    return ((x @ y.T - 1) / CMMD_SIGMA**2).exp()
