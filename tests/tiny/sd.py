"""A StableDiffusionPipeline of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def tokenizer(length: int = 12) -> CLIPTokenizer:
    """One token per byte, the specials last."""
    symbols = [chr(c) for c in range(33, 127)]
    vocab = {s: i for i, s in enumerate(symbols + [f"{s}</w>" for s in symbols])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def text_config(tokens: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    """A two-layer CLIP text tower for ``tokens``."""
    config: dict[str, Any] = {
        "vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": tokens.model_max_length, "projection_dim": 16,
        "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1,
    }  # fmt: skip
    return CLIPTextConfig(**config | changes)


def vae(**changes: Any) -> AutoencoderKL:
    """Factor two between pixels and latents."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
        "shift_factor": 0.0,
    }  # fmt: skip
    return AutoencoderKL(**config | changes).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    """Two levels, cross-attention at both ends."""
    config: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 2, "cross_attention_dim": 16,
        "attention_head_dim": 2, "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**config | changes)


def pipeline(prediction_type: str = "epsilon", zero_snr: bool = False, **changes: Any) -> StableDiffusionPipeline:
    """The whole of it; ``changes`` go to the UNet."""
    torch.manual_seed(0)
    tokens = tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, steps_offset=1, rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae(), CLIPTextModel(text_config(tokens)).eval(), tokens, unet(**changes), scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
