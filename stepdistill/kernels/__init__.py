"""Attention kernels for few-step students: a plain-torch specification, a Triton kernel and a dispatcher each.

Imports torch alone; Triton is imported where a kernel is launched.
"""

from stepdistill.kernels.block_sparse import BlockIndex, block_sparse_attention
from stepdistill.kernels.chunked import chunked_attention
from stepdistill.kernels.dispatch import BACKENDS, Backend, prefer
from stepdistill.kernels.merge import merge_lse
from stepdistill.kernels.qk_norm_rope import Stream, qk_norm_rope
from stepdistill.kernels.steer_attention import branch_attention, steer_attention

__all__ = [
    "BACKENDS",
    "Backend",
    "BlockIndex",
    "Stream",
    "block_sparse_attention",
    "branch_attention",
    "chunked_attention",
    "merge_lse",
    "prefer",
    "qk_norm_rope",
    "steer_attention",
]
