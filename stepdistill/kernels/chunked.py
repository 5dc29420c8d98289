"""Attention a few queries at a time: memory of the scores (chunk, N) rather than (M, N).

For one wide head, such as a VAE's middle block (d = 512), which no fused kernel takes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk: int = 1024, scale: float | None = None) -> Tensor:
    """``softmax(q k' scale) v``, ``chunk`` queries at a time.

    Args:
        q: (B, H, M, d).
        k: (B, H, N, d).
        v: (B, H, N, d).
        chunk: queries at a time; 16 384 keys in bfloat16 take 32 MB of scores per head at 1024.
        scale: of the scores; None is d^-1/2.

    Returns:
        (B, H, M, d).

    Raises:
        ValueError: if ``chunk`` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk {chunk}: at least 1 query at a time")
    parts = [scaled_dot_product_attention(part, k, v, scale=scale) for part in q.split(chunk, -2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)
