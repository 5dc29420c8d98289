"""K1 in Triton, forward: one program per tile of queries, all branches one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepdistill.kernels.tiles import (
    INTERPRET,
    LOG2E,
    Config,
    architecture,
    load_two,
    rows_last,
    softmax_end,
    softmax_step,
    split,
    store_two,
)

MAX_BRANCHES = 3


def config(d: int, n: int, dtype: torch.dtype, queries: int, sm: int) -> Config:
    """The launch for a head dimension, keys of the longest branch, and tiles of 128 queries over all heads.

    ``eval/attention.py --compile-only`` builds all of them for sm_80, sm_89 and sm_90: nothing spills, memory fits.
    """
    hopper = sm >= 90
    if dtype == torch.float32:  # in the interpreter alone
        return Config(32, 32, 4, 1)
    if d <= 64:
        if queries < 264:  # fewer programs than two for each multiprocessor of an H100
            pre_hopper = Config(64, 64, 4, 1) if d == 64 else Config(64, 32, 4, 2)
            return Config(64, 64, 4, 2) if hopper else pre_hopper
        return Config(128, 128, 8, 1) if hopper and n > 64 and d == 64 else Config(128, 64, 8, 2)
    if d <= 128:
        return Config(64, 64, 4, 2) if hopper or d == 128 else Config(64, 32, 4, 2)
    return Config(64, 32, 8, 2) if hopper else Config(32, 32, 4, 2)


@triton.jit
def _branch(
    q1, q2, k, v, b, h, skb, skh, skn, svb, svh, svn, n, log2_scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    W2: tl.constexpr = D2 if D2 > 0 else 16
    k += b * skb + h * skh
    v += b * svb + h * svh
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc1 = tl.zeros([BM, D1], tl.float32)
    acc2 = tl.zeros([BM, W2], tl.float32)
    for start in range(0, n, BN):
        rows = start + tl.arange(0, BN)
        m, total, acc1, acc2 = softmax_step(
            q1, q2, k, v, rows, n, skn, svn, m, total, acc1, acc2, log2_scale, D, D1, D2, INTERPRET
        )
    return softmax_end(m, total, acc1, acc2)


@triton.jit
def forward_kernel(
    q, k0, v0, k1, v1, k2, v2, weights, lengths, out, lse,
    sqb, sqh, sqm, sk0b, sk0h, sk0n, sv0b, sv0h, sv0n, sk1b, sk1h, sk1n, sv1b, sv1h, sv1n,
    sk2b, sk2h, sk2n, sv2b, sv2h, sv2n, B, H, M, N0, N1, N2, log2_scale,
    R: tl.constexpr, SEPARATE: tl.constexpr, LENGTHS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Out is laid out (S, B, M, H, D), S = R or 1: what follows is a projection over (H, D)."""
    W2: tl.constexpr = D2 if D2 > 0 else 16
    tiles = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    b = (pid // (tiles * H)).to(tl.int64)
    h = ((pid // tiles) % H).to(tl.int64)
    rows = (pid % tiles) * BM + tl.arange(0, BM)
    q1, q2 = load_two(q + b * sqb + h * sqh, rows, M, sqm, D, D1, D2)
    out += h * D
    sum1 = tl.zeros([BM, D1], tl.float32)
    sum2 = tl.zeros([BM, W2], tl.float32)
    for r in tl.static_range(R):
        if r == 0:
            k, v, skb, skh, skn, svb, svh, svn, n = k0, v0, sk0b, sk0h, sk0n, sv0b, sv0h, sv0n, N0
        elif r == 1:
            k, v, skb, skh, skn, svb, svh, svn, n = k1, v1, sk1b, sk1h, sk1n, sv1b, sv1h, sv1n, N1
        else:
            k, v, skb, skh, skn, svb, svh, svn, n = k2, v2, sk2b, sk2h, sk2n, sv2b, sv2h, sv2n, N2
        if LENGTHS:
            n = tl.minimum(n, tl.load(lengths + b * R + r))
        z1, z2, lse2 = _branch(
            q1, q2, k, v, b, h, skb, skh, skn, svb, svh, svn, n, log2_scale, BM, BN, D, D1, D2, INTERPRET
        )
        tl.store(lse + ((b + r * B) * H + h) * M + rows, lse2 * 0.6931471805599453, mask=rows < M)
        if SEPARATE:
            store_two(out + (b + r * B) * M * H * D, z1, z2, rows, M, H * D, D, D1, D2)
        else:
            w = tl.load(weights + b * R + r)
            sum1 += w * z1
            sum2 += w * z2
    if not SEPARATE:
        store_two(out + b * M * H * D, sum1, sum2, rows, M, H * D, D, D1, D2)


def empty_outputs(q: Tensor, branches: int, separate: bool) -> tuple[Tensor, Tensor]:
    """Outputs (S, B, H, M, d), in memory (S, B, M, H, d), and log-sum-exp (R, B, H, M)."""
    b, h, m, d = q.shape
    out = q.new_empty(branches if separate else 1, b, m, h, d).transpose(2, 3)
    return out, q.new_empty(branches, b, h, m, dtype=torch.float32)


def padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many as the kernel has arguments for; the rest are never read."""
    return [*tensors, *[tensors[0]] * (MAX_BRANCHES - len(tensors))]


def strides(keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[int]:
    """Of batch, head and row, for each branch's keys and values."""
    return [s for pair in zip(padded(keys), padded(values), strict=True) for x in pair for s in x.stride()[:3]]


def forward(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Tensor,
    lengths: Tensor | None,
    scale: float,
    separate: bool,
    launch: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch it; shapes as in ``dispatch``, ``launch`` instead of the table's configuration."""
    q, keys, values = rows_last(q), [rows_last(k) for k in keys], [rows_last(v) for v in values]
    out, lse = empty_outputs(q, len(keys), separate)
    if q.numel() == 0:
        return out, lse
    b, h, m, d = q.shape
    counts = [k.shape[2] for k in keys]
    c = launch or config(d, max(counts), q.dtype, b * h * triton.cdiv(m, 128), architecture(q.device))
    d1, d2 = split(d)
    pairs = [x for pair in zip(padded(keys), padded(values), strict=True) for x in pair]
    forward_kernel[(triton.cdiv(m, c.queries) * b * h,)](
        q, *pairs, weights, weights if lengths is None else lengths, out, lse,
        *q.stride()[:3], *strides(keys, values), b, h, m, *counts, *[0] * (MAX_BRANCHES - len(keys)), scale * LOG2E,
        R=len(keys), SEPARATE=separate, LENGTHS=lengths is not None, BM=c.queries, BN=c.keys, D=d, D1=d1, D2=d2,
        INTERPRET=INTERPRET, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out, lse
