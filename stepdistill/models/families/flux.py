"""FLUX.1: an MM-DiT over 2x2 patches; dev is told its guidance scale, schnell is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import (
    Family,
    Size,
    Tap,
    add_family,
    pixels,
    rectified_flow,
    thirds,
    vae_decode,
    vae_encode,
    velocity,
)

GUIDANCE = 3.5
"""The pipeline's default scale: what a student is told unless ``cond`` says otherwise, so that a bare call is right."""

MAX_SEQUENCE_LENGTH = 512
"""The default number of text tokens in the pipelines of FLUX.1, FLUX.2, Qwen-Image and Z-Image."""


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, H W / 4, 4 C), one per 2x2 patch."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int) -> Tensor:
    """The inverse of ``pack`` for latents of that height."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, -1)), 2)


def told_guidance(net: nn.Module, cond: Cond, x_t: Tensor, default: float) -> Tensor | None:
    """Guidance scales (B,) for a network that is told them; None for others."""
    if not net.config.guidance_embeds:
        return None
    return cond["guidance"].to(x_t) if "guidance" in cond else x_t.new_full((len(x_t),), default)


def takes_guidance(net: nn.Module) -> bool:
    """Guidance-distilled networks."""
    return net.config.guidance_embeds


def prompt_tokens(pipeline: DiffusionPipeline) -> int:
    """``max_sequence_length``: the pipeline's record of it, where it has one, or diffusers' default."""
    return pipeline.config.get("_max_sequence_length", MAX_SEQUENCE_LENGTH)


def refuse_negative(pipeline: DiffusionPipeline, negative: str) -> None:
    """For guidance-distilled networks, which are never run twice.

    Raises:
        ValueError: if a negative prompt is given.
    """
    if negative:
        name = type(pipeline).__name__
        raise ValueError(
            f"teacher.negative {negative!r}: this {name} is told its guidance scale, with no negative prompt; leave it "
            "empty"
        )


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    return net.config.in_channels == net.out_channels  # Fill and Control see an image besides


def _call(scheduler: SchedulerMixin) -> Call:
    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[2:]
        zero = torch.zeros(1, dtype=torch.long, device=x_t.device)
        rows, columns = (torch.arange(side // 2, device=x_t.device) for side in (height, width))
        tokens = net(
            pack(x_t),
            encoder_hidden_states=cond["prompt"],
            pooled_projections=cond["pooled"],
            timestep=t.to(x_t.dtype),
            img_ids=torch.cartesian_prod(zero, rows, columns),
            txt_ids=x_t.new_zeros(cond["prompt"].shape[1], 3),
            guidance=told_guidance(net, cond, x_t, GUIDANCE),
            return_dict=False,
        )[0]
        return unpack(tokens, height)

    return call


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    device, length = pipeline.text_encoder.device, prompt_tokens(pipeline)
    prompt, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length)
    return {"prompt": prompt, "pooled": pooled}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond | None:
    if takes_guidance(pipeline.transformer):
        return refuse_negative(pipeline, negative)
    return _encode(pipeline, [negative], size)


def packed_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    """Latents of a network that takes them packed: (C, H / f, W / f)."""
    f = pipeline.vae_scale_factor
    side = pipeline.default_sample_size * f
    height, width = pixels(pipeline, size, (side, side), 2 * f)
    return pipeline.transformer.config.in_channels // 4, height // f, width // f


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    names = [f"{kind}.{i}" for kind in ("transformer_blocks", "single_transformer_blocks")
             for i in range(len(getattr(net, kind)))]  # fmt: skip
    return tuple(Tap(name, net.inner_dim, output=1, tokens=True) for name in thirds(names))  # all give (text, image)


FLUX = add_family(
    Family(
        name="flux",
        net_class="FluxTransformer2DModel",
        module="transformer",
        serves=_serves,
        schedule=rectified_flow,
        kind=velocity,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=packed_shape,
        taps=_taps,
        decode=vae_decode,
        to_latents=vae_encode,
        pack=pack,
        guidance_input=takes_guidance,
        lora_targets=(
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
            "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
            "ff_context.net.2", "proj_mlp", "proj_out",
        ),
        sampling=lambda pipeline: {"max_sequence_length": prompt_tokens(pipeline)},
        passes_sigmas=True,
    )
)  # fmt: skip
