"""A StableDiffusionXLPipeline of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny.sd import text_config, tokenizer, unet, vae


def xl_unet(**changes: Any) -> UNet2DConditionModel:
    """Conditioned on 16 + 16 channels of text, 16 of its pool, and six numbers of 8 channels each."""
    return unet(
        **{
            "cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8, "transformer_layers_per_block": (1, 2),
        } | changes
    )  # fmt: skip


def pipeline(
    scheduler: SchedulerMixin | None = None, zeros: bool = True, latents: dict[str, Any] | None = None, **changes: Any
) -> StableDiffusionXLPipeline:
    """The whole of it; ``latents`` go to the VAE's config, ``changes`` to the UNet."""
    torch.manual_seed(0)
    tokens = tokenizer()
    one, two = text_config(tokens), text_config(tokens, hidden_act="gelu")
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusionXLPipeline(
        vae(**(latents or {})), CLIPTextModel(one).eval(), CLIPTextModelWithProjection(two).eval(), tokens, tokenizer(),
        xl_unet(**changes).eval(), scheduler or DDIMScheduler(**betas, clip_sample=False),
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip
