"""A QwenImagePipeline of real classes, randomly initialised, and what other pipelines with Qwen's tokens need."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's form of a conversation, without its tools and thoughts."""


def tokenizer() -> Qwen2Tokenizer:
    """One token per byte, and one for each mark of a conversation."""
    vocab = {symbol: i for i, symbol in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    marks = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=marks, chat_template=CHAT)


def text_encoder(tokens: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers, and a picture tower that nobody calls."""
    text = {
        "vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=0, video_token_id=0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def vae(**changes: Any) -> AutoencoderKLQwenImage:
    """Factor four between pixels and latents."""
    config: dict[str, Any] = {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.1, 0.9],
    }  # fmt: skip
    return AutoencoderKLQwenImage(**config | changes).eval()


def transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """Three MM-DiT blocks."""
    config: dict[str, Any] = {
        "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    return QwenImageTransformer2DModel(**config | changes)


def pipeline(**changes: Any) -> QwenImagePipeline:
    """The whole of it; ``changes`` go to the transformer."""
    torch.manual_seed(0)
    tokens = tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    made = QwenImagePipeline(scheduler, vae(), text_encoder(tokens), tokens, transformer(**changes))
    made.default_sample_size = 8
    return made
