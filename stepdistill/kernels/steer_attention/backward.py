"""K1 in Triton, backward: probabilities come again from the log-sum-exp, nothing but that is kept.

With g = dO . Z per query row (which sums to dw) and delta = w g - dLSE:
dS = P (w dO V' - delta) scale, dQ = dS K, dK = dS' Q, dV = w P' dO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepdistill.kernels.steer_attention.triton import MAX_BRANCHES, padded, strides
from stepdistill.kernels.tiles import (
    INTERPRET,
    LOG2E,
    Config,
    architecture,
    dkv_step,
    dq_step,
    load_two,
    probabilities,
    products,
    rows_last,
    split,
    store_two,
)

TARGET_PROGRAMS = 264
"""Two for each multiprocessor of an H100: long rows of queries are split until there are so many."""


def config(d: int, dtype: torch.dtype, sm: int, step: Literal["dQ", "dKV"]) -> Config:
    """The launch of either kernel; built and checked as the forward pass's."""
    if dtype == torch.float32:  # in the interpreter alone
        return Config(32, 32, 4, 1)
    if d <= 64:
        return Config(64, 64, 4, 1) if sm >= 90 else Config(64 if step == "dQ" else 32, 32, 4, 1)
    if d <= 128:
        return Config(32, 64, 4, 1) if step == "dKV" and sm >= 90 and d < 128 else Config(64, 32, 8, 1)
    return Config(32, 16, 8, 1)


@triton.jit
def _branch_dq(
    q1, q2, do1, do2, dq1, dq2, k, v, b, h, skb, skh, skn, svb, svh, svn, n, lse2, dlse, w, scale, log2_scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    k += b * skb + h * skh
    v += b * svb + h * svh
    g = tl.zeros([BM], tl.float32)
    for start in range(0, n, BN):
        rows = start + tl.arange(0, BN)
        k1, k2 = load_two(k, rows, n, skn, D, D1, D2)
        v1, v2 = load_two(v, rows, n, svn, D, D1, D2)
        p = probabilities(q1, q2, k1, k2, lse2, rows, n, log2_scale, D2, INTERPRET)
        g += tl.sum(p * products(do1, do2, v1, v2, D2, INTERPRET), 1)
    for start in range(0, n, BN):
        rows = start + tl.arange(0, BN)
        dq1, dq2 = dq_step(
            q1, q2, do1, do2, k, v, rows, n, skn, svn, lse2, w * g - dlse, w, dq1, dq2, scale, log2_scale,
            D, D1, D2, INTERPRET,
        )  # fmt: skip
    return dq1, dq2, g


@triton.jit
def dq_kernel(
    q, k0, v0, k1, v1, k2, v2, weights, lengths, lse, do, dlse, dq, g,
    sqb, sqh, sqm, sk0b, sk0h, sk0n, sv0b, sv0h, sv0n, sk1b, sk1h, sk1n, sv1b, sv1h, sv1n,
    sk2b, sk2h, sk2n, sv2b, sv2h, sv2n, sgb, sgh, sgm, sgr, B, H, M, N0, N1, N2, scale, log2_scale,
    R: tl.constexpr, SEPARATE: tl.constexpr, LENGTHS: tl.constexpr, DLSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """DQ (B, M, H, D) and g (R, B, H, M), one program per tile of queries."""
    W2: tl.constexpr = D2 if D2 > 0 else 16
    tiles = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    b = (pid // (tiles * H)).to(tl.int64)
    h = ((pid // tiles) % H).to(tl.int64)
    rows = (pid % tiles) * BM + tl.arange(0, BM)
    q1, q2 = load_two(q + b * sqb + h * sqh, rows, M, sqm, D, D1, D2)
    do += b * sgb + h * sgh
    do1, do2 = load_two(do, rows, M, sgm, D, D1, D2)
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, W2], tl.float32)
    for r in tl.static_range(R):
        if r == 0:
            k, v, skb, skh, skn, svb, svh, svn, n = k0, v0, sk0b, sk0h, sk0n, sv0b, sv0h, sv0n, N0
        elif r == 1:
            k, v, skb, skh, skn, svb, svh, svn, n = k1, v1, sk1b, sk1h, sk1n, sv1b, sv1h, sv1n, N1
        else:
            k, v, skb, skh, skn, svb, svh, svn, n = k2, v2, sk2b, sk2h, sk2n, sv2b, sv2h, sv2n, N2
        if LENGTHS:
            n = tl.minimum(n, tl.load(lengths + b * R + r))
        if SEPARATE:
            w = 1.0
            if r > 0:
                do1, do2 = load_two(do + r * sgr, rows, M, sgm, D, D1, D2)
        else:
            w = tl.load(weights + b * R + r)
        at = ((b + r * B) * H + h) * M + rows  # B may be the constant 1, which has no .to
        lse2 = tl.load(lse + at, mask=rows < M, other=float("-inf")) * 1.4426950408889634
        extra = tl.zeros([BM], tl.float32)
        if DLSE:
            extra = tl.load(dlse + at, mask=rows < M, other=0.0)
        dq1, dq2, g_r = _branch_dq(
            q1, q2, do1, do2, dq1, dq2, k, v, b, h, skb, skh, skn, svb, svh, svn, n, lse2, extra, w, scale, log2_scale,
            BM, BN, D, D1, D2, INTERPRET,
        )  # fmt: skip
        tl.store(g + at, g_r, mask=rows < M)
    store_two(dq + b * M * H * D + h * D, dq1, dq2, rows, M, H * D, D, D1, D2)


@triton.jit
def dkv_kernel(
    q, k, v, weights, lengths, lse, do, dlse, g, dk, dv,
    sqb, sqh, sqm, skb, skh, skn, svb, svh, svn, sgb, sgh, sgm, B, H, M, N, part, scale, log2_scale,
    R: tl.constexpr, BRANCH: tl.constexpr, SEPARATE: tl.constexpr, LENGTHS: tl.constexpr, DLSE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """DK and dV (parts, B, H, N, D) of one branch, float32; a program sums over ``part`` queries for a tile of keys.

    ``lse``, ``dlse`` and ``g`` are this branch's (B, H, M). Parts are summed outside: the same result every time.
    """
    W2: tl.constexpr = D2 if D2 > 0 else 16
    tiles = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    split_at = (pid // (tiles * H * B)).to(tl.int64)
    b = ((pid // (tiles * H)) % B).to(tl.int64)
    h = ((pid // tiles) % H).to(tl.int64)
    keys = (pid % tiles) * BN + tl.arange(0, BN)
    n = N
    if LENGTHS:
        n = tl.minimum(n, tl.load(lengths + b * R + BRANCH))
    w = 1.0 if SEPARATE else tl.load(weights + b * R + BRANCH)
    k1, k2 = load_two(k + b * skb + h * skh, keys, n, skn, D, D1, D2)
    v1, v2 = load_two(v + b * svb + h * svh, keys, n, svn, D, D1, D2)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dv1 = tl.zeros([BN, D1], tl.float32)
    dk2 = tl.zeros([BN, W2], tl.float32)
    dv2 = tl.zeros([BN, W2], tl.float32)
    end = tl.minimum(M, (split_at + 1) * part)
    for start in range(split_at * part, end, BM):
        rows = start + tl.arange(0, BM)
        at = (b * H + h) * M + rows
        lse2 = tl.load(lse + at, mask=rows < end, other=float("-inf")) * 1.4426950408889634
        delta = w * tl.load(g + at, mask=rows < end, other=0.0)
        if DLSE:
            delta -= tl.load(dlse + at, mask=rows < end, other=0.0)
        dk1, dk2, dv1, dv2 = dkv_step(
            k1, k2, v1, v2, keys, n, q + b * sqb + h * sqh, do + b * sgb + h * sgh, rows, end, sqm, sgm, lse2, delta, w,
            dk1, dk2, dv1, dv2, scale, log2_scale, D, D1, D2, INTERPRET,
        )  # fmt: skip
    at = ((split_at * B + b) * H + h) * N * D
    store_two(dk + at, dk1, dk2, keys, N, D, D, D1, D2)
    store_two(dv + at, dv1, dv2, keys, N, D, D, D1, D2)


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Tensor,
    lengths: Tensor | None,
    lse: Tensor,
    scale: float,
    separate: bool,
    need_kv: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """DQ, dK and dV of each branch (empty lists unless ``need_kv``), and g (R, B, H, M).

    ``grad`` (S, B, H, M, d) and ``grad_lse`` (R, B, H, M) or None are of the forward pass's answers.
    """
    q, keys, values = rows_last(q), [rows_last(k) for k in keys], [rows_last(v) for v in values]
    grad = rows_last(grad)
    b, h, m, d = q.shape
    at_q, at_k = (config(d, q.dtype, architecture(q.device), step) for step in ("dQ", "dKV"))
    d1, d2 = split(d)
    dq = q.new_empty(b, m, h, d).transpose(1, 2)
    g = torch.zeros_like(lse)
    dlse = lse if grad_lse is None else grad_lse.contiguous()
    counts = [k.shape[2] for k in keys]
    limits = weights if lengths is None else lengths
    shared = {
        "R": len(keys), "SEPARATE": separate, "LENGTHS": lengths is not None, "DLSE": grad_lse is not None,
        "D": d, "D1": d1, "D2": d2, "INTERPRET": INTERPRET,
    }  # fmt: skip
    if q.numel():
        pairs = [x for pair in zip(padded(keys), padded(values), strict=True) for x in pair]
        dq_kernel[(triton.cdiv(m, at_q.queries) * b * h,)](
            q, *pairs, weights, limits, lse, grad, dlse, dq, g,
            *q.stride()[:3], *strides(keys, values), *grad.stride()[1:4], grad.stride(0), b, h, m,
            *counts, *[0] * (MAX_BRANCHES - len(keys)), scale, scale * LOG2E,
            BM=at_q.queries, BN=at_q.keys, num_warps=at_q.warps, num_stages=at_q.stages, **shared,
        )  # fmt: skip
    dk, dv = [], []
    for r, (k, v) in enumerate(zip(keys, values, strict=True) if need_kv else ()):
        tiles = triton.cdiv(k.shape[2], at_k.keys) * b * h
        parts = max(1, min(triton.cdiv(m, at_k.queries), triton.cdiv(TARGET_PROGRAMS, max(tiles, 1))))
        part = triton.cdiv(triton.cdiv(m, parts), at_k.queries) * at_k.queries
        sums = q.new_zeros if q.numel() == 0 else q.new_empty
        dk_r, dv_r = (sums(parts, *k.shape, dtype=torch.float32) for _ in range(2))
        if q.numel() and k.numel():
            out = grad[r if separate else 0]
            dkv_kernel[(tiles * parts,)](
                q, k, v, weights, limits, lse[r], out, dlse[r], g[r], dk_r, dv_r,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                b, h, m, k.shape[2], part, scale, scale * LOG2E, BRANCH=r,
                BM=at_k.queries, BN=at_k.keys, num_warps=at_k.warps, num_stages=at_k.stages, **shared,
            )  # fmt: skip
        dk.append(dk_r.sum(0).to(q.dtype))
        dv.append(dv_r.sum(0).to(q.dtype))
    return dq, dk, dv, g
