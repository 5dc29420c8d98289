"""UNet2DModel: unconditional and class-conditional pixel models (DDPM, and the bundled digits teacher)."""

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
    Tap,
    add_family,
    pixels,
    refuse_prompt,
    table_index,
    vp_kind,
    vp_schedule,
)


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(x_t, table_index(t, n, x_t), class_labels=cond.get("class_labels"), return_dict=False)[0]

    return call


def _cond(net: nn.Module, given: Mapping[str, Any]) -> Cond:
    classes = net.config.num_class_embeds
    if classes is None:
        if "labels" in given:
            raise ValueError("labels were given, but this model is unconditional; leave them out")
        return {}
    if "labels" not in given:
        raise ValueError(f"this model is conditioned on class labels from 0 to {classes - 1}; give some")
    labels = torch.as_tensor(given["labels"])
    if labels.dtype != torch.int64 or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise ValueError(f"class labels must be integers from 0 to {classes - 1}; got {labels.unique().tolist()}")
    return {"class_labels": labels}


def _null(pipeline: DiffusionPipeline, negative: str, size: Size | None) -> Cond | None:
    refuse_prompt(pipeline, negative)
    label = pipeline.config.get("null_label")  # a key of other pipelines' configs, so it may be absent
    return None if label is None else {"class_labels": torch.tensor([label])}


def _examples(pipeline: DiffusionPipeline, n: int) -> Cond:
    classes, null = pipeline.unet.config.num_class_embeds, _null(pipeline, "", None)
    if classes is None:
        return {}
    known = torch.tensor([c for c in range(classes) if null is None or c != null["class_labels"]])
    return {"class_labels": known[torch.arange(n) % len(known)]}


def _sample_shape(pipeline: DiffusionPipeline, size: Size | None) -> tuple[int, ...]:
    config = pipeline.unet.config
    side = config.sample_size
    default = (side, side) if isinstance(side, int) else tuple(side)
    return config.in_channels, *pixels(pipeline, size, default, 2 ** (len(config.block_out_channels) - 1))


def _taps(net: nn.Module) -> tuple[Tap, ...]:
    down = tuple(Tap(f"down_blocks.{i}", c) for i, c in enumerate(net.config.block_out_channels))
    return (*down, Tap("mid_block", net.config.block_out_channels[-1]))


UNET2D = add_family(
    Family(
        name="unet2d",
        net_class="UNet2DModel",
        module="unet",
        serves=lambda net, scheduler: "sigma_data" not in scheduler.config,
        schedule=vp_schedule,
        kind=vp_kind,
        call=_call,
        cond=_cond,
        null=_null,
        examples=_examples,
        sample_shape=_sample_shape,
        taps=_taps,
        lora_targets=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    )
)
