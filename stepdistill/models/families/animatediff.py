"""AnimateDiff: a Stable Diffusion UNet with motion modules between its layers; frames go through it as a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import (
    Family,
    Size,
    add_family,
    pixels,
    table_index,
    vae_decode,
    vae_encode,
    vp_kind,
    vp_schedule,
)
from stepdistill.models.families.sd import UNET_LORA, unet_taps

DEFAULT_FRAMES = 16
"""What the pipeline's call makes unless told otherwise."""


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    return net.config.addition_embed_type is None


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        prompt = cond["prompt"].repeat_interleave(x_t.shape[2], 0)  # one for each frame
        return net(x_t, table_index(t, n, x_t), encoder_hidden_states=prompt, return_dict=False)[0]

    return call


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    device = pipeline.text_encoder.device
    return {"prompt": pipeline.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)[0]}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    return _encode(pipeline, [negative], size)


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config, f = pipeline.unet.config, pipeline.vae_scale_factor
    default = (DEFAULT_FRAMES, config.sample_size * f, config.sample_size * f)
    frames, height, width = pixels(pipeline, size, default, f * 2 ** (len(config.block_out_channels) - 1))
    if frames > config.motion_max_seq_length:
        raise ValueError(
            f"teacher.size {[frames, height, width]}: these motion modules know {config.motion_max_seq_length} frames"
        )
    return config.in_channels, frames, height // f, width // f


def _decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    frames = vae_decode(pipeline, latents.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)


def _to_latents(pipeline: DiffusionPipeline, videos: Tensor, rng: torch.Generator | None) -> Tensor:
    latents = vae_encode(pipeline, videos.transpose(1, 2).flatten(0, 1), rng)
    return latents.unflatten(0, (len(videos), -1)).transpose(1, 2)


ANIMATEDIFF = add_family(
    Family(
        name="animatediff",
        net_class="UNetMotionModel",
        module="unet",
        serves=_serves,
        schedule=vp_schedule,
        kind=vp_kind,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=_sample_shape,
        taps=unet_taps,
        decode=_decode,
        to_latents=_to_latents,
        # motion modules call these two by keyword, which PEFT's layers do not take
        lora_targets=tuple(name for name in UNET_LORA if name not in ("proj_in", "proj_out")),
        sampling=lambda pipeline: {"guidance_scale": 1.0},
    )
)
