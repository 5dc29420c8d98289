"""K1 in plain torch: the specification. Any dtype, any number of derivatives, forward mode too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention, computed in float32 or wider.

    Args:
        q: (B, H, M, d).
        k: (B, H, N, d).
        v: (B, H, N, d).
        visible: which keys count, broadcast to (B, H, M, N); None for all.
        scale: of the scores.

    Returns:
        Outputs (B, H, M, d) in the dtype of ``q``, 0 where no key is visible, and natural log-sum-exp (B, H, M), -inf
        there.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if k.shape[-2] == 0:
        return q * 0, q.new_full(q.shape[:-1], float("-inf"), dtype=wide)
    s = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if visible is not None:
        s = s.masked_fill(~visible, float("-inf"))
    top = s.detach().amax(-1, keepdim=True)
    p = torch.exp(s - top.masked_fill(top == float("-inf"), 0.0))
    total = p.sum(-1, keepdim=True)
    none = total == 0
    safe = total.masked_fill(none, 1.0)
    lse = (top + torch.log(safe)).squeeze(-1)
    return ((p / safe) @ v.to(wide)).to(q.dtype), lse


def visible_keys(length: Tensor | None, n: int) -> Tensor | None:
    """The first ``length`` (B,) of n keys, (B, 1, 1, n)."""
    if length is None:
        return None
    return (torch.arange(n, device=length.device) < length[:, None])[:, None, None]


def branch_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over each branch by itself: outputs (R, B, H, M, d) and log-sum-exp (R, B, H, M).

    ``lengths`` (B, R) counts the visible keys of each sample and branch; None is all of them.
    """
    made = [
        attention(q, k, v, visible_keys(None if lengths is None else lengths[:, r], k.shape[-2]), scale)
        for r, (k, v) in enumerate(zip(keys, values, strict=True))
    ]
    return torch.stack([z for z, _ in made]), torch.stack([lse for _, lse in made])


def steer_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], weights: Tensor, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The branches' outputs summed with ``weights`` (B, R): (B, H, M, d), and log-sum-exp (R, B, H, M)."""
    z, lse = branch_attention(q.to(torch.promote_types(q.dtype, torch.float32)), keys, values, lengths, scale)
    return (weights.to(z.dtype).T[:, :, None, None, None] * z).sum(0).to(q.dtype), lse
