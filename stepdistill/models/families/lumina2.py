"""Lumina-Image 2.0: one stream of text and image tokens, whose time runs from noise at 0 to the image at 1.

Guidance is the plain one; the pipeline's is that under ``cfg_normalization=False``.
"""

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
    vae_decode,
    vae_encode,
    velocity,
)


def _call(scheduler: SchedulerMixin) -> Call:
    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return -net(
            x_t,
            timestep=(1 - t).to(x_t.dtype),
            encoder_hidden_states=cond["prompt"],
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]

    return call


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    prompt, mask, _, _ = pipeline.encode_prompt(list(prompts), False, device=pipeline.text_encoder.device)
    return {"prompt": prompt, "mask": mask}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    # negative prompts go without the system prompt
    _, _, prompt, mask = pipeline.encode_prompt(
        [""], True, negative_prompt=[negative], device=pipeline.text_encoder.device
    )
    return {"prompt": prompt, "mask": mask}


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config, f = pipeline.transformer.config, pipeline.vae_scale_factor
    height, width = pixels(pipeline, size, (pipeline.default_image_size,) * 2, f * config.patch_size)
    return config.in_channels, height // f, width // f


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    # In net.layers the image follows a text of another length in every sample; here it is alone.
    blocks = range(len(net.noise_refiner))
    return tuple(Tap(f"noise_refiner.{i}", net.config.hidden_size, tokens=True) for i in blocks)


LUMINA2 = add_family(
    Family(
        name="lumina2",
        net_class="Lumina2Transformer2DModel",
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
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "feed_forward.linear_1", "feed_forward.linear_2",
            "feed_forward.linear_3",
        ),
        sampling=lambda pipeline: {"guidance_scale": 1.0},
        passes_sigmas=True,
    )
)  # fmt: skip
