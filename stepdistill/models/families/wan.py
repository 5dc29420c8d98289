"""Wan 2.1, and the single-network Wan 2.2 (5B): text to video on the rectified-flow path."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import (
    Family,
    Size,
    Tap,
    add_family,
    pixels,
    rectified_flow,
    thirds,
    velocity,
)

MAX_SEQUENCE_LENGTH = 512
"""Text tokens in the pipeline's call, zeros behind the last; ``encode_prompt`` alone would take 226."""

DEFAULT_SIZE: Size = (81, 480, 832)
"""What the pipeline's call makes unless told otherwise."""


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    return net.config.in_channels == net.config.out_channels  # image-to-video networks read the image beside the noise


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # Wan 2.2 (5B) is told the time of every token; from text alone all are the same, and one does
        return net(x_t, timestep=(t * n).to(x_t.dtype), encoder_hidden_states=cond["prompt"], return_dict=False)[0]

    return call


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    prompt, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        device=pipeline.text_encoder.device,
    )
    return {"prompt": prompt}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    if pipeline.config.boundary_ratio is not None:
        raise ValueError(
            f"{type(pipeline).__name__} has boundary_ratio {pipeline.config.boundary_ratio}: two networks share the "
            "times, and one student cannot start from both; take Wan 2.1 or Wan 2.2 TI2V-5B"
        )
    return _encode(pipeline, [negative], size)


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config, f, f_t = pipeline.transformer.config, pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
    frames, height, width = pixels(pipeline, size, DEFAULT_SIZE, math.lcm(16, f * config.patch_size[-1]))
    if frames % f_t != 1:
        raise ValueError(f"teacher.size {[frames, height, width]}: frames must be a multiple of {f_t} and 1 more")
    return config.in_channels, frames // f_t + 1, height // f, width // f


def _normalisation(pipeline: DiffusionPipeline, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, (C, 1, 1, 1)."""
    config = pipeline.vae.config
    mean, std = (torch.tensor(v).to(like).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return mean, std


def _decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    mean, std = _normalisation(pipeline, latents)
    return pipeline.vae.decode(latents * std + mean).sample


def _to_latents(pipeline: DiffusionPipeline, videos: Tensor, rng: torch.Generator | None) -> Tensor:
    law = pipeline.vae.encode(videos).latent_dist
    latents = law.mode() if rng is None else law.sample(rng)
    mean, std = _normalisation(pipeline, latents)
    return (latents - mean) / std


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    width = net.config.num_attention_heads * net.config.attention_head_dim
    blocks = thirds([f"blocks.{i}" for i in range(net.config.num_layers)])
    return tuple(Tap(block, width, tokens=True) for block in blocks)


WAN = add_family(
    Family(
        name="wan",
        net_class="WanTransformer3DModel",
        module="transformer",
        serves=_serves,
        schedule=rectified_flow,
        kind=velocity,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=_sample_shape,
        taps=_taps,
        decode=_decode,
        to_latents=_to_latents,
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
        sampling=lambda pipeline: {"guidance_scale": 1.0},
    )
)
