"""FLUX.2: dev is told its guidance scale; klein is guided with the empty prompt, or distilled.

Latents are what the network sees: 2x2 patches as channels, normalised by the VAE's batch-norm statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import Family, Size, Tap, add_family, pixels, rectified_flow, thirds, velocity
from stepdistill.models.families.flux import prompt_tokens, refuse_negative, takes_guidance, told_guidance

GUIDANCE = 4.0
"""The pipeline's default scale: what a student is told unless ``cond`` says otherwise, so that a bare call is right."""


def _call(scheduler: SchedulerMixin) -> Call:
    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x_t.shape[2:]
        zero = torch.zeros(1, dtype=torch.long, device=x_t.device)
        rows, columns, places = (torch.arange(n, device=x_t.device) for n in (height, width, cond["prompt"].shape[1]))
        tokens = net(
            x_t.flatten(2).transpose(1, 2),
            encoder_hidden_states=cond["prompt"],
            timestep=t.to(x_t.dtype),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero),
            txt_ids=torch.cartesian_prod(zero, zero, zero, places),
            guidance=told_guidance(net, cond, x_t, GUIDANCE),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    return call


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    device, length = pipeline.text_encoder.device, prompt_tokens(pipeline)
    return {"prompt": pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length)[0]}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond | None:
    if takes_guidance(pipeline.transformer):
        return refuse_negative(pipeline, negative)
    return _encode(pipeline, [negative], size)


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    f = 2 * pipeline.vae_scale_factor
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    height, width = pixels(pipeline, size, (side, side), f)
    return pipeline.transformer.config.in_channels, height // f, width // f


def _law_of_latents(pipeline: DiffusionPipeline) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each (4 C, 1, 1)."""
    norm = pipeline.vae.bn
    return norm.running_mean[:, None, None], (norm.running_var + norm.eps).sqrt()[:, None, None]


def _decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    mean, std = _law_of_latents(pipeline)
    return pipeline.vae.decode(pixel_shuffle(latents * std + mean, 2)).sample


def _to_latents(pipeline: DiffusionPipeline, images: Tensor, rng: torch.Generator | None) -> Tensor:
    mean, std = _law_of_latents(pipeline)
    law = pipeline.vae.encode(images).latent_dist
    return (pixel_unshuffle(law.mode() if rng is None else law.sample(rng), 2) - mean) / std


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    # Single blocks hold text and image in one sequence; norm_out, behind the last of them, holds the image again.
    blocks = thirds([f"transformer_blocks.{i}" for i in range(len(net.transformer_blocks))])
    return (
        *(Tap(b, net.inner_dim, output=1, tokens=True) for b in blocks),
        Tap("norm_out", net.inner_dim, tokens=True),
    )


FLUX2 = add_family(
    Family(
        name="flux2",
        net_class="Flux2Transformer2DModel",
        module="transformer",
        schedule=rectified_flow,
        kind=velocity,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=_sample_shape,
        taps=_taps,
        decode=_decode,
        to_latents=_to_latents,
        guidance_input=takes_guidance,
        # not the single blocks' attn.to_out: the double blocks have a list by that name, which cannot be adapted
        lora_targets=(
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
            "attn.add_v_proj", "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in",
            "ff_context.linear_out", "attn.to_qkv_mlp_proj",
        ),
        sampling=lambda pipeline: {"max_sequence_length": prompt_tokens(pipeline)}
        | ({} if takes_guidance(pipeline.transformer) else {"guidance_scale": 1.0}),
        passes_sigmas=True,
    )
)  # fmt: skip
