"""CogVideoX 1.0 and 1.5: text to video, v-prediction on a VP table bent towards noise.

Latents are (B, C, T, H, W) here; the pipeline and its network swap C and T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import (
    Family,
    Size,
    Tap,
    add_family,
    pixels,
    table_index,
    thirds,
    vae_decode,
    vae_encode,
    vp_kind,
    vp_schedule,
)


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    return net.config.in_channels == net.config.out_channels  # image-to-video networks read the image beside the noise


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(
            x_t.transpose(1, 2),
            encoder_hidden_states=cond["prompt"],
            timestep=table_index(t, n, x_t),
            image_rotary_emb=_rotary(net, x_t),
            return_dict=False,
        )[0].transpose(1, 2)

    return call


def _rotary(net: nn.Module, x_t: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines (tokens, head width) of the larger networks, which leave making them to the pipeline."""
    config, (frames, *sides) = net.config, x_t.shape[2:]
    if not config.use_rotary_positional_embeddings:
        return None
    p, p_t = config.patch_size, config.patch_size_t
    height, width = (side // p for side in sides)
    base_height, base_width = config.sample_height // p, config.sample_width // p
    if p_t is None:
        crop = get_resize_crop_region_for_grid((height, width), base_width, base_height)
        return get_3d_rotary_pos_embed(
            config.attention_head_dim, crop, (height, width), temporal_size=frames, device=x_t.device
        )
    return get_3d_rotary_pos_embed(
        config.attention_head_dim,
        None,
        (height, width),
        temporal_size=frames // p_t,
        grid_type="slice",
        max_size=(base_height, base_width),
        device=x_t.device,
    )


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    prompt, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        device=pipeline.text_encoder.device,
    )
    return {"prompt": prompt}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    return _encode(pipeline, [negative], size)


def _padding(pipeline: DiffusionPipeline) -> int:
    """Latent frames before the video's own, which networks with patches of several frames want and nobody sees."""
    return (pipeline.transformer.config.patch_size_t or 1) - 1


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config, f, f_t = pipeline.transformer.config, pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
    default = (config.sample_frames, config.sample_height * f, config.sample_width * f)
    frames, height, width = pixels(pipeline, size, default, math.lcm(8, f * config.patch_size))
    if frames % (2 * f_t) != 1:  # the VAE decodes pairs of latent frames, and the first alone
        raise ValueError(f"teacher.size {[frames, height, width]}: frames must be a multiple of {2 * f_t} and 1 more")
    return config.in_channels, frames // f_t + 1 + _padding(pipeline), height // f, width // f


def _decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    return vae_decode(pipeline, latents[:, :, _padding(pipeline) :])


def _to_latents(pipeline: DiffusionPipeline, videos: Tensor, rng: torch.Generator | None) -> Tensor:
    latents = vae_encode(pipeline, videos, rng)
    return torch.cat([*[latents[:, :, :1]] * _padding(pipeline), latents], 2)


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    if net.config.patch_size_t is not None:
        raise ValueError("no discriminator reads CogVideoX 1.5 yet: one token of it spans several frames")
    width = net.config.num_attention_heads * net.config.attention_head_dim
    blocks = thirds([f"transformer_blocks.{i}" for i in range(net.config.num_layers)])
    return tuple(Tap(block, width, tokens=True) for block in blocks)


def _sampling(pipeline: DiffusionPipeline) -> dict[str, Any]:
    return {"guidance_scale": 1.0, "max_sequence_length": pipeline.transformer.config.max_text_seq_length}


COGVIDEOX = add_family(
    Family(
        name="cogvideox",
        net_class="CogVideoXTransformer3DModel",
        module="transformer",
        serves=_serves,
        schedule=vp_schedule,
        kind=vp_kind,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=_sample_shape,
        taps=_taps,
        decode=_decode,
        to_latents=_to_latents,
        pack=lambda latents: latents.transpose(1, 2),
        lora_targets=("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"),
        sampling=_sampling,
    )
)
