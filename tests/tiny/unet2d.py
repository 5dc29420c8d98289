"""An unconditional DDIMPipeline, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel


def pipeline(**changes: Any) -> DDIMPipeline:
    """The whole of it; ``changes`` go to the UNet."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8,
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return DDIMPipeline(UNet2DModel(**config | changes), DDIMScheduler(clip_sample=False))
