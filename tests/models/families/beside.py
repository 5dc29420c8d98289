"""A family beside its stock pipeline: the same noise through both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.build import new_student
from stepdistill.models.denoiser import Cond, Guided, Predictor
from stepdistill.models.families import Opened
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.stock import stock_scheduler

PROMPTS = ("a red star", "on a white, blue and very long background")


def beside(
    opened: Opened,
    *,
    steps: int = 2,
    prompts: Sequence[str] = PROMPTS,
    extra: Cond | None = None,
    scale: float = 1.0,
    output_type: str = "pt",
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Our images (B, C, H, W) in [0, 1] and the pipeline's own, called with ``arguments``.

    Args:
        opened: a fresh one: the pipeline gets another scheduler.
        steps: K.
        prompts: what is asked for.
        extra: conditions beside the prompts.
        scale: classifier-free guidance of ours.
        output_type: "latent" gives latents as the network takes them.
        **arguments: of the pipeline's call.
    """
    torch.manual_seed(2)
    noise, cond = torch.randn(len(prompts), *opened.sample_shape), {**opened.encode(prompts), **(extra or {})}
    student = new_student(opened, Sampler(trailing(steps), Ddim()))
    predict: Predictor = student if scale == 1.0 else Guided(opened.denoiser, scale, opened.null)
    with torch.no_grad():
        latents = student.sampler.run(predict, noise, cond, torch.Generator())
        ours = opened.family.pack(latents) if output_type == "latent" else opened.decode(latents) / 2 + 0.5
    pipeline = opened.pipeline
    pipeline.scheduler = stock_scheduler(student, opened)
    sides = {} if opened.size is None else {"height": opened.size[0], "width": opened.size[1]}
    theirs = pipeline(
        prompt=list(prompts),
        latents=opened.family.pack(noise),
        num_inference_steps=steps,
        output_type=output_type,
        **sides,
        **opened.family.sampling(pipeline) | arguments,
    ).images
    return ours if output_type == "latent" else ours.clamp(0, 1), theirs


def same(ours: Tensor, theirs: Tensor) -> None:
    """To float32's rounding along a walk of a few steps."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


def feels_its_input(opened: Opened) -> None:
    """The gradient reaches every number of the noised sample."""
    x_t = torch.randn(2, *opened.sample_shape, requires_grad=True)
    opened.denoiser(
        x_t, torch.tensor([0.3, 0.9], dtype=torch.float64), opened.encode(PROMPTS)
    ).square().sum().backward()
    assert bool(x_t.grad.ne(0).all())
