"""A DiTPipeline, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tests.tiny.sd import vae


def pipeline(**changes: Any) -> DiTPipeline:
    """The whole of it; ``changes`` go to the transformer. A thousand classes, since the pipeline's null is 1000."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2,
    }  # fmt: skip
    return DiTPipeline(DiTTransformer2DModel(**config | changes).eval(), vae(), DDIMScheduler(clip_sample=False))
