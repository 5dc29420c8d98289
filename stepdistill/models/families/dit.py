"""DiT: a class-conditional latent transformer, eps on a VP table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import (
    Family,
    Size,
    add_family,
    refuse_prompt,
    table_index,
    vae_decode,
    vae_encode,
    vp_kind,
    vp_schedule,
)
from stepdistill.models.families.pixart import BLOCK_LORA, transformer_taps, without_sigma


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        pred = net(x_t, timestep=table_index(t, n, x_t), class_labels=cond["class_labels"], return_dict=False)[0]
        return without_sigma(pred, x_t)

    return call


def _cond(net: nn.Module, given: Mapping[str, Any]) -> Cond:
    classes = net.config.num_embeds_ada_norm
    if "labels" not in given:
        raise ValueError(f"this model is conditioned on class labels from 0 to {classes - 1}; give some")
    labels = torch.as_tensor(given["labels"])
    if labels.dtype != torch.int64 or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise ValueError(f"class labels must be integers from 0 to {classes - 1}; got {labels.unique().tolist()}")
    return {"class_labels": labels}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond:
    refuse_prompt(pipeline, negative)
    # the row after the classes', which label dropout trained; DiTPipeline writes 1000, as its models have 1000 classes
    return {"class_labels": torch.tensor([pipeline.transformer.config.num_embeds_ada_norm])}


def _examples(pipeline: DiffusionPipeline, n: int) -> Cond:
    return {"class_labels": torch.arange(n) % pipeline.transformer.config.num_embeds_ada_norm}


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config = pipeline.transformer.config
    side = config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    if size is not None and tuple(size) != (side, side):
        raise ValueError(f"teacher.size {list(size)}: {type(pipeline).__name__} makes {[side, side]} only")
    return config.in_channels, config.sample_size, config.sample_size


DIT = add_family(
    Family(
        name="dit",
        net_class="DiTTransformer2DModel",
        module="transformer",
        schedule=vp_schedule,
        kind=vp_kind,
        call=_call,
        cond=_cond,
        null=_null,
        examples=_examples,
        sample_shape=_sample_shape,
        taps=transformer_taps,
        decode=vae_decode,
        to_latents=vae_encode,
        lora_targets=BLOCK_LORA,
        sampling=lambda pipeline: {"guidance_scale": 1.0},
    )
)
