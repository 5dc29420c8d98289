"""K3 in Triton: one program per tile of queries (or of keys) walks the list of blocks on the other side."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepdistill.kernels.block_sparse.masks import BlockIndex, to_index, to_mask
from stepdistill.kernels.tiles import (
    INTERPRET,
    LOG2E,
    Config,
    architecture,
    dkv_step,
    dq_step,
    load_two,
    rows_last,
    softmax_end,
    softmax_step,
    split,
    store_two,
)


def config(d: int, block: int, dtype: torch.dtype, sm: int, step: Literal["forward", "dQ", "dKV"]) -> Config:
    """The launch; tiles divide a block. ``eval/attention.py --compile-only`` builds and checks all of them."""
    hopper = sm >= 90
    if dtype == torch.float32:  # in the interpreter alone
        c = Config(32, 32, 4, 1)
    elif step == "forward" and d > 128:
        c = Config(64, 32, 8, 2) if hopper else Config(32, 32, 8, 2)
    elif step == "forward" and d in (64, 128):
        c = Config(128, 64, 8, 2) if block == 128 else Config(64, 64 if d == 64 else 32, 4, 2)
    elif step == "forward":
        c = Config(64, 32, 4, 2) if hopper and d > 64 else Config(64, 64, 4, 2) if d < 64 else Config(64, 64, 8, 1)
    elif d > 128:
        c = Config(32, 16, 4 if step == "dKV" and hopper else 8, 1)
    elif d <= 64:
        c = Config(64, 64, 4, 1) if hopper else Config(64, 32, 4 if step == "dQ" and d == 64 else 8, 1)
    elif step == "dKV" and hopper and d < 128:
        c = Config(32, 64, 4, 1)
    else:
        c = Config(64, 32, 4 if step == "dKV" and not hopper else 8, 1)
    return c._replace(queries=min(c.queries, block), keys=min(c.keys, block))


@triton.jit
def _place(tiles, H, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Sample, head, block and rows of this program."""
    pid = tl.program_id(0)
    b = (pid // (tiles * H)).to(tl.int64)
    h = ((pid // tiles) % H).to(tl.int64)
    tile = pid % tiles
    return b, h, tile // (BLOCK // TILE), tile * TILE + tl.arange(0, TILE)


@triton.jit
def forward_kernel(
    q, k, v, index, count, out, lse, sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sib, sih, sii, scb, sch,
    H, M, N, log2_scale,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Out is laid out (B, M, H, D)."""
    W2: tl.constexpr = D2 if D2 > 0 else 16
    b, h, i, rows = _place(tl.cdiv(M, BM), H, BLOCK, BM)
    q1, q2 = load_two(q + b * sqb + h * sqh, rows, M, sqm, D, D1, D2)
    k += b * skb + h * skh
    v += b * svb + h * svh
    index += b * sib + h * sih + i * sii
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc1 = tl.zeros([BM, D1], tl.float32)
    acc2 = tl.zeros([BM, W2], tl.float32)
    for j in range(0, tl.load(count + b * scb + h * sch + i)):
        start = tl.load(index + j) * BLOCK
        for part in range(0, BLOCK, BN):  # the first part of a block has a key; later ones may lie beyond the end
            keys = start + part + tl.arange(0, BN)
            m, total, acc1, acc2 = softmax_step(
                q1, q2, k, v, keys, N, skn, svn, m, total, acc1, acc2, log2_scale, D, D1, D2, INTERPRET
            )
    o1, o2, lse2 = softmax_end(m, total, acc1, acc2)
    tl.store(lse + (b * H + h) * M + rows, lse2 * 0.6931471805599453, mask=rows < M)
    store_two(out + b * M * H * D + h * D, o1, o2, rows, M, H * D, D, D1, D2)


@triton.jit
def dq_kernel(
    q, k, v, index, count, lse, delta, do, dq, sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sgb, sgh, sgm,
    sib, sih, sii, scb, sch, H, M, N, scale, log2_scale,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """DQ (B, M, H, D); delta is rowsum(dO O) - dLSE."""
    W2: tl.constexpr = D2 if D2 > 0 else 16
    b, h, i, rows = _place(tl.cdiv(M, BM), H, BLOCK, BM)
    q1, q2 = load_two(q + b * sqb + h * sqh, rows, M, sqm, D, D1, D2)
    do1, do2 = load_two(do + b * sgb + h * sgh, rows, M, sgm, D, D1, D2)
    at = (b * H + h) * M + rows
    lse2 = tl.load(lse + at, mask=rows < M, other=float("-inf")) * 1.4426950408889634
    less = tl.load(delta + at, mask=rows < M, other=0.0)
    k += b * skb + h * skh
    v += b * svb + h * svh
    index += b * sib + h * sih + i * sii
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, W2], tl.float32)
    for j in range(0, tl.load(count + b * scb + h * sch + i)):
        start = tl.load(index + j) * BLOCK
        for part in range(0, BLOCK, BN):
            keys = start + part + tl.arange(0, BN)
            dq1, dq2 = dq_step(
                q1, q2, do1, do2, k, v, keys, N, skn, svn, lse2, less, 1.0, dq1, dq2, scale, log2_scale,
                D, D1, D2, INTERPRET,
            )  # fmt: skip
    store_two(dq + b * M * H * D + h * D, dq1, dq2, rows, M, H * D, D, D1, D2)


@triton.jit
def dkv_kernel(
    q, k, v, index, count, lse, delta, do, dk, dv, sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sgb, sgh, sgm,
    sib, sih, sii, scb, sch, H, M, N, scale, log2_scale,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """DK and dV (B, N, H, D); ``index`` lists the blocks of queries that see each block of keys."""
    W2: tl.constexpr = D2 if D2 > 0 else 16
    b, h, i, keys = _place(tl.cdiv(N, BN), H, BLOCK, BN)
    k1, k2 = load_two(k + b * skb + h * skh, keys, N, skn, D, D1, D2)
    v1, v2 = load_two(v + b * svb + h * svh, keys, N, svn, D, D1, D2)
    index += b * sib + h * sih + i * sii
    q += b * sqb + h * sqh
    do += b * sgb + h * sgh
    dk1 = tl.zeros([BN, D1], tl.float32)
    dv1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, W2], tl.float32)
    dv2 = tl.zeros([BN, W2], tl.float32)
    for j in range(0, tl.load(count + b * scb + h * sch + i)):
        start = tl.load(index + j) * BLOCK
        for part in range(0, BLOCK, BM):
            rows = start + part + tl.arange(0, BM)
            at = (b * H + h) * M + rows
            lse2 = tl.load(lse + at, mask=rows < M, other=float("-inf")) * 1.4426950408889634
            less = tl.load(delta + at, mask=rows < M, other=0.0)
            dk1, dk2, dv1, dv2 = dkv_step(
                k1, k2, v1, v2, keys, N, q, do, rows, M, sqm, sgm, lse2, less, 1.0, dk1, dk2, dv1, dv2, scale,
                log2_scale, D, D1, D2, INTERPRET,
            )  # fmt: skip
    at = b * N * H * D + h * D
    store_two(dk + at, dk1, dk2, keys, N, H * D, D, D1, D2)
    store_two(dv + at, dv1, dv2, keys, N, H * D, D, D1, D2)


def _list_strides(blocks: BlockIndex) -> tuple[int, ...]:
    """Of samples, heads and rows; 0 where one list serves all."""
    si, sc = blocks.index.stride(), blocks.count.stride()
    shared = [n == 1 for n in blocks.count.shape[:2]]
    b, h = (0 if s else 1 for s in shared)
    return b * si[0], h * si[1], si[2], b * sc[0], h * sc[1]


def _contiguous(blocks: BlockIndex) -> BlockIndex:
    return BlockIndex(blocks.index.contiguous(), blocks.count.contiguous(), blocks.block)


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Launch it; shapes as in ``dispatch``."""
    q, k, v, blocks = rows_last(q), rows_last(k), rows_last(v), _contiguous(blocks)
    b, h, m, d = q.shape
    c, (d1, d2) = config(d, blocks.block, q.dtype, architecture(q.device), "forward"), split(d)
    out = q.new_empty(b, m, h, d).transpose(1, 2)
    lse = q.new_empty(b, h, m, dtype=torch.float32)
    if q.numel():
        forward_kernel[(triton.cdiv(m, c.queries) * b * h,)](
            q, k, v, blocks.index, blocks.count, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *_list_strides(blocks), h, m, k.shape[2], scale * LOG2E, BLOCK=blocks.block, BM=c.queries, BN=c.keys,
            D=d, D1=d1, D2=d2, INTERPRET=INTERPRET, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, blocks: BlockIndex, out: Tensor,
    lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """DQ, dK, dV."""
    delta = (grad.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    q, k, v, grad, delta = rows_last(q), rows_last(k), rows_last(v), rows_last(grad), delta.contiguous()
    b, h, m, d = q.shape
    n = k.shape[2]
    dq = q.new_empty(b, m, h, d).transpose(1, 2)
    dk, dv = (q.new_zeros(b, n, h, d).transpose(1, 2) for _ in range(2))
    if not q.numel() or not n:
        return dq.zero_(), dk, dv
    mirrored = to_mask(blocks, triton.cdiv(n, blocks.block)).transpose(-1, -2)
    mirrored = to_index(mirrored, blocks.block, longest=mirrored.shape[-1])
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3]]
    d1, d2 = split(d)
    shared = {"BLOCK": blocks.block, "D": d, "D1": d1, "D2": d2, "INTERPRET": INTERPRET}
    at_q, at_k = (config(d, blocks.block, q.dtype, architecture(q.device), step) for step in ("dQ", "dKV"))
    rows, columns = _contiguous(blocks), _contiguous(mirrored)
    dq_kernel[(triton.cdiv(m, at_q.queries) * b * h,)](
        q, k, v, rows.index, rows.count, lse, delta, grad, dq, *strides, *_list_strides(rows), h, m, n,
        scale, scale * LOG2E, BM=at_q.queries, BN=at_q.keys, num_warps=at_q.warps, num_stages=at_q.stages, **shared,
    )  # fmt: skip
    dkv_kernel[(triton.cdiv(n, at_k.keys) * b * h,)](
        q, k, v, columns.index, columns.count, lse, delta, grad, dk, dv, *strides, *_list_strides(columns), h, m, n,
        scale, scale * LOG2E, BM=at_k.queries, BN=at_k.keys, num_warps=at_k.warps, num_stages=at_k.stages, **shared,
    )  # fmt: skip
    return dq, dk, dv
