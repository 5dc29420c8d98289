"""The same noise through our sampler and through the pipeline's own call, for images and videos of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.build import new_student
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import Opened
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.stock import stock_scheduler
from tests.models.test_every_family import PROMPTS


def both(opened: Opened, scale: float = 1.0, *, own_scheduler: bool = False, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Ours and the pipeline's in two steps, images (B, C, H, W) or videos (B, C, T, H, W) in [0, 1].

    Args:
        opened: with the size that is to be made.
        scale: of guidance.
        own_scheduler: sample with the teacher's, not with the one that a student is exported with.
        arguments: of the pipeline's call.
    """
    student, noise = new_student(opened, Sampler(trailing(2), Ddim())), torch.randn(2, *opened.sample_shape)
    teacher, cond = Guided(opened.denoiser, scale, opened.null), opened.encode(PROMPTS)
    with torch.no_grad():
        ours = opened.decode(student.sampler.run(teacher, noise, cond, torch.Generator()))
    pipeline = opened.pipeline
    if not own_scheduler:
        pipeline.scheduler = stock_scheduler(student, opened)
    sides = dict(zip(("width", "height", "num_frames"), reversed(opened.size or ()), strict=False))
    arguments = opened.family.sampling(pipeline) | sides | {"guidance_scale": scale} | arguments
    latents = opened.family.pack(noise)
    (theirs,) = pipeline(
        list(PROMPTS), latents=latents, num_inference_steps=2, output_type="np", return_dict=False, **arguments
    )
    return (ours / 2 + 0.5).clamp(0, 1), torch.from_numpy(theirs).movedim(-1, 1)


def assert_same(pair: tuple[Tensor, Tensor]) -> None:
    """Equal to rounding."""
    torch.testing.assert_close(*pair, rtol=0, atol=2e-4)
