"""A ZImagePipeline of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.tiny.qwen_image import tokenizer
from tests.tiny.sd import vae

SIZE = (32, 16)
"""The pipeline's own would be 1024 x 1024 whatever the network; 16 x 8 latents are a multiple of 32 patches."""


def text_encoder(tokens: Qwen2Tokenizer, **changes: Any) -> Qwen3ForCausalLM:
    """Three layers."""
    config: dict[str, Any] = {
        "vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**config | changes)).eval()


def transformer(**changes: Any) -> ZImageTransformer2DModel:
    """One refiner of each kind and two common blocks."""
    config: dict[str, Any] = {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 16, "axes_dims": [4, 4, 8], "axes_lens": [640, 32, 32],
    }  # fmt: skip
    return ZImageTransformer2DModel(**config | changes)


def pipeline(**changes: Any) -> ZImagePipeline:
    """The whole of it; ``changes`` go to the transformer."""
    torch.manual_seed(0)
    tokens = tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    image_vae = vae(shift_factor=0.1, scaling_factor=0.4)
    return ZImagePipeline(scheduler, image_vae, text_encoder(tokens), tokens, transformer(**changes))
