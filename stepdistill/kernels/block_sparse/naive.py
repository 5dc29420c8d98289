"""K3 in plain torch: the specification, one block of queries at a time. Any dtype, any number of derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.kernels.block_sparse.masks import BlockIndex, to_mask
from stepdistill.kernels.steer_attention.naive import attention


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, M, d), 0 for queries that see nothing, and natural log-sum-exp (B, H, M), -inf there."""
    mask = to_mask(blocks, -(-k.shape[2] // blocks.block))
    visible = mask.repeat_interleave(blocks.block, -1)[..., : k.shape[2]]
    made = [attention(part, k, v, visible[:, :, i, None], scale) for i, part in enumerate(q.split(blocks.block, 2))]
    return torch.cat([o for o, _ in made], 2), torch.cat([lse for _, lse in made], 2)
