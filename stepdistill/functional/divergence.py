"""Gradients of divergences between the student's and the teacher's noised distributions."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_but_batch(x: Tensor) -> Tensor:
    """Mean over all but the first dimension, kept for broadcasting: (B, ...) -> (B, 1, ..., 1)."""
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)


def dmd_gap(x0: Tensor, teacher_x0: Tensor, critic_x0: Tensor, *, normalise: bool = True) -> Tensor:
    """The direction to *subtract* from a student sample to lower KL(student || teacher) at one noise level.

    ``critic_x0 - teacher_x0`` is ``(sigma^2 / alpha)`` times the score difference of DMD (arXiv:2311.18828 eq. 7);
    dividing by ``mean |x0 - teacher_x0|`` per sample is its weight, eq. 8, without which large t would dominate.

    Args:
        x0: student samples, (B, ...).
        teacher_x0: teacher's clean estimate of the re-noised samples, (B, ...).
        critic_x0: critic's clean estimate of the same, (B, ...).
        normalise: divide by the weight; off for closed-form comparisons.

    Returns:
        (B, ...), no gradient attached. Zero per sample where critic and teacher agree.
    """
    with torch.no_grad():
        gap = critic_x0 - teacher_x0
        # The floor only matters where the teacher returns its input unchanged; there the gap is zero as well.
        return gap / mean_but_batch((x0 - teacher_x0).abs()).clamp_min(1e-6) if normalise else gap


def pull(x: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to ``x`` is ``grad / x.numel()``, so it reads like a mean squared error.

    Args:
        x: tensor with a graph, (B, ...).
        grad: the gradient to inject, (B, ...), treated as a constant.

    Returns:
        ``0.5 * mean(|x - sg(x - grad)|^2)``, a scalar; its value is half the mean square of ``grad``.
    """
    return 0.5 * (x - (x - grad).detach()).square().mean()
