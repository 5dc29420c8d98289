"""K3: attention in which each block of queries sees a list of blocks of keys."""

from stepdistill.kernels.block_sparse.dispatch import block_sparse_attention
from stepdistill.kernels.block_sparse.masks import (
    BlockIndex,
    block_causal,
    lcsa,
    tile_window,
    to_index,
    to_mask,
    topk_blocks,
    window_order,
)

__all__ = [
    "BlockIndex",
    "block_causal",
    "block_sparse_attention",
    "lcsa",
    "tile_window",
    "to_index",
    "to_mask",
    "topk_blocks",
    "window_order",
]
