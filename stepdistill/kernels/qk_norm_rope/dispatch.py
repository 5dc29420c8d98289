"""K2 for callers: checks, the choice of a backend, and the registered operator behind the Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.kernels.dispatch import Backend, choose, forward_mode, triton_problem
from stepdistill.kernels.qk_norm_rope.naive import norm_rope

MAX_ROW = 16384
"""Elements that one program can hold."""


class Stream(NamedTuple):
    """Projections of one kind of tokens, text or image; (B, L, H, d) each, views of a packed tensor are fine."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    q_gain: Tensor | None
    """Of the norm: (d,), or (H d,) across heads; None is 1."""
    k_gain: Tensor | None


def qk_norm_rope(
    streams: Sequence[Stream],
    rotary: tuple[Tensor, Tensor] | None,
    *,
    eps: float,
    interleaved: bool = True,
    across_heads: bool = False,
    prefer: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """RMS norm and rotary embedding of queries and keys, streams one after the other in a joint sequence.

    Args:
        streams: in the order in which they stand in the joint sequence.
        rotary: cosines and sines of the joint sequence, (L, d / 2) or (B, L, d / 2) with any strides; rows that are
            not to turn have 1 and 0. None is the norm alone.
        eps: added to the mean square.
        interleaved: pairs (2i, 2i + 1), as FLUX and Wan have them, or else (i, i + d / 2).
        across_heads: norm over all heads of a token, as in Wan, or per head.
        prefer: ``triton`` or ``naive``; None chooses.

    Returns:
        Queries, keys and values (B, sum L, H, d); a single stream's values are returned as they are.

    Raises:
        ValueError: if shapes do not fit, angles need a gradient, or ``prefer`` cannot serve.
    """
    _check(streams, rotary, across_heads)
    q, k = [s.q for s in streams], [s.k for s in streams]
    v = [s.v for s in streams if s.v is not None]
    cos, sin = rotary or (None, None)
    b, _, h, d = q[0].shape
    problems: dict[Backend, str | None] = {
        "triton": _shape_problem(h, d, across_heads) or triton_problem(*q, *k, *v, half=False),
        "naive": None,
    }
    shape = (b, h, d, *[x.shape[1] for x in q])
    if choose("qk_norm_rope", problems, q[0], shape, prefer) == "naive":
        made = [
            norm_rope(x, gains, cos, sin, eps, interleaved, across_heads)
            for x, gains in ((q, [s.q_gain for s in streams]), (k, [s.k_gain for s in streams]))
        ]
        return made[0], made[1], torch.cat(v, 1) if len(v) > 1 else v[0] if v else None
    ones = None
    gains: list[list[Tensor]] = []
    for column in ("q_gain", "k_gain"):
        row = []
        for s in streams:
            gain = getattr(s, column)
            if gain is None:
                ones = torch.ones(h * d if across_heads else d, device=q[0].device) if ones is None else ones
                gain = ones
            row.append(gain.contiguous())
        gains.append(row)
    if cos is not None and sin is not None:
        cos, sin = cos.float(), sin.float()
    joint_v = v if len(v) > 1 else []
    oq, ok, ov = _operator(q, k, joint_v, *gains, cos, sin, eps, interleaved, across_heads)
    return oq, ok, ov if joint_v else v[0] if v else None


def _check(streams: Sequence[Stream], rotary: tuple[Tensor, Tensor] | None, across_heads: bool) -> None:
    if not streams:
        raise ValueError("streams: none; give at least one")
    b, _, h, d = streams[0].q.shape
    if d % 2:
        raise ValueError(f"head dimension {d}: an even number expected")
    if len({s.v is None for s in streams}) > 1:
        raise ValueError("streams: some have values and some have none; give all or none")
    for i, s in enumerate(streams):
        expected = (b, s.q.shape[1], h, d)
        for name, x in (("q", s.q), ("k", s.k), ("v", s.v)):
            if x is not None and x.shape != expected:
                raise ValueError(f"streams[{i}].{name} {tuple(x.shape)}: {expected} expected")
        for name, gain in (("q_gain", s.q_gain), ("k_gain", s.k_gain)):
            if gain is not None and gain.shape != (h * d if across_heads else d,):
                raise ValueError(f"streams[{i}].{name} {tuple(gain.shape)}: ({h * d if across_heads else d},) expected")
    length = sum(s.q.shape[1] for s in streams)
    for name, angles in zip(("cos", "sin"), rotary or (), strict=False):
        if angles.shape not in ((length, d // 2), (b, length, d // 2)):
            raise ValueError(f"rotary {name} {tuple(angles.shape)}: ({length}, {d // 2}) or ({b}, ...) expected")
        if angles.requires_grad:
            raise ValueError(f"rotary {name} needs a gradient, which has no formula here; detach it")


def _shape_problem(h: int, d: int, across_heads: bool) -> str | None:
    row = h * d if across_heads else d
    return f"rows of {row} elements; a program holds {MAX_ROW}" if row > MAX_ROW else None


@torch.library.custom_op("stepdistill::qk_norm_rope", mutates_args=())
def _operator(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    q_gains: Sequence[Tensor],
    k_gains: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    across_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint queries, keys, and values (empty where ``v`` is)."""
    if forward_mode():
        raise NotImplementedError("stepdistill::qk_norm_rope has no forward-mode derivative; use prefer='naive'")
    from stepdistill.kernels.qk_norm_rope.triton import forward

    with torch.cuda.device_of(q[0]):  # Triton launches on the current one
        return forward(q, k, v, q_gains, k_gains, cos, sin, eps, interleaved, across_heads)


@_operator.register_fake
def _(q, k, v, q_gains, k_gains, cos, sin, eps, interleaved, across_heads):
    b, _, h, d = q[0].shape
    shape = (b, sum(x.shape[1] for x in q), h, d)
    return q[0].new_empty(shape), q[0].new_empty(shape), q[0].new_empty(shape if len(v) else (0,))


@torch.library.custom_op("stepdistill::qk_norm_rope_backward", mutates_args=())
def _backward_operator(
    dy: Tensor,
    x: Sequence[Tensor],
    gains: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
    across_heads: bool,
    need_gain: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """See ``triton.backward``; it has no derivative of its own, so a second one raises."""
    from stepdistill.kernels.qk_norm_rope.triton import backward

    with torch.cuda.device_of(dy):  # Triton launches on the current one
        return backward(dy, x, gains, cos, sin, eps, interleaved, across_heads, need_gain)


@_backward_operator.register_fake
def _(dy, x, gains, cos, sin, eps, interleaved, across_heads, need_gain):
    return [p.new_empty(p.shape) for p in x], [torch.empty_like(g) for g in gains] if need_gain else []


def _remember(ctx, inputs, output) -> None:
    q, k, v, q_gains, k_gains, cos, sin, ctx.eps, ctx.interleaved, ctx.across_heads = inputs
    ctx.streams, ctx.lengths, ctx.rope = len(q), [x.shape[1] for x in q], cos is not None
    ctx.values = len(v)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*q, *k, *q_gains, *k_gains, *([cos, sin] if ctx.rope else []))


def _backward(ctx, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None):
    n, saved = ctx.streams, ctx.saved_tensors
    q, k, q_gains, k_gains = (saved[i * n : (i + 1) * n] for i in range(4))
    cos, sin = saved[4 * n :] if ctx.rope else (None, None)
    none = [None] * n
    made = []
    for which, dy, x, gains in ((0, dq, q, q_gains), (1, dk, k, k_gains)):
        need_gain = any(ctx.needs_input_grad[3 + which])
        if dy is None:
            made.append((none, none))
            continue
        dx, dgain = _backward_operator(dy, x, gains, cos, sin, ctx.eps, ctx.interleaved, ctx.across_heads, need_gain)
        made.append((dx, dgain if need_gain else none))
    dvs = [None] * ctx.values if dv is None or not ctx.values else list(dv.split(ctx.lengths, 1))
    return made[0][0], made[1][0], dvs, made[0][1], made[1][1], None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_remember)
