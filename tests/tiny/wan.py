"""A WanPipeline of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny.sd3 import t5

SIZE = (5, 32, 48)
"""The pipeline's own would be 81 frames of 480 x 832 whatever the network."""


def text_encoder(words: int) -> UMT5EncoderModel:
    """One layer."""
    config = UMT5Config(vocab_size=words, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def vae(**changes: Any) -> AutoencoderKLWan:
    """Factor eight between pixels and latents, four in time, and channels that differ in mean and spread."""
    config: dict[str, Any] = {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "latents_mean": [-0.7, 0.3, 0.1, 1.0], "latents_std": [2.8, 1.4, 0.6, 1.1],
    }  # fmt: skip
    return AutoencoderKLWan(**config | changes).eval()


def transformer(**changes: Any) -> WanTransformer3DModel:
    """Three blocks."""
    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**config | changes)


def pipeline(**changes: Any) -> WanPipeline:
    """The whole of it; ``changes`` go to the pipeline."""
    torch.manual_seed(0)
    _, tokens = t5()
    parts: dict[str, Any] = {
        "tokenizer": tokens, "text_encoder": text_encoder(len(tokens)), "vae": vae(), "transformer": transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip
    return WanPipeline(**parts | changes)
