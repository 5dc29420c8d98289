"""A Lumina2Pipeline of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tests.tiny.sana import gemma
from tests.tiny.sd import vae


def transformer(**changes: Any) -> Lumina2Transformer2DModel:
    """One refiner of each kind and two common blocks."""
    config: dict[str, Any] = {
        "sample_size": 4, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (8, 4, 4),
        "axes_lens": (300, 16, 16), "cap_feat_dim": 16,
    }  # fmt: skip
    return Lumina2Transformer2DModel(**config | changes)


def pipeline(**changes: Any) -> Lumina2Pipeline:
    """The whole of it, with the VAE's factor of eight that it takes for granted; ``changes`` go to the transformer."""
    torch.manual_seed(0)
    encoder, tokens = gemma()
    decoder = vae(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, shift_factor=0.1, scaling_factor=0.4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return Lumina2Pipeline(transformer(**changes), scheduler, decoder, encoder, tokens)
