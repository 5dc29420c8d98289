"""K3 for callers: checks, the choice of a backend, and the registered operator behind the Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stepdistill.kernels.block_sparse.masks import BlockIndex, to_mask
from stepdistill.kernels.block_sparse.naive import block_sparse_attention as naive_attention
from stepdistill.kernels.dispatch import Backend, choose, flex_problem, forward_mode, triton_problem, under_autocast

MAX_HEAD_DIM = 160
MAX_MASK = 8192**2
"""Pairs of tokens up to which a dense mask for SDPA is made."""


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockIndex,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    prefer: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each block of queries over its list of blocks of keys.

    Args:
        q: (B, H, M, d).
        k: (B, H, N, d).
        v: (B, H, N, d).
        blocks: the lists, by ``to_index`` of a map.
        scale: of the scores; None is d^-1/2.
        return_lse: whether to return the natural log-sum-exp too.
        prefer: the backend; None chooses.

    Returns:
        (B, H, M, d), 0 for queries that see nothing; and (B, H, M) float32 if asked for.

    Raises:
        ValueError: if shapes do not fit or ``prefer`` cannot serve.
    """
    _check(q, k, v, blocks)
    q, k, v = under_autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    m, n, size = q.shape[2], k.shape[2], blocks.block
    no_lse = "it returns no log-sum-exp" if return_lse else None
    problems: dict[Backend, str | None] = {
        "triton": _shape_problem(q, k, v) or triton_problem(q, k, v),
        "sdpa": no_lse or (f"a mask of {m} x {n} is too large" if m * n > MAX_MASK else None),
        "flex": no_lse or (f"{m} queries and {n} keys do not fill blocks of {size}" if m % size or n % size or not m * n
                           else flex_problem(q, k, v)),
        "naive": None,
    }  # fmt: skip
    shape = (*q.shape, n, size, blocks.index.shape[-1])
    backend = choose("block_sparse_attention", problems, q, shape, prefer)
    if backend == "sdpa":
        mask = to_mask(blocks, -(-n // size)).repeat_interleave(size, -1).repeat_interleave(size, -2)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask[..., :m, :n], scale=scale)
    if backend == "flex":
        return _flex(q, k, v, blocks, scale)
    if backend == "naive":
        out, lse = naive_attention(q, k, v, blocks, scale)
    else:
        out, lse = _operator(q, k, v, blocks.index, blocks.count, size, scale)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndex) -> None:
    b, h, m, d = q.shape
    if k.shape != v.shape or k.shape[:2] != (b, h) or k.shape[3] != d:
        raise ValueError(f"keys {tuple(k.shape)}, values {tuple(v.shape)}: both ({b}, {h}, N, {d}) expected")
    count = blocks.count.shape
    if count[0] not in (1, b) or count[1] not in (1, h) or count[2] != -(-m // blocks.block):
        raise ValueError(
            f"blocks.count {tuple(count)}: ({b} or 1, {h} or 1, {-(-m // blocks.block)}) expected, for {m} queries in "
            f"blocks of {blocks.block}"
        )


def _shape_problem(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]}; its tiles hold {MAX_HEAD_DIM}"
    if any(x.shape[2] * x.stride(2) >= 2**31 for x in (q, k, v)):
        return "rows of one head lie 2^31 elements apart"
    return None


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndex, scale: float) -> Tensor:
    """Flex attention, compiled on a GPU: its eager form makes all scores."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    key_blocks = k.shape[2] // blocks.block
    mask = to_mask(blocks, key_blocks).expand(len(q), q.shape[1], -1, -1)
    order = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    count = mask.sum(-1, dtype=torch.int32)
    size = blocks.block
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count), order, count, order, BLOCK_SIZE=size,
        mask_mod=lambda b, h, i, j: mask[b, h, i // size, j // size],
    )  # fmt: skip
    attend = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return attend(q, k, v, block_mask=block_mask, scale=scale)


@torch.library.custom_op("stepdistill::block_sparse_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, M, d) and log-sum-exp (B, H, M)."""
    if forward_mode():
        raise NotImplementedError(
            "stepdistill::block_sparse_attention has no forward-mode derivative; use prefer='naive'"
        )
    from stepdistill.kernels.block_sparse.triton import forward

    with torch.cuda.device_of(q):  # Triton launches on the current one
        return forward(q, k, v, BlockIndex(index, count, block), scale)


@_operator.register_fake
def _(q, k, v, index, count, block, scale):
    b, h, m, d = q.shape
    return q.new_empty(b, m, h, d).transpose(1, 2), q.new_empty(b, h, m, dtype=torch.float32)


@torch.library.custom_op("stepdistill::block_sparse_attention_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    block: int,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``triton.backward``; it has no derivative of its own, so a second one raises."""
    from stepdistill.kernels.block_sparse.triton import backward

    with torch.cuda.device_of(q):  # Triton launches on the current one
        return backward(grad, grad_lse, q, k, v, BlockIndex(index, count, block), out, lse, scale)


@_backward_operator.register_fake
def _(grad, grad_lse, q, k, v, index, count, block, out, lse, scale):
    b, h, m, d = q.shape
    return tuple(q.new_empty(b, n, h, d).transpose(1, 2) for n in (m, k.shape[2], k.shape[2]))


def _remember(ctx, inputs, output) -> None:
    q, k, v, index, count, ctx.block, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, index, count, *output)


def _backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    q, k, v, index, count, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    grads = _backward_operator(grad, grad_lse, q, k, v, index, count, ctx.block, out, lse, ctx.scale)
    return *grads, None, None, None, None


_operator.register_autograd(_backward, setup_context=_remember)
