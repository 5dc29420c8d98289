"""Stable Diffusion 3 and 3.5: an MM-DiT on the rectified-flow path."""

from __future__ import annotations

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
    rectified_flow,
    thirds,
    vae_decode,
    vae_encode,
    velocity,
)

MAX_SEQUENCE_LENGTH = 256
"""The pipeline's default number of T5 tokens. Without T5 it appends that many zeros, which are seen all the same."""


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(
            x_t,
            encoder_hidden_states=cond["prompt"],
            pooled_projections=cond["pooled"],
            timestep=(t * n).to(x_t.dtype),
            return_dict=False,
        )[0]

    return call


def tokens_trained_with(pipeline: DiffusionPipeline) -> int:
    """``max_sequence_length``: the pipeline's record of it, where it has one, or diffusers' default."""
    return pipeline.config.get("_max_sequence_length", MAX_SEQUENCE_LENGTH)


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    prompt, _, pooled, _ = pipeline.encode_prompt(
        list(prompts),
        None,
        None,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=tokens_trained_with(pipeline),
    )
    return {"prompt": prompt, "pooled": pooled}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    return _encode(pipeline, [negative], size)


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config, f = pipeline.transformer.config, pipeline.vae_scale_factor
    side = config.sample_size * f
    height, width = pixels(pipeline, size, (side, side), f * config.patch_size)
    return config.in_channels, height // f, width // f


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    # The last block's context is dropped, so all of them answer (context, image).
    blocks = thirds([f"transformer_blocks.{i}" for i in range(len(net.transformer_blocks))])
    return tuple(Tap(block, net.inner_dim, output=1, tokens=True) for block in blocks)


SD3 = add_family(
    Family(
        name="sd3",
        net_class="SD3Transformer2DModel",
        module="transformer",
        schedule=rectified_flow,
        kind=velocity,
        call=_call,
        encode=_encode,
        null=_null,
        sample_shape=_sample_shape,
        taps=_taps,
        decode=vae_decode,
        to_latents=vae_encode,
        lora_targets=(
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
            "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
            "ff_context.net.2",
        ),
        sampling=lambda pipeline: {"guidance_scale": 1.0, "max_sequence_length": tokens_trained_with(pipeline)},
    )
)  # fmt: skip
