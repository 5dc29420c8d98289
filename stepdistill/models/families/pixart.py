"""PixArt-alpha and PixArt-Sigma: a latent DiT with cross-attention to T5, eps on a VP table."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

from diffusers import DiffusionPipeline, SchedulerMixin
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


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        pred = net(
            x_t,
            encoder_hidden_states=cond["prompt"],
            encoder_attention_mask=cond["mask"],
            timestep=table_index(t, n, x_t),
            added_cond_kwargs={key: cond.get(key) for key in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return without_sigma(pred, x_t)

    return call


def without_sigma(pred: Tensor, x_t: Tensor) -> Tensor:
    """The first half (B, C, H, W) of a prediction (B, 2 C, H, W) that holds a learned variance too."""
    return pred.chunk(2, dim=1)[0] if pred.shape[1] == 2 * x_t.shape[1] else pred


def _tokens(pipeline: DiffusionPipeline) -> int:
    """``max_sequence_length``: the pipeline's record of it, where it has one, or its call's default."""
    default = inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default
    return pipeline.config.get("_max_sequence_length", default)


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    device = pipeline.text_encoder.device
    # The pipelines' call cleans captions by default, their encode_prompt does not
    prompt, mask, _, _ = pipeline.encode_prompt(
        list(prompts), False, device=device, clean_caption=True, max_sequence_length=_tokens(pipeline)
    )
    cond = {"prompt": prompt, "mask": mask}
    if not pipeline.transformer.use_additional_conditions:
        return cond
    height, width = (side * pipeline.vae_scale_factor for side in _sample_shape(pipeline, size)[1:])
    added = {"resolution": [height, width], "aspect_ratio": [height / width]}
    return cond | {key: prompt.new_tensor([row] * len(prompt)) for key, row in added.items()}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    return _encode(pipeline, [negative], size)


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config, f = pipeline.transformer.config, pipeline.vae_scale_factor
    side = config.sample_size * f
    height, width = pixels(pipeline, size, (side, side), math.lcm(8, f * config.patch_size))
    return config.in_channels, height // f, width // f


def transformer_taps(net: nn.Module) -> tuple[Tap, ...]:
    """Blocks at a third, two thirds and the end of a transformer over image tokens."""
    blocks = thirds([f"transformer_blocks.{i}" for i in range(len(net.transformer_blocks))])
    return tuple(Tap(block, net.inner_dim, tokens=True) for block in blocks)


BLOCK_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""Attention and feed-forward of diffusers' BasicTransformerBlock."""

PIXART = add_family(
    Family(
        name="pixart",
        net_class="PixArtTransformer2DModel",
        module="transformer",
        schedule=vp_schedule,
        kind=vp_kind,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=_sample_shape,
        taps=transformer_taps,
        decode=vae_decode,
        to_latents=vae_encode,
        lora_targets=(*BLOCK_LORA, "proj_out"),
        sampling=lambda pipeline: {
            "guidance_scale": 1.0,
            "use_resolution_binning": False,
            "max_sequence_length": _tokens(pipeline),
        },
    )
)
