"""Sana 1.0 and 1.5: linear attention on the heavily compressed latents of an AutoencoderDC, rectified flow."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

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
    vae_decode,
    velocity,
)


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    return not net.config.guidance_embeds  # Sana-Sprint: TrigFlow, and distilled already


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        prediction = net(
            x_t,
            encoder_hidden_states=cond["prompt"],
            encoder_attention_mask=cond["mask"],
            timestep=(t * n * net.config.timestep_scale).to(x_t.dtype),
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]]  # a learned sigma may follow

    return call


def _conditions(pipeline: DiffusionPipeline, prompts: Sequence[str], instruction: list[str] | None) -> Cond:
    prompt, mask, _, _ = pipeline.encode_prompt(
        list(prompts), False, device=pipeline.text_encoder.device, complex_human_instruction=instruction
    )
    return {"prompt": prompt, "mask": mask}


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    # the pipeline's call puts a long instruction before every prompt, and encode_prompt alone does not
    call = inspect.signature(type(pipeline).__call__)
    return _conditions(pipeline, prompts, call.parameters["complex_human_instruction"].default)


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    return _conditions(pipeline, [negative], None)  # without the instruction, as in the pipeline


def _default_side(pipeline: DiffusionPipeline) -> int:
    return pipeline.transformer.config.sample_size * pipeline.vae_scale_factor


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config, f, side = pipeline.transformer.config, pipeline.vae_scale_factor, _default_side(pipeline)
    height, width = pixels(pipeline, size, (side, side), math.lcm(32, f * config.patch_size))
    return config.in_channels, height // f, width // f


def _to_latents(pipeline: DiffusionPipeline, images: Tensor, rng: torch.Generator | None) -> Tensor:
    return pipeline.vae.encode(images).latent * pipeline.vae.config.scaling_factor  # no posterior to draw from


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    width = net.config.num_attention_heads * net.config.attention_head_dim
    blocks = thirds([f"transformer_blocks.{i}" for i in range(net.config.num_layers)])
    return tuple(Tap(block, width, tokens=True) for block in blocks)


def _sampling(pipeline: DiffusionPipeline) -> dict[str, Any]:
    # The pipeline would make 1024 pixels with any network, and bend other sizes to a table of its own.
    side = _default_side(pipeline)
    return {"guidance_scale": 1.0, "use_resolution_binning": False, "height": side, "width": side}


SANA = add_family(
    Family(
        name="sana",
        net_class="SanaTransformer2DModel",
        module="transformer",
        serves=_serves,
        schedule=rectified_flow,
        kind=velocity,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=_sample_shape,
        taps=_taps,
        decode=vae_decode,
        to_latents=_to_latents,
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point"),
        sampling=_sampling,
    )
)
