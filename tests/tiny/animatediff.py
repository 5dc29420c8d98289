"""An AnimateDiffPipeline of real classes, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from transformers import CLIPTextModel

from tests.tiny.sd import text_config, tokenizer, unet, vae

SIZE = (4, 16, 16)
"""The pipeline's own would be 16 frames."""


def motion() -> MotionAdapter:
    """For the tiny UNet, up to sixteen frames."""
    return MotionAdapter(
        block_out_channels=(8, 16), motion_num_attention_heads=2, motion_norm_num_groups=4, motion_max_seq_length=16
    )


def pipeline(**changes: Any) -> AnimateDiffPipeline:
    """The whole of it; ``changes`` go to the UNet of the images."""
    torch.manual_seed(0)
    tokens = tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    return AnimateDiffPipeline(
        vae(), CLIPTextModel(text_config(tokens)).eval(), tokens, unet(**changes), motion(), scheduler
    )
