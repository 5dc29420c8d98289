"""K2 in plain torch: the specification. Any dtype, any number of derivatives, forward mode too."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x: Tensor, gain: Tensor | None, eps: float, across_heads: bool) -> Tensor:
    """RMS norm of (B, L, H, d) per head, or over all heads of a token, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x * torch.rsqrt(x.square().mean((-2, -1) if across_heads else -1, keepdim=True) + eps)
    if gain is None:
        return x
    return x * gain.to(x.dtype).reshape(x.shape[-2:] if across_heads else -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs (a, b) of (B, L, H, d) turned to (a cos - b sin, a sin + b cos).

    Args:
        x: the pairs are (2i, 2i + 1) if interleaved, or else (i, i + d / 2).
        cos: (L, d / 2) or (B, L, d / 2).
        sin: as ``cos``.
        interleaved: which pairs.
    """
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def norm_rope(
    parts: list[Tensor],
    gains: list[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    across_heads: bool,
) -> Tensor:
    """Queries, or keys, of all streams: (B, sum L, H, d) in their own dtype, rounded once."""
    x = torch.cat([norm(p, g, eps, across_heads) for p, g in zip(parts, gains, strict=True)], 1)
    if cos is not None and sin is not None:
        x = rotate(x, cos, sin, interleaved)
    return x.to(parts[0].dtype)
