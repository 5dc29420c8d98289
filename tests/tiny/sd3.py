"""A StableDiffusion3Pipeline of real classes, randomly initialised; with a tiny T5, so that it reloads bare."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny.sd import text_config, tokenizer, vae


def t5(width: int = 32) -> tuple[T5EncoderModel, T5Tokenizer]:
    """One layer, one token per character."""
    symbols = ["<pad>", "</s>", "<unk>", *(chr(c) for c in range(33, 127)), "\u2581"]
    tokens = T5Tokenizer(vocab=[(s, -1.0 * (i > 1)) for i, s in enumerate(symbols)], extra_ids=0, model_max_length=32)
    config = T5Config(
        vocab_size=len(symbols), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config).eval(), tokens


def transformer(**changes: Any) -> SD3Transformer2DModel:
    """Three MM-DiT blocks."""
    config: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
    }  # fmt: skip
    return SD3Transformer2DModel(**config | changes)


def pipeline(**changes: Any) -> StableDiffusion3Pipeline:
    """The whole of it; ``changes`` go to the transformer."""
    torch.manual_seed(0)
    tokens = tokenizer()
    config = text_config(tokens)
    one, two = (CLIPTextModelWithProjection(config).eval() for _ in range(2))
    encoder, t5_tokens = t5()
    return StableDiffusion3Pipeline(
        transformer(**changes), FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), one, tokens, two, tokenizer(),
        encoder, t5_tokens,
    )  # fmt: skip
