"""What the attention kernels share: tiles in and out, scores, the online softmax, and the two steps of its derivative.

A head dimension that is no power of two is split in two, D1 + D2 (72 = 64 + 8, the second padded to 16), rather than
padded as a whole (72 to 128); ``split`` says how. D2 = 0 means that there is no second part.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels were made for the interpreter: Triton decides it when a kernel is decorated."""

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """Of a launch: rows of queries and of keys in a tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def rows_last(x: Tensor) -> Tensor:
    """The tensor itself, or a copy if its last dimension has a stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def split(d: int) -> tuple[int, int]:
    """(D1, D2) of a head dimension: D1 the largest power of two in it, D2 the rest's next one; each 0 or >= 16."""
    first = max(1 << (d.bit_length() - 1), 16)
    rest = d - first
    return first, max(1 << (rest - 1).bit_length(), 16) if rest > 0 else 0


def architecture(device: torch.device) -> int:
    """Ten times the compute capability; Hopper's for the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def dot(a, b, INTERPRET: tl.constexpr):
    """Matrix product with float32 sums; the interpreter multiplies bit patterns of bfloat16, so there it is upcast."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_tile(base, rows, n, stride, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a (n, D) matrix, WIDTH columns from FIRST on; zero beyond either end."""
    cols = FIRST + tl.arange(0, WIDTH)
    mask = (rows < n)[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(base, x, rows, n, stride, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of ``load_tile``, rounded to what ``base`` points to."""
    cols = FIRST + tl.arange(0, WIDTH)
    mask = (rows < n)[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_two(base, rows, n, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Both parts of a tile; the first twice where there is no second."""
    first = load_tile(base, rows, n, stride, D, 0, D1)
    second = first
    if D2 > 0:
        second = load_tile(base, rows, n, stride, D, D1, D2)
    return first, second


@triton.jit
def store_two(base, x1, x2, rows, n, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The inverse of ``load_two``."""
    store_tile(base, x1, rows, n, stride, D, 0, D1)
    if D2 > 0:
        store_tile(base, x2, rows, n, stride, D, D1, D2)


@triton.jit
def products(a1, a2, b1, b2, D2: tl.constexpr, INTERPRET: tl.constexpr):
    """``a @ b.T`` over both parts."""
    s = dot(a1, tl.trans(b1), INTERPRET)
    if D2 > 0:
        s += dot(a2, tl.trans(b2), INTERPRET)
    return s


@triton.jit
def softmax_step(
    q1, q2, k, v, rows, n, stride_k, stride_v, m, total, acc1, acc2, log2_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of keys taken into a softmax in base 2: its maximum m, sum total and weighted values acc.

    At least one of ``rows`` must be below n, so that no score row is -inf throughout.
    """
    k1, k2 = load_two(k, rows, n, stride_k, D, D1, D2)
    s = products(q1, q2, k1, k2, D2, INTERPRET) * log2_scale
    s = tl.where((rows < n)[None, :], s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(m - new)
    total = total * shrink + tl.sum(p, 1)
    v1, v2 = load_two(v, rows, n, stride_v, D, D1, D2)
    p = p.to(v1.dtype)
    acc1 = acc1 * shrink[:, None] + dot(p, v1, INTERPRET)
    if D2 > 0:
        acc2 = acc2 * shrink[:, None] + dot(p, v2, INTERPRET)
    return new, total, acc1, acc2


@triton.jit
def softmax_end(m, total, acc1, acc2):
    """Outputs and base-2 log-sum-exp; 0 and -inf where there was no key."""
    none = total == 0.0
    safe = tl.where(none, 1.0, total)
    return acc1 / safe[:, None], acc2 / safe[:, None], tl.where(none, float("-inf"), m + tl.log2(safe))


@triton.jit
def probabilities(
    q1, q2, k1, k2, lse2, rows, n, log2_scale, D2: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """The softmax again, from its base-2 log-sum-exp; 0 for keys from n on and for query rows without any."""
    s = products(q1, q2, k1, k2, D2, INTERPRET) * log2_scale
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    return tl.where((rows < n)[None, :], tl.exp2(s - lse2[:, None]), 0.0)


@triton.jit
def dq_step(
    q1, q2, do1, do2, k, v, rows, n, stride_k, stride_v, lse2, delta, w, dq1, dq2, scale, log2_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Queries' part, dQ, from one tile of keys: dS = P (w dO V' - delta), dQ += dS K scale."""
    k1, k2 = load_two(k, rows, n, stride_k, D, D1, D2)
    v1, v2 = load_two(v, rows, n, stride_v, D, D1, D2)
    p = probabilities(q1, q2, k1, k2, lse2, rows, n, log2_scale, D2, INTERPRET)
    ds = p * (w * products(do1, do2, v1, v2, D2, INTERPRET) - delta[:, None]) * scale
    ds = ds.to(k1.dtype)
    dq1 += dot(ds, k1, INTERPRET)
    if D2 > 0:
        dq2 += dot(ds, k2, INTERPRET)
    return dq1, dq2


@triton.jit
def dkv_step(
    k1, k2, v1, v2, keys, n, q, do, rows, m, stride_q, stride_do, lse2, delta, w, dk1, dk2, dv1, dv2, scale, log2_scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Keys' and values' part, dK and dV, from one tile of queries; those from m on must have a log-sum-exp of -inf."""
    q1, q2 = load_two(q, rows, m, stride_q, D, D1, D2)
    do1, do2 = load_two(do, rows, m, stride_do, D, D1, D2)
    p = probabilities(q1, q2, k1, k2, lse2, keys, n, log2_scale, D2, INTERPRET)
    ds = p * (w * products(do1, do2, v1, v2, D2, INTERPRET) - delta[:, None]) * scale
    p = tl.trans((p * w).to(do1.dtype))
    ds = tl.trans(ds.to(q1.dtype))
    dv1 += dot(p, do1, INTERPRET)
    dk1 += dot(ds, q1, INTERPRET)
    if D2 > 0:
        dv2 += dot(p, do2, INTERPRET)
        dk2 += dot(ds, q2, INTERPRET)
    return dk1, dk2, dv1, dv2
