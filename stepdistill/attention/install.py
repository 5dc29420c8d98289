"""Exchanges the attention processors of one network for a while; every other network keeps its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from stepdistill.attention.dispatcher import backend_name
from stepdistill.attention.processors import CrossAttention, FluxAttention, JointAttention
from stepdistill.kernels import BACKENDS, Backend
from stepdistill.kernels.dispatch import triton_problem, xformers_problem

CROSS = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, CrossAttention)
JOINT = (JointAttnProcessor2_0, XFormersJointAttnProcessor, JointAttention)
FLUX = (FluxAttnProcessor, FluxAttention)


@contextmanager
def with_processors(net: nn.Module, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within it each attention module of ``net`` has the processor that ``make`` makes of its own one.

    Raises:
        ValueError: if ``net`` has no processors.
    """
    if not getattr(net, "attn_processors", None):
        raise ValueError(f"{type(net).__name__} has no attention processors; a network of diffusers is expected")
    before = dict(net.attn_processors)
    net.set_attn_processor({name: make(processor) for name, processor in before.items()})
    try:
        yield
    finally:
        net.set_attn_processor(before)


@contextmanager
def use_attention(net: nn.Module, backend: Backend | None) -> Iterator[None]:
    """Within it ``net``, and no other network, attends by ``backend``; its own processors come back at the end.

    diffusers' ``set_attention_backend`` turns every network of the process, and does nothing on UNets and SD3.

    Args:
        net: a UNet, PixArt or SD3, or one that asks diffusers' dispatcher (FLUX, Wan, Qwen-Image and the like).
        backend: one of ``stepdistill.kernels.BACKENDS``; None chooses for each shape.

    Raises:
        ValueError: if the backend is unknown or cannot run ``net``, or a processor is of a kind not known here.
    """
    _check_backend(net, backend)

    def make(processor: Any) -> Any:
        if isinstance(processor, CROSS):
            return CrossAttention(backend)
        if isinstance(processor, JOINT):
            return JointAttention(backend)
        if hasattr(processor, "_attention_backend"):
            made = copy.copy(processor)  # the instance itself may serve another network too
            made._attention_backend = backend_name(backend)
            return made
        raise unknown_processor(net, processor)

    with with_processors(net, make):
        yield


@contextmanager
def fused_qk(net: nn.Module, prefer: Backend | None = None) -> Iterator[None]:
    """Within it a FLUX.1 network norms, rotates and joins queries and keys by ``qk_norm_rope``.

    Its attention stays with diffusers' dispatcher. ``prefer`` is ``triton`` or ``naive``; None chooses.

    Raises:
        ValueError: if a processor is not FLUX.1's, or projections are fused.
    """

    def make(processor: Any) -> Any:
        if not isinstance(processor, FLUX):
            raise unknown_processor(net, processor)
        return FluxAttention(partial(_dispatched, processor), prefer)

    if any(getattr(module, "fused_projections", False) for module in net.modules()):
        raise ValueError("its projections are fused; call unfuse_qkv_projections() first")
    with with_processors(net, make):
        yield


def _dispatched(processor: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, L, d) through diffusers' dispatcher, which takes (B, L, H, d), as ``processor`` would."""
    return dispatch_attention_fn(
        *(x.transpose(1, 2) for x in (q, k, v)),
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    ).transpose(1, 2)


def _check_backend(net: nn.Module, backend: Backend | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    weight = next(net.parameters())
    sizes = {m.to_q.out_features // m.heads for m in net.modules() if hasattr(m, "to_q") and hasattr(m, "heads")}
    for d in sorted(sizes):
        like = torch.empty(0, 1, 1, d, dtype=weight.dtype, device=weight.device)
        problem = {"xformers": xformers_problem, "triton": triton_problem}.get(backend, lambda x: None)(like)
        if problem:
            raise ValueError(f"backend {backend!r} cannot run {type(net).__name__}: {problem}")


def unknown_processor(net: nn.Module, processor: Any) -> ValueError:
    """The error that a processor of another kind gets."""
    return ValueError(
        f"{type(net).__name__} has a {type(processor).__name__}, which is not known here; remove what installed it "
        "(an IP-adapter, PAG, fused projections), or use another network"
    )
