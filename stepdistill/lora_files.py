"""LoRA files: a student's adapters written for diffusers, ComfyUI and kohya; a user's own fused into a teacher."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline


def fuse_lora_file(pipeline: DiffusionPipeline, source: str | Path, scale: float = 1.0) -> None:
    """Add a LoRA to a pipeline's weights."""
    raise NotImplementedError
