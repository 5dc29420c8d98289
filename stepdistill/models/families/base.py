"""Opening a pretrained pipeline: which module denoises, how it is called, what it predicts and on which schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond, Denoiser
from stepdistill.models.families.loading import check_parts, load_pipeline
from stepdistill.models.taps import Tap
from stepdistill.schedule import DiscreteVP, Kind, RectifiedFlow, Schedule

Size = tuple[int, ...]
"""Pixels of one sample: (height, width), or (frames, height, width) of a video."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: everything that differs between pipelines.

    Text-conditioned families have ``encode``, class-conditional and unconditional ones ``cond``.
    """

    name: str
    net_class: str
    """Class of the denoising network, as diffusers names it."""
    module: str
    """Component of the pipeline that holds it."""
    serves: Callable[[nn.Module, SchedulerMixin], bool] = lambda net, scheduler: True
    """Tells families apart that share a network class."""
    schedule: Callable[[SchedulerMixin], Schedule]
    kind: Callable[[SchedulerMixin], Kind]
    call: Callable[[SchedulerMixin], Call]
    """Makes the only code that knows the network's forward arguments."""
    sample_shape: Callable[[DiffusionPipeline, Size | None], tuple[int, ...]]
    """Shape of one sample of the denoiser (latents, unpacked) at a size in pixels; None is the pipeline's default."""
    taps: Callable[[nn.Module], tuple[Tap, ...]]
    """What a discriminator reads by default."""
    cond: Callable[[nn.Module, Mapping[str, Any]], Cond] | None = None
    """(network, {"labels": ...}) -> conditions; checks ranges."""
    encode: Callable[[DiffusionPipeline, Sequence[str], Size | None], Cond] | None = None
    """Prompts -> conditions, each (B, ...)."""
    null: Callable[[DiffusionPipeline, str, Size | None], Cond | None]
    """The unconditional condition, each tensor (1, ...), of a negative prompt; None where there is none."""
    examples: Callable[[DiffusionPipeline, int], Cond] | None = None
    """Conditions of n samples to look at, spread over the classes that the model knows; text families have none."""
    decode: Callable[[DiffusionPipeline, Tensor], Tensor] = lambda pipeline, latents: latents
    """Latents (B, ...) -> images (B, C, H, W) or videos (B, C, T, H, W), nominally in [-1, 1]."""
    to_latents: Callable[[DiffusionPipeline, Tensor, torch.Generator | None], Tensor] = lambda p, images, rng: images
    """Images in [-1, 1] -> latents, a draw from the posterior; its mode where no generator is given."""
    pack: Callable[[Tensor], Tensor] = lambda latents: latents
    """Latents as the pipeline's own ``latents=`` wants them."""
    guidance_input: Callable[[nn.Module], bool] = lambda net: False
    """Whether the network is told the guidance scale, as ``cond["guidance"]`` (B,), instead of being run twice."""
    lora_targets: tuple[str, ...] = ()
    """Ends of the names of layers that LoRA adapts by default."""
    sampling: Callable[[DiffusionPipeline], dict[str, Any]] = lambda pipeline: {}
    """Arguments of the pipeline's own call under which it samples without guidance and as the student was trained."""
    passes_sigmas: bool = False
    """Whether the pipeline hands its flow scheduler the sigmas 1, 1 - 1/K, ..., 1/K, rather than K alone."""


@dataclass(frozen=True)
class Opened:
    """A pretrained pipeline, opened."""

    family: Family
    denoiser: Denoiser
    null: Cond | None
    sample_shape: tuple[int, ...]
    pipeline: DiffusionPipeline
    """The live pipeline; its denoising network is ``denoiser.net``."""
    size: Size | None = None
    """Of its samples, in pixels; None is the pipeline's default."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Cond:
        """Prompts to conditions, each (B, ...), of samples of another ``size`` if one is given.

        Raises:
            ValueError: if this pipeline takes no prompts.
        """
        if self.family.encode is None:
            raise ValueError(f"{type(self.pipeline).__name__} takes no prompts; give it class labels, or nothing")
        return self.family.encode(self.pipeline, list(prompts), size or self.size)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """Latents (N, ...) to images (N, C, H, W), nominally in [-1, 1]; ``batch`` of them at once."""
        return torch.cat([self.family.decode(self.pipeline, part) for part in latents.split(batch)])

    @torch.no_grad()
    def to_latents(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to latents (B, ...): a draw, or without ``rng`` the mode."""
        return self.family.to_latents(self.pipeline, images, rng)


FAMILIES: dict[str, list[Family]] = {}
"""By class of the denoising network."""


def add_family(family: Family) -> Family:
    """Put a family into the table; of several on one network class the first that ``serves`` is taken."""
    FAMILIES.setdefault(family.net_class, []).append(family)
    return family


def family_for(net: nn.Module, scheduler: SchedulerMixin) -> Family | None:
    """The family of a network under its scheduler; None if there is none."""
    return next((f for f in FAMILIES.get(type(net).__name__, ()) if f.serves(net, scheduler)), None)


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a live pipeline.

    Raises:
        ValueError: if no family handles any of its networks; says what one file would have to provide.
    """
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            family = family_for(component, pipeline.scheduler)
            if family is not None and family.module == name:
                return family
    networks = [type(c).__name__ for c in pipeline.components.values() if isinstance(c, nn.Module)]
    raise ValueError(
        f"no family for {type(pipeline).__name__} (networks: {', '.join(networks) or 'none'}); known: "
        f"{', '.join(sorted(FAMILIES))}. A new one is one file in stepdistill/models/families with a Family row: "
        "schedule, kind, call, conditions, sample shape and taps"
    )


def open_pipeline(
    source: str | Path | DiffusionPipeline,
    *,
    custom_pipeline: str | None = None,
    dtype: torch.dtype = torch.float32,
    size: Size | None = None,
    negative: str = "",
) -> Opened:
    """Open a pretrained pipeline for distillation.

    Args:
        source: a local folder, a hub id, or a live pipeline.
        custom_pipeline: file with the pipeline's class, for folders that diffusers has no class for.
        dtype: the network's arithmetic; weights are loaded in float32.
        size: of samples, in pixels: (height, width), or (frames, height, width); None takes the pipeline's default.
        negative: the prompt of the null condition.

    Returns:
        Its denoiser, null condition, sample shape and the pipeline itself.

    Raises:
        FileNotFoundError: if a local folder is named that is not there.
        ValueError: if the weights are missing or damaged, parts differ in dtype, or no family handles it.
    """
    pipeline = (
        source if isinstance(source, DiffusionPipeline) else load_pipeline(source, custom_pipeline=custom_pipeline)
    )
    check_parts(pipeline)
    family = family_of(pipeline)
    net, scheduler = pipeline.components[family.module], pipeline.scheduler
    denoiser = Denoiser(net, family.schedule(scheduler), family.kind(scheduler), family.call(scheduler), dtype)
    with torch.no_grad():
        null = family.null(pipeline, negative, size)
    return Opened(family, denoiser, null, family.sample_shape(pipeline, size), pipeline, size)


def vp_schedule(scheduler: SchedulerMixin) -> DiscreteVP:
    """The VP table of a diffusers scheduler.

    Raises:
        ValueError: if it has none.
    """
    if "beta_schedule" not in scheduler.config:
        raise ValueError(f"{type(scheduler).__name__} has no betas; this family needs a VP scheduler such as DDIM")
    table = scheduler.alphas_cumprod
    if len(table) > 1 and table[-1] > table[-2]:
        # Euler-like schedulers lift the last entry off zero for their own arithmetic
        raise ValueError(
            f"{type(scheduler).__name__} keeps a table that rises at its end (zero terminal SNR, patched); load the "
            "teacher with DDIMScheduler"
        )
    return DiscreteVP(table)


_KINDS: dict[str, Kind] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def vp_kind(scheduler: SchedulerMixin) -> Kind:
    """What the network behind a VP scheduler predicts.

    Raises:
        ValueError: for an unknown prediction type.
    """
    name = scheduler.config.prediction_type
    if name not in _KINDS:
        raise ValueError(f"prediction_type {name!r} of {type(scheduler).__name__} is none of {', '.join(_KINDS)}")
    return _KINDS[name]


def rectified_flow(scheduler: SchedulerMixin) -> RectifiedFlow:
    """The straight path of a flow-matching scheduler; its shift moves grids, not the path.

    Raises:
        ValueError: if it is not one.
    """
    if not (hasattr(scheduler, "scale_noise") or scheduler.config.get("prediction_type") == "flow_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__} is no flow-matching scheduler; this family needs one such as "
            "FlowMatchEulerDiscreteScheduler"
        )
    return RectifiedFlow()


def velocity(scheduler: SchedulerMixin) -> Kind:
    """What flow-matching networks predict."""
    return "velocity"


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Sinusoidal features (B, width) of guidance scales (B,), as LCM's pipelines make them (arXiv:2310.04378 sec. 4.2).

    Counts scales from 0 for none, so w = guidance - 1, and multiplies by 1000 like the timestep it is added to.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=guidance.device) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance - 1.0)[:, None].float() * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def thirds(blocks: Sequence[str]) -> list[str]:
    """The blocks at a third, two thirds and the end."""
    return [blocks[i] for i in sorted({max(len(blocks) * k // 3 - 1, 0) for k in (1, 2, 3)})]


def refuse_prompt(pipeline: DiffusionPipeline, negative: str) -> None:
    """For pipelines without text.

    Raises:
        ValueError: if a negative prompt is given.
    """
    if negative:
        raise ValueError(f"teacher.negative {negative!r}: {type(pipeline).__name__} takes no prompts; leave it empty")


def pixels(pipeline: DiffusionPipeline, size: Size | None, default: Size, multiple: int) -> Size:
    """A size in pixels that the pipeline can make.

    Raises:
        ValueError: if it has another number of sides than ``default``, or a side is no multiple of ``multiple``.
    """
    size = default if size is None else size
    if len(size) != len(default) or any(side < 1 for side in size) or any(side % multiple for side in size[-2:]):
        raise ValueError(
            f"teacher.size {list(size)}: {type(pipeline).__name__} makes {len(default)} sides, height and width in "
            f"multiples of {multiple}, such as {list(default)}"
        )
    return size


def vae_decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents through an image VAE, with its scaling and, where it has one, its shift."""
    config = pipeline.vae.config
    return pipeline.vae.decode(latents / config.scaling_factor + (config.get("shift_factor") or 0.0)).sample


def vae_encode(pipeline: DiffusionPipeline, images: Tensor, rng: torch.Generator | None) -> Tensor:
    """The inverse of ``vae_decode``."""
    config = pipeline.vae.config
    law = pipeline.vae.encode(images).latent_dist
    latents = law.mode() if rng is None else law.sample(rng)
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def table_index(t: Tensor, n: int, like: Tensor) -> Tensor:
    """Times in (0, 1] as indices of an n-entry table, ``n t - 1``, in ``like``'s dtype; 0 below the first entry."""
    return (t * n - 1).clamp_min(0).to(like.dtype)
