"""Z-Image: a single-stream transformer over lists of samples, whose time and velocity run from noise to image.

Its pipeline's ``guidance_scale`` counts from 0: ``Guided`` at s is the pipeline at s - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.nn.functional import pad

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
from stepdistill.models.families.flux import prompt_tokens

SIDE = 1024
"""Of the pipeline's images unless it is told otherwise, in pixels."""


def _serves(net: nn.Module, scheduler: SchedulerMixin) -> bool:
    return net.config.siglip_feat_dim is None  # Omni sees images besides


def _call(scheduler: SchedulerMixin) -> Call:
    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        lengths = cond["mask"].sum(1).tolist()
        prompts = [prompt[:length] for prompt, length in zip(cond["prompt"], lengths, strict=True)]
        images = list(x_t.unsqueeze(2).unbind())
        out = net(images, (1 - t).to(x_t.dtype), prompts, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    return call


def _encode(pipeline: DiffusionPipeline, prompts: Sequence[str], size: Size | None) -> Cond:
    device, length = pipeline.text_encoder.device, prompt_tokens(pipeline)
    found, _ = pipeline.encode_prompt(
        list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=length
    )
    lengths = torch.tensor([len(prompt) for prompt in found], device=device)
    return {
        "prompt": torch.stack([pad(prompt, (0, 0, 0, length - len(prompt))) for prompt in found]),
        "mask": torch.arange(length, device=device) < lengths[:, None],
    }


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    return _encode(pipeline, [negative], size)


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    f = pipeline.vae_scale_factor
    height, width = pixels(pipeline, size, (SIDE, SIDE), 2 * f)
    return pipeline.transformer.config.in_channels, height // f, width // f


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    # The image's tokens come first, then padding to a multiple of 32 and the text.
    blocks = thirds([f"layers.{i}" for i in range(len(net.layers))])
    return tuple(Tap(block, net.config.dim, tokens=True, patch=net.config.all_patch_size[0]) for block in blocks)


Z_IMAGE = add_family(
    Family(
        name="z_image",
        net_class="ZImageTransformer2DModel",
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
        to_latents=vae_encode,
        lora_targets=(
            "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1",
            "feed_forward.w2", "feed_forward.w3",
        ),
        sampling=lambda pipeline: {"guidance_scale": 0.0, "max_sequence_length": prompt_tokens(pipeline)},
        passes_sigmas=True,
    )
)  # fmt: skip
