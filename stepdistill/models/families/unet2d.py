"""UNet2DModel: unconditional and class-conditional pixel models (DDPM, and the bundled digits teacher)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import Family, add_family, table_index, vp_kind, vp_schedule


def _call(scheduler: SchedulerMixin) -> Call:
    n = scheduler.config.num_train_timesteps

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return net(x_t, table_index(t, n, x_t), **cond, return_dict=False)[0]

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


def _null(pipeline: DiffusionPipeline) -> Cond | None:
    label = pipeline.config.get("null_label")  # a key of other pipelines' configs, so it may be absent
    return None if label is None else {"class_labels": torch.tensor([label])}


def _examples(pipeline: DiffusionPipeline, n: int) -> Cond:
    classes, null = pipeline.unet.config.num_class_embeds, _null(pipeline)
    if classes is None:
        return {}
    known = torch.tensor([c for c in range(classes) if null is None or c != null["class_labels"]])
    return {"class_labels": known[torch.arange(n) % len(known)]}


def _sample_shape(net: nn.Module) -> tuple[int, ...]:
    size = net.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return net.config.in_channels, height, width


def _taps(net: nn.Module) -> tuple[tuple[str, int], ...]:
    down = tuple((f"down_blocks.{i}", c) for i, c in enumerate(net.config.block_out_channels))
    return (*down, ("mid_block", net.config.block_out_channels[-1]))


UNET2D = add_family(
    Family("unet2d", "UNet2DModel", "unet", vp_schedule, vp_kind, _call, _cond, _null, _examples, _sample_shape, _taps)
)
