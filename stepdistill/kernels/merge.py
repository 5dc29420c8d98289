"""One softmax over key/value segments that were attended apart: ring buffers, sinks, text beside image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_lse(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the attention over each.

    ``L = logsumexp_i L_i``, ``o = sum_i exp(L_i - L) o_i``. Differentiable where the parts are; the gradient through
    the log-sum-exp counts.

    Args:
        parts: outputs (..., M, d) and natural log-sum-exp (..., M); -inf marks a part without keys.

    Returns:
        Outputs in the first part's dtype, 0 where no part has keys, and log-sum-exp (..., M).

    Raises:
        ValueError: without parts, or if their shapes differ.
    """
    if not parts:
        raise ValueError("merge_lse: no parts; give at least one (output, log-sum-exp)")
    out = parts[0][0]
    for o, part in parts:
        if o.shape != out.shape or part.shape != o.shape[:-1]:
            raise ValueError(
                f"merge_lse: {tuple(o.shape)}, {tuple(part.shape)}; {tuple(out.shape)} and its rows expected"
            )
    all_lse = torch.stack([lse for _, lse in parts])
    top = all_lse.detach().amax(0)
    weights = torch.exp(all_lse - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(0)
    none = total == 0
    safe = total.masked_fill(none, 1.0)
    merged = sum(w[..., None] * o.to(w.dtype) for w, (o, _) in zip(weights / safe, parts, strict=True))
    return merged.to(out.dtype), top + torch.log(safe)
