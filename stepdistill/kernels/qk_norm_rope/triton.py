"""K2 in Triton: one launch a stream reads q, k, v once and writes them to their rows of the joint sequence.

A program takes BT tokens of one head, or one token over all heads. A tile holds the first halves of the pairs and the
second halves, (BT, P) each; pair i of a row belongs to head i // (d / 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Elements of a tile, so that two warps to eight read 16 bytes a lane."""


@triton.jit
def load_pairs(base, rows, mask, stride_l, stride_h, PAIRS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
               INTERLEAVED: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Both halves (BT, P) of the pairs, float32."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * P)
        at = base + rows[:, None] * stride_l + ((cols // D) * stride_h + cols % D)[None, :]
        x = tl.load(at, mask=mask[:, None] & (cols < 2 * PAIRS)[None, :], other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [BT, P, 2]))
    else:
        i = tl.arange(0, P)
        at = base + rows[:, None] * stride_l + ((i // (D // 2)) * stride_h + i % (D // 2))[None, :]
        both = mask[:, None] & (i < PAIRS)[None, :]
        a = tl.load(at, mask=both, other=0.0).to(tl.float32)
        b = tl.load(at + D // 2, mask=both, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(base, a, b, rows, mask, stride_l, stride_h, PAIRS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
                INTERLEAVED: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """The inverse of ``load_pairs``, rounded to what ``base`` points to."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * P)
        at = base + rows[:, None] * stride_l + ((cols // D) * stride_h + cols % D)[None, :]
        x = tl.reshape(tl.join(a, b), [BT, 2 * P])
        tl.store(at, x.to(base.dtype.element_ty), mask=mask[:, None] & (cols < 2 * PAIRS)[None, :])
    else:
        i = tl.arange(0, P)
        at = base + rows[:, None] * stride_l + ((i // (D // 2)) * stride_h + i % (D // 2))[None, :]
        both = mask[:, None] & (i < PAIRS)[None, :]
        tl.store(at, a.to(base.dtype.element_ty), mask=both)
        tl.store(at + D // 2, b.to(base.dtype.element_ty), mask=both)


@triton.jit
def load_angles(cos, sin, rows, mask, stride_l, stride_d, PAIRS: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Cosines and sines (BT, P) of the rows, the same for every head."""
    i = tl.arange(0, P)
    at = rows[:, None] * stride_l + ((i % (D // 2)) * stride_d)[None, :]
    both = mask[:, None] & (i < PAIRS)[None, :]
    return tl.load(cos + at, mask=both, other=1.0), tl.load(sin + at, mask=both, other=0.0)


@triton.jit
def _normed(a, b, eps, COUNT: tl.constexpr):
    r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / COUNT + eps)[:, None]
    return a * r, b * r, r


@triton.jit
def forward_kernel(
    q, k, v, gq, gk, cos, sin, oq, ok, ov, sqb, sql, sqh, skb, skl, skh, svb, svl, svh, sob, sol, soh,
    scb, scl, scd, H, L, first, eps,
    ROPE: tl.constexpr, COPY: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    INTERLEAVED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``first + L`` of the outputs (B, joint, H, D), which share their strides."""
    tiles = tl.cdiv(L, BT)
    groups = H * D // (2 * PAIRS)
    pid = tl.program_id(0)
    b = (pid // (tiles * groups)).to(tl.int64)
    h = ((pid // tiles) % groups).to(tl.int64)
    rows = (pid % tiles) * BT + tl.arange(0, BT)
    mask = rows < L
    at = b * sob + h * soh + first * sol
    one = tl.zeros([1], tl.int32)
    if ROPE:
        c, s = load_angles(cos + b * scb, sin + b * scb, first + rows, mask, scl, scd, PAIRS, P, D)
    for which in tl.static_range(2):
        if which == 0:
            x, gain, o, sib, sil, sih = q, gq, oq, sqb, sql, sqh
        else:
            x, gain, o, sib, sil, sih = k, gk, ok, skb, skl, skh
        xa, xb = load_pairs(x + b * sib + h * sih, rows, mask, sil, sih, PAIRS, P, D, INTERLEAVED, BT)
        ga, gb = load_pairs(gain, one, one == 0, 0, D, PAIRS, P, D, INTERLEAVED, 1)
        xa, xb, _ = _normed(xa, xb, eps, 2 * PAIRS)
        xa *= ga
        xb *= gb
        if ROPE:
            xa, xb = xa * c - xb * s, xa * s + xb * c
        store_pairs(o + at, xa, xb, rows, mask, sol, soh, PAIRS, P, D, INTERLEAVED, BT)
    if COPY:
        va, vb = load_pairs(v + b * svb + h * svh, rows, mask, svl, svh, PAIRS, P, D, INTERLEAVED, BT)
        store_pairs(ov + at, va, vb, rows, mask, sol, soh, PAIRS, P, D, INTERLEAVED, BT)


@triton.jit
def backward_kernel(
    x, gain, cos, sin, dy, dx, dgain, sib, sil, sih, syb, syl, syh, sob, sol, soh, scb, scl, scd, H, L, first, eps,
    ROPE: tl.constexpr, DGAIN: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    INTERLEAVED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``dn = R(-theta) dy``, ``dgain = sum dn u``, ``dx = r (du - u mean(du u))`` with ``u = x r``, ``du = dn gain``.

    Each program leaves its part of dgain (programs, 2 PAIRS), to be summed outside: the same result every time.
    """
    tiles = tl.cdiv(L, BT)
    groups = H * D // (2 * PAIRS)
    pid = tl.program_id(0)
    b = (pid // (tiles * groups)).to(tl.int64)
    h = ((pid // tiles) % groups).to(tl.int64)
    rows = (pid % tiles) * BT + tl.arange(0, BT)
    mask = rows < L
    one = tl.zeros([1], tl.int32)
    dy += b * syb + h * syh + first * syl
    ua, ub = load_pairs(x + b * sib + h * sih, rows, mask, sil, sih, PAIRS, P, D, INTERLEAVED, BT)
    ya, yb = load_pairs(dy, rows, mask, syl, syh, PAIRS, P, D, INTERLEAVED, BT)
    ga, gb = load_pairs(gain, one, one == 0, 0, D, PAIRS, P, D, INTERLEAVED, 1)
    if ROPE:
        c, s = load_angles(cos + b * scb, sin + b * scb, first + rows, mask, scl, scd, PAIRS, P, D)
        ya, yb = ya * c + yb * s, yb * c - ya * s
    ua, ub, r = _normed(ua, ub, eps, 2 * PAIRS)
    if DGAIN:
        part_a = tl.sum(ya * ua, 0)[None, :]
        part_b = tl.sum(yb * ub, 0)[None, :]
        at = dgain + pid.to(tl.int64) * 2 * PAIRS
        store_pairs(at, part_a, part_b, one, one == 0, 0, D, PAIRS, P, D, INTERLEAVED, 1)
    ya *= ga
    yb *= gb
    mean = ((tl.sum(ya * ua, 1) + tl.sum(yb * ub, 1)) / (2 * PAIRS))[:, None]
    xa = r * (ya - ua * mean)
    xb = r * (yb - ub * mean)
    store_pairs(dx + b * sob + h * soh, xa, xb, rows, mask, sol, soh, PAIRS, P, D, INTERLEAVED, BT)


def geometry(heads: int, d: int, length: int, across_heads: bool) -> tuple[dict[str, int], int]:
    """Constants of a launch, and its number of programs per sample."""
    pairs = (heads if across_heads else 1) * d // 2
    p = triton.next_power_of_2(pairs)
    bt = max(1, min(TILE // (2 * p), triton.next_power_of_2(max(length, 1))))
    made = {"PAIRS": pairs, "P": p, "D": d, "BT": bt, "num_warps": 8 if p > 2048 else 4}
    return made, triton.cdiv(length, bt) * (heads * d // (2 * pairs))


def _angles(cos: Tensor | None, sin: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    if cos is None or sin is None:
        return like, like, (0, 0, 0)
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    return cos, sin, (cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2), cos.stride(-1))


def forward(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], q_gains: Sequence[Tensor], k_gains: Sequence[Tensor],
    cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool, across_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch it for each stream; shapes as in ``dispatch``, ``v`` may be empty."""
    b, _, h, d = q[0].shape
    length = sum(x.shape[1] for x in q)
    oq, ok = (q[0].new_empty(b, length, h, d) for _ in range(2))
    ov = q[0].new_empty((b, length, h, d) if v else (0,))
    cos, sin, angle_strides = _angles(cos, sin, q[0])
    first = 0
    for n, (xq, xk, gq, gk) in enumerate(zip(q, k, q_gains, k_gains, strict=True)):
        xv = v[n] if v else xq
        xq, xk, xv = (x if x.stride(-1) == 1 else x.contiguous() for x in (xq, xk, xv))
        constants, programs = geometry(h, d, xq.shape[1], across_heads)
        if programs * b:
            forward_kernel[(programs * b,)](
                xq, xk, xv, gq, gk, cos, sin, oq, ok, ov, *xq.stride()[:3], *xk.stride()[:3], *xv.stride()[:3],
                *oq.stride()[:3], *angle_strides, h, xq.shape[1], first, eps,
                ROPE=angle_strides[1] != 0, COPY=bool(v), INTERLEAVED=interleaved, **constants,
            )  # fmt: skip
        first += xq.shape[1]
    return oq, ok, ov


def backward(
    dy: Tensor, x: Sequence[Tensor], gains: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None, eps: float,
    interleaved: bool, across_heads: bool, need_gain: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Gradients of the queries, or keys, of each stream, and of their gains (none unless ``need_gain``)."""
    b, _, h, d = x[0].shape
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    cos, sin, angle_strides = _angles(cos, sin, x[0])
    first, dx, dgains = 0, [], []
    for part, gain in zip(x, gains, strict=True):
        part = part if part.stride(-1) == 1 else part.contiguous()
        made = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        constants, programs = geometry(h, d, part.shape[1], across_heads)
        sums = part.new_zeros(max(programs * b, 1) if need_gain else 1, 2 * constants["PAIRS"], dtype=torch.float32)
        if programs * b:
            backward_kernel[(programs * b,)](
                part, gain, cos, sin, dy, made, sums, *part.stride()[:3], *dy.stride()[:3], *made.stride()[:3],
                *angle_strides, h, part.shape[1], first, eps,
                ROPE=angle_strides[1] != 0, DGAIN=need_gain, INTERLEAVED=interleaved, **constants,
            )  # fmt: skip
        dx.append(made)
        if need_gain:
            dgains.append(sums.sum(0).to(gain.dtype))
        first += part.shape[1]
    return dx, dgains
