"""Teachers that everyone uses, as networks without weights: what plans need, and nothing to download.

Class arguments are those of the config.json files on the hub; a network made here lies on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from stepdistill.models.denoiser import Cond, Denoiser
from stepdistill.models.families import Opened, family_for

PREFIX = "config:"
"""Before a name of ``KNOWN`` in a recipe's ``teacher.source``."""


@dataclass(frozen=True)
class Known:
    """One network, and the shapes of what goes in."""

    net: Callable[[], nn.Module]
    scheduler: Callable[[], SchedulerMixin]
    latents: tuple[int, ...]
    """(C, H, W) at the teacher's own size, eight pixels a side each."""
    cond: Mapping[str, tuple[int, ...]]
    """Conditions of one sample."""


class Weightless(SimpleNamespace):
    """Stands for the pipeline of a known teacher: nobody encodes or decodes."""


def _vp() -> SchedulerMixin:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def _flow() -> SchedulerMixin:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl() -> UNet2DConditionModel:
    """SDXL's UNet."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd3_medium() -> SD3Transformer2DModel:
    """Stable Diffusion 3 medium's transformer."""
    return SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    )


def sd35_medium() -> SD3Transformer2DModel:
    """Stable Diffusion 3.5 medium's transformer."""
    return SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )


def sd35_large() -> SD3Transformer2DModel:
    """Stable Diffusion 3.5 large's transformer."""
    return SD3Transformer2DModel(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
    )


def flux_dev() -> FluxTransformer2DModel:
    """FLUX.1 dev's transformer."""
    return FluxTransformer2DModel(guidance_embeds=True)


_SD3 = {"prompt": (77 + 256, 4096), "pooled": (2048,)}

KNOWN: dict[str, Known] = {
    "sd1.5": Known(sd15, _vp, (4, 64, 64), {"prompt": (77, 768)}),
    "sdxl": Known(sdxl, _vp, (4, 128, 128), {"prompt": (77, 2048), "pooled": (1280,), "time_ids": (6,)}),
    "sd3-medium": Known(sd3_medium, _flow, (16, 128, 128), _SD3),
    "sd3.5-medium": Known(sd35_medium, _flow, (16, 128, 128), _SD3),
    "sd3.5-large": Known(sd35_large, _flow, (16, 128, 128), _SD3),
    "flux-dev": Known(flux_dev, _flow, (16, 128, 128), {"prompt": (512, 4096), "pooled": (768,)}),
}
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1.5",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}
"""Their ids on the hub."""


def known_name(source: str) -> str | None:
    """The name in ``KNOWN`` that a recipe's ``teacher.source`` stands for; None for other teachers.

    Raises:
        ValueError: if it begins as one and is none.
    """
    name = source.removeprefix(PREFIX)
    if source.startswith(PREFIX) and name not in KNOWN:
        raise ValueError(f"teacher.source {source!r}: known without weights are {', '.join(PREFIX + k for k in KNOWN)}")
    return name if source.startswith(PREFIX) else HUB.get(source)


def open_known(name: str, size: Sequence[int] = ()) -> Opened:
    """A known teacher without weights, for plans; its conditions are zeros.

    Args:
        name: one of ``KNOWN``.
        size: pixels, height and width; empty takes the teacher's own.

    Raises:
        ValueError: if it cannot make samples of that size.
    """
    return open_untrained(KNOWN[name], size)


def open_untrained(known: Known, size: Sequence[int] = (), device: str = "meta") -> Opened:
    """See ``open_known``; on another device than "meta" the weights are drawn at random."""
    with torch.device(device):
        net = known.net().requires_grad_(False).eval()
    scheduler = known.scheduler()
    family = family_for(net, scheduler)
    if size and (len(size) != 2 or any(side % 64 for side in size)):
        raise ValueError(f"teacher.size {list(size)}: give height and width in multiples of 64")
    shape = (known.latents[0], *(side // 8 for side in size)) if size else known.latents

    def conditions(n: int) -> Cond:
        return {key: torch.zeros(n, *one) for key, one in known.cond.items()}

    family = replace(family, encode=lambda pipeline, prompts, size: conditions(len(prompts)))
    told = family.guidance_input(net)
    denoiser = Denoiser(net, family.schedule(scheduler), family.kind(scheduler), family.call(scheduler))
    pipeline = Weightless(components={family.module: net}, scheduler=scheduler)
    return Opened(family, denoiser, None if told else conditions(1), shape, pipeline)
