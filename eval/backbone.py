"""Parameters that DMD2 holds on one shared backbone, over those of three networks, at the sizes people train.

    python eval/backbone.py --out eval/backbone.json

Networks are made of their class and config on torch's meta device: no weights are needed and none are allocated.
Counted are teacher, student and critic; a running average adds one set of adapters here and one network there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import put_into_readme
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from stepdistill.evaluation.records import installed_versions
from stepdistill.models.families import flux, sd, sd3, sdxl
from stepdistill.models.lora import Adapted


def sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl_base() -> UNet2DConditionModel:
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
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )


def flux_dev() -> FluxTransformer2DModel:
    """FLUX.1 dev's transformer."""
    return FluxTransformer2DModel(guidance_embeds=True)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "SD 1.5": (sd15, sd.SD.lora_targets),
    "SDXL": (sdxl_base, sdxl.SDXL.lora_targets),
    "SD3 medium": (sd3_medium, sd3.SD3.lora_targets),
    "FLUX.1 dev": (flux_dev, flux.FLUX.lora_targets),
}


@dataclass(frozen=True)
class Arguments:
    """Count parameters."""

    ranks: tuple[int, ...] = (16, 32, 64)
    """Of the adapters of student and critic."""
    out: Path | None = None
    """JSON file to write; the table in the project's README is written with it."""


def count(make: Callable[[], nn.Module], targets: tuple[str, ...], rank: int) -> dict[str, float]:
    """Parameters of a network, of one role's adapters, and shared over three networks."""
    with torch.device("meta"):
        net = make()
        own = sum(p.numel() for p in net.parameters())
        student, critic = (Adapted(net, rank, float(rank), targets) for _ in range(2))
    held = sum(p.numel() for p in net.parameters())  # the network's modules hold both roles' adapters
    adapter = sum(p.numel() for p in student.parameters())
    assert held == own + adapter + sum(p.numel() for p in critic.parameters())
    return {"parameters": own, "adapter_parameters": adapter, "ratio": round(held / (3 * own), 4)}


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = ["| network | parameters | rank | one role's adapters | shared / three networks |", "|" + " --- |" * 5]
    for r in rows:
        lines.append(
            f"| {r['network']} | {r['parameters'] / 1e6:.0f} M | {r['rank']} | {r['adapter_parameters'] / 1e6:.1f} M "
            f"| {r['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(given: Arguments) -> None:
    """Count, print, and write."""
    rows: list[dict[str, object]] = []
    for name, (make, targets) in NETWORKS.items():
        for rank in given.ranks:
            rows.append({"network": name, "rank": rank} | count(make, targets, rank))
    print(table(rows))
    if given.out:
        given.out.write_text(json.dumps({"versions": installed_versions(), "rows": rows}, indent=1) + "\n")
        put_into_readme("backbone", table(rows))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
