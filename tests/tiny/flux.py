"""A FluxPipeline of real classes, randomly initialised; told its guidance scale, as dev is."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tests.tiny.sd import text_config, tokenizer, vae
from tests.tiny.sd3 import t5


def transformer(**changes: Any) -> FluxTransformer2DModel:
    """Two MM-DiT blocks and two single ones."""
    config: dict[str, Any] = {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    return FluxTransformer2DModel(**config | changes)


def pipeline(dynamic: bool = True, **changes: Any) -> FluxPipeline:
    """The whole of it; ``changes`` go to the transformer."""
    torch.manual_seed(0)
    tokens = tokenizer()
    encoder, t5_tokens = t5()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=3.0)
    made = FluxPipeline(
        scheduler, vae(shift_factor=0.1, scaling_factor=0.4), CLIPTextModel(text_config(tokens)).eval(), tokens,
        encoder, t5_tokens, transformer(**changes),
    )  # fmt: skip
    made.default_sample_size = 8
    return made
