"""K1 for callers: checks, the choice of a backend, and the registered operator behind the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stepdistill.kernels.dispatch import (
    Backend,
    choose,
    flex_problem,
    forward_mode,
    triton_problem,
    under_autocast,
    xformers_problem,
)
from stepdistill.kernels.steer_attention.naive import branch_attention as naive_branches
from stepdistill.kernels.steer_attention.naive import steer_attention as naive_steering
from stepdistill.kernels.steer_attention.naive import visible_keys

MAX_BRANCHES = 3
MAX_HEAD_DIM = 160

Branch = tuple[Tensor, Tensor]
"""Keys and values, each (B, H, N, d)."""


def steer_attention(
    q: Tensor,
    branches: Sequence[Branch],
    weights: Tensor | Sequence[float],
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    prefer: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``sum_r w_r softmax(q K_r' scale) V_r``: attention over several branches that share their queries.

    With weights (1, -a) and a negative prompt in the second branch this is NASA (arXiv:2412.02687 eq. 12). Branches
    whose weight is the number 0 are left out, so that weights (1, 0) are ordinary attention to the bit.

    Args:
        q: (B, H, M, d).
        branches: keys and values (B, H, N_r, d) each; expanded or strided ones are fine. An empty branch adds nothing.
        weights: numbers, or a tensor (R,) or (B, R) which may need a gradient.
        lengths: (B, R), how many keys of each sample and branch count, from the first on; None for all.
        scale: of the scores; None is d^-1/2.
        return_lse: whether to return the natural log-sum-exp of each branch too.
        prefer: the backend; None chooses.

    Returns:
        (B, H, M, d), in memory (B, M, H, d) where the Triton kernel ran; and (R, B, H, M) float32 if asked for.

    Raises:
        ValueError: if shapes do not fit or ``prefer`` cannot serve.
    """
    _check(q, branches, lengths)
    if not isinstance(weights, Tensor):
        if len(weights) != len(branches):
            raise ValueError(f"weights: {len(weights)} for {len(branches)} branches; give one each")
        kept = [r for r, w in enumerate(weights) if w != 0 or return_lse]
        if len(kept) < len(branches) and kept:
            branches, weights = [branches[r] for r in kept], [weights[r] for r in kept]
            lengths = None if lengths is None else lengths[:, kept]
    elif weights.shape not in ((len(branches),), (len(q), len(branches))):
        raise ValueError(f"weights {tuple(weights.shape)}: ({len(branches)},) or {(len(q), len(branches))} expected")
    q, branches = _autocast(q, branches)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = _choose(q, branches, lengths, return_lse, prefer)
    keys, values = [k for k, _ in branches], [v for _, v in branches]
    if backend in ("triton", "naive"):
        w = weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float32, device=q.device)
        if backend == "naive":
            out, lse = naive_steering(q, keys, values, w.expand(len(q), len(keys)), lengths, scale)
        else:
            w = w.to(q.device, torch.float32).expand(len(q), len(keys)).contiguous()
            out, lse = _operator(q, keys, values, w, _counts(lengths), scale, False)
            out = out[0]
        return (out, lse) if return_lse else out
    out = None
    for r, (k, v) in enumerate(branches):
        z = _library(backend, q, k, v, None if lengths is None else lengths[:, r], scale)
        if isinstance(weights, Tensor):
            w = weights[..., r].to(z.dtype).reshape(-1, 1, 1, 1)
            out = w * z if out is None else torch.addcmul(out, w, z)
        elif out is None:
            out = z if weights[r] == 1 else weights[r] * z
        else:
            out = torch.add(out, z, alpha=weights[r])
    return out


def branch_attention(
    q: Tensor,
    branches: Sequence[Branch],
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    prefer: Backend | None = None,
) -> tuple[Tensor, ...]:
    """Each branch's own output, unweighted: what NAG combines (arXiv:2505.21179), since its norm spans all heads.

    Arguments as in ``steer_attention``.

    Returns:
        R outputs (B, H, M, d); and last the log-sum-exp (R, B, H, M) if asked for.

    Raises:
        ValueError: if shapes do not fit or ``prefer`` cannot serve.
    """
    _check(q, branches, lengths)
    q, branches = _autocast(q, branches)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = _choose(q, branches, lengths, return_lse, prefer)
    keys, values = [k for k, _ in branches], [v for _, v in branches]
    if backend == "naive":
        out, lse = naive_branches(q, keys, values, lengths, scale)
    elif backend == "triton":
        w = torch.ones(len(q), len(keys), device=q.device)
        out, lse = _operator(q, keys, values, w, _counts(lengths), scale, True)
    else:
        return tuple(
            _library(backend, q, k, v, None if lengths is None else lengths[:, r], scale)
            for r, (k, v) in enumerate(branches)
        )
    return (*out.unbind(0), lse) if return_lse else tuple(out.unbind(0))


def _check(q: Tensor, branches: Sequence[Branch], lengths: Tensor | None) -> None:
    if q.dim() != 4 or not branches:
        raise ValueError(f"q {tuple(q.shape)} with {len(branches)} branches: (B, H, M, d) and at least one expected")
    b, h, _, d = q.shape
    for r, (k, v) in enumerate(branches):
        if k.shape != v.shape or k.shape[:2] != (b, h) or k.dim() != 4 or k.shape[3] != d:
            raise ValueError(
                f"branch {r}: keys {tuple(k.shape)}, values {tuple(v.shape)}; both ({b}, {h}, N, {d}) expected"
            )
    if lengths is not None and lengths.shape != (b, len(branches)):
        raise ValueError(f"lengths {tuple(lengths.shape)}: {(b, len(branches))} expected, one per sample and branch")


def _autocast(q: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, list[Branch]]:
    q, *rest = under_autocast(q, *[x for branch in branches for x in branch])
    return q, list(zip(rest[::2], rest[1::2], strict=True))


def _choose(
    q: Tensor, branches: Sequence[Branch], lengths: Tensor | None, lse: bool, wanted: Backend | None
) -> Backend:
    tensors = [q, *[x for branch in branches for x in branch]]
    no_lse = "it returns no log-sum-exp" if lse else None
    asked = wanted == "xformers"  # probing takes a call, made only for those who ask
    problems: dict[Backend, str | None] = {
        "triton": _shape_problem(q, branches) or triton_problem(*tensors),
        "sdpa": no_lse,
        "xformers": no_lse
        or ("it takes no lengths" if lengths is not None else xformers_problem(q) if asked else None),
        "flex": no_lse
        or ("it has no empty branches" if any(k.shape[2] == 0 for k, _ in branches) else flex_problem(*tensors)),
        "naive": None,
    }
    counts = tuple(k.shape[2] for k, _ in branches)
    return choose("steer_attention", problems, q, (*q.shape, *counts), wanted)


def _shape_problem(q: Tensor, branches: Sequence[Branch]) -> str | None:
    if len(branches) > MAX_BRANCHES:
        return f"{len(branches)} branches; it has room for {MAX_BRANCHES}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]}; its tiles hold {MAX_HEAD_DIM}"
    if any(x.shape[2] * x.stride(2) >= 2**31 for x in (q, *[x for branch in branches for x in branch])):
        return "rows of one head lie 2^31 elements apart"
    return None


def _library(backend: Backend, q: Tensor, k: Tensor, v: Tensor, length: Tensor | None, scale: float) -> Tensor:
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)
    if backend == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        if length is None:
            return flex_attention(q, k, v, scale=scale)
        return flex_attention(
            q, k, v, scale=scale,
            score_mod=lambda s, b, h, i, j: torch.where(j < length[b], s, float("-inf")),
        )  # fmt: skip
    if k.shape[2] == 0:
        return q * 0
    return scaled_dot_product_attention(q, k, v, attn_mask=visible_keys(length, k.shape[2]), scale=scale)


def _counts(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int32).contiguous()


@torch.library.custom_op("stepdistill::steer_attention", mutates_args=())
def _operator(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Tensor,
    lengths: Tensor | None,
    scale: float,
    separate: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (S, B, H, M, d), S = R if ``separate`` and 1 else, and log-sum-exp (R, B, H, M)."""
    if forward_mode():
        raise NotImplementedError("stepdistill::steer_attention has no forward-mode derivative; use prefer='naive'")
    from stepdistill.kernels.steer_attention.triton import forward

    with torch.cuda.device_of(q):  # Triton launches on the current one
        return forward(q, keys, values, weights, lengths, scale, separate)


@_operator.register_fake
def _(q, keys, values, weights, lengths, scale, separate):
    b, h, m, d = q.shape
    out = q.new_empty(len(keys) if separate else 1, b, m, h, d).transpose(2, 3)
    return out, q.new_empty(len(keys), b, h, m, dtype=torch.float32)


@torch.library.custom_op("stepdistill::steer_attention_backward", mutates_args=())
def _backward_operator(
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
    """See ``backward.backward``; it has no derivative of its own, so a second one raises."""
    from stepdistill.kernels.steer_attention.backward import backward

    with torch.cuda.device_of(q):  # Triton launches on the current one
        return backward(grad, grad_lse, q, keys, values, weights, lengths, lse, scale, separate, need_kv)


@_backward_operator.register_fake
def _(grad, grad_lse, q, keys, values, weights, lengths, lse, scale, separate, need_kv):
    b, h, m, d = q.shape
    dk, dv = ([x.new_empty(x.shape) for x in of] if need_kv else [] for of in (keys, values))
    return q.new_empty(b, m, h, d).transpose(1, 2), dk, dv, torch.empty_like(lse)


def _remember(ctx, inputs, output) -> None:
    q, keys, values, weights, lengths, ctx.scale, ctx.separate = inputs
    ctx.branches, ctx.lengths = len(keys), lengths is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, weights, output[1], *keys, *values, *([lengths] if ctx.lengths else []))


def _backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
    q, weights, lse, *rest = ctx.saved_tensors
    n = ctx.branches
    keys, values, lengths = rest[:n], rest[n : 2 * n], rest[2 * n] if ctx.lengths else None
    need_kv = any(ctx.needs_input_grad[1]) or any(ctx.needs_input_grad[2])
    if grad is None:
        grad = torch.zeros((n if ctx.separate else 1, *q.shape), dtype=q.dtype, device=q.device)
    dq, dk, dv, g = _backward_operator(
        grad, grad_lse, q, keys, values, weights, lengths, lse, ctx.scale, ctx.separate, need_kv
    )
    dw = g.sum((2, 3)).T if ctx.needs_input_grad[3] and not ctx.separate else None
    return dq, dk if need_kv else [None] * n, dv if need_kv else [None] * n, dw, None, None, None


_operator.register_autograd(_backward, setup_context=_remember)
