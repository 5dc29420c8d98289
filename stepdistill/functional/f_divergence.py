"""f-divergences: how each weights the gradient of the reverse KL by the ratio of the two densities."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

FDivergence = Literal["rkl", "kl", "js", "sh", "neyman", "jeffreys", "softened"]
"""Reverse and forward KL, Jensen-Shannon, squared Hellinger, Neyman's chi^2, Jeffreys, softened reverse KL."""


def f_weight(ratio: Tensor, kind: FDivergence) -> Tensor:
    """``h(r) = r^2 f''(r)``: the gradient of ``E_q[f(p / q)]`` is that of KL(q || p), weighted by it point by point.

    (arXiv:2502.15681 theorem 1.) What grows with r cares for what the student misses, what falls with r for what it
    should not have made. The f that each stands for, up to linear terms:

    ========  ====================================
    rkl       ``-log r``
    kl        ``r log r``
    js        ``r log r - (1 + r) log((1 + r) / 2)``
    sh        ``2 (1 - sqrt r)^2``
    neyman    ``(1 - r)^2 / (2 r)``
    jeffreys  ``(r - 1) log r``
    softened  ``(1 + r) log((1 + r) / r)``
    ========  ====================================

    Args:
        ratio: r = p / q, the teacher's density over the student's; any shape, above 0.
        kind: which divergence.

    Returns:
        The weight, as ``ratio``.

    Raises:
        ValueError: if ``kind`` is none of them.
    """
    if kind == "rkl":
        return ratio.new_ones(ratio.shape)
    if kind == "kl":
        return ratio
    if kind == "js":
        return ratio / (1 + ratio)
    if kind == "sh":
        return ratio.sqrt()
    if kind == "neyman":
        return 1 / ratio
    if kind == "jeffreys":
        return 1 + ratio
    if kind == "softened":
        return 1 / (1 + ratio)
    raise ValueError(f"divergence must be rkl, kl, js, sh, neyman, jeffreys or softened; got {kind!r}")
