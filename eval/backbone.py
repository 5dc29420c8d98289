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
from torch import nn

from stepdistill import known_teachers
from stepdistill.evaluation.records import installed_versions
from stepdistill.models.families import flux, sd, sd3, sdxl
from stepdistill.models.lora import Adapted

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "SD 1.5": (known_teachers.sd15, sd.SD.lora_targets),
    "SDXL": (known_teachers.sdxl, sdxl.SDXL.lora_targets),
    "SD3 medium": (known_teachers.sd3_medium, sd3.SD3.lora_targets),
    "FLUX.1 dev": (known_teachers.flux_dev, flux.FLUX.lora_targets),
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
