"""A CogVideoXPipeline of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from tests.tiny.sd3 import t5


def vae() -> AutoencoderKLCogVideoX:
    """Factor four between pixels and latents, and four in time."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    ).eval()  # fmt: skip


def transformer(**changes: Any) -> CogVideoXTransformer3DModel:
    """Three blocks, with rotary embeddings as the larger networks have."""
    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": 32, "num_layers": 3, "sample_width": 6, "sample_height": 4, "sample_frames": 9,
        "max_text_seq_length": 24, "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    return CogVideoXTransformer3DModel(**config | changes)


def pipeline(**changes: Any) -> CogVideoXPipeline:
    """The whole of it; ``changes`` go to the transformer."""
    torch.manual_seed(0)
    encoder, tokens = t5()
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    return CogVideoXPipeline(tokens, encoder, vae(), transformer(**changes), scheduler)
