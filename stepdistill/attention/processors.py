"""Processors for diffusers' attention modules that compute through ``stepdistill.kernels``.

Each does what the stock processor does, in one that leaves the attention itself to ``attend``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stepdistill.kernels import Backend, Stream, qk_norm_rope, steer_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values (B, H, L, d) -> (B, H, L, d)."""


def heads_of(attn: Attention, x: Tensor) -> Tensor:
    """Projections (B, L, H d) by head, (B, H, L, d)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """``x`` through a norm that may not be there."""
    return x if norm is None else norm(x)


def merged(x: Tensor, like: Tensor) -> Tensor:
    """Heads (B, H, L, d) side by side, (B, L, H d)."""
    return x.transpose(1, 2).flatten(2).to(like.dtype)


class CrossAttention:
    """Self- and cross-attention of UNets and of PixArt (diffusers' ``AttnProcessor2_0``), over a chosen backend."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cross: bool) -> Tensor:
        """Ordinary attention; ``mask`` (B, H or 1, 1 or M, N) is added to the scores."""
        if mask is not None:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return steer_attention(q, [(k, v)], (1.0,), prefer=self.backend)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        image = x.shape[2:] if x.dim() == 4 else None
        if image:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
            attention_mask = attention_mask.unflatten(0, (len(context), attn.heads))
        q = normed(attn.norm_q, heads_of(attn, attn.to_q(x)))
        k = normed(attn.norm_k, heads_of(attn, attn.to_k(context)))
        v = heads_of(attn, attn.to_v(context))
        out = self.attend(q, k, v, attention_mask, encoder_hidden_states is not None)
        out = attn.to_out[1](attn.to_out[0](merged(out, q)))
        if image:
            out = out.transpose(1, 2).unflatten(2, image)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class JointAttention:
    """Joint attention of SD3 (``JointAttnProcessor2_0``): image tokens, then text; image alone in SD3.5's ``attn2``."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, image: int) -> Tensor:
        """Ordinary attention; the first ``image`` tokens are the image's."""
        return steer_attention(q, [(k, v)], (1.0,), prefer=self.backend)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q = normed(attn.norm_q, heads_of(attn, attn.to_q(hidden_states)))
        k = normed(attn.norm_k, heads_of(attn, attn.to_k(hidden_states)))
        v = heads_of(attn, attn.to_v(hidden_states))
        image = hidden_states.shape[1]
        if encoder_hidden_states is not None:
            text_q = normed(attn.norm_added_q, heads_of(attn, attn.add_q_proj(encoder_hidden_states)))
            text_k = normed(attn.norm_added_k, heads_of(attn, attn.add_k_proj(encoder_hidden_states)))
            text_v = heads_of(attn, attn.add_v_proj(encoder_hidden_states))
            q, k, v = (torch.cat(pair, 2) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        out = merged(self.attend(q, k, v, image), q)
        made = attn.to_out[1](attn.to_out[0](out[:, :image]))
        if encoder_hidden_states is None:
            return made
        text = out[:, image:]
        return made, text if attn.context_pre_only else attn.to_add_out(text)


class FluxAttention:
    """Attention of FLUX.1 (``FluxAttnProcessor``), norm, rotation and concatenation by ``qk_norm_rope``."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, attend: Attend, backend: Backend | None = None) -> None:
        self.attend = attend
        self.backend = backend
        """``triton`` or ``naive``, of the norm and rotation."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("attention_mask: FLUX attends to all tokens; leave it out")
        streams = [_stream(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, attn.head_dim)]
        if encoder_hidden_states is not None:
            text = _stream(
                encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q,
                attn.norm_added_k, attn.head_dim,
            )  # fmt: skip
            streams.insert(0, text)
        rotary = None
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb  # (L, d), each angle twice
            rotary = cos[:, ::2].to(hidden_states.device), sin[:, ::2].to(hidden_states.device)
        q, k, v = qk_norm_rope(streams, rotary, eps=attn.norm_q.eps, prefer=self.backend)
        out = merged(self.attend(*(x.transpose(1, 2) for x in (q, k, v))), q)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _stream(
    x: Tensor, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module, norm_q: nn.Module, norm_k: nn.Module, d: int
) -> Stream:
    q, k, v = (layer(x).unflatten(-1, (-1, d)) for layer in (to_q, to_k, to_v))
    return Stream(q, k, v, norm_q.weight, norm_k.weight)
