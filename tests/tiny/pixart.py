"""PixArt's two pipelines of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PixArtAlphaPipeline, PixArtTransformer2DModel

from tests.tiny.sd import vae
from tests.tiny.sd3 import t5

SIZE = (16, 16)


def pipeline(cls: type[DiffusionPipeline] = PixArtAlphaPipeline, **changes: Any) -> DiffusionPipeline:
    """The whole of it; ``changes`` go to the transformer. PixArtAlphaPipeline tells sizes to those of 128 alone."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 128, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "attention_head_dim": 12, "num_attention_heads": 2, "cross_attention_dim": 24, "caption_channels": 32,
    }  # fmt: skip
    encoder, tokens = t5()
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return cls(tokens, encoder, vae(), PixArtTransformer2DModel(**config | changes).eval(), scheduler)
