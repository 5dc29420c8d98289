"""Update time over the time of its bare network evaluations, and bytes held by autograd, for any recipe.

Digits recipes are measured on networks of several widths, those of other teachers on the teacher's own.

    python eval/overhead.py digits_dmd2/no-gan digits_cd --widths 16,32 32,64 64,128 --out eval/overhead.json
    python eval/overhead.py methods --widths 32,64 --repeats 11 --out eval/methods/overhead.json

From Python, ``stepdistill.profiling.measure(trainer)`` does the same for any objective and any ``nn.Module`` denoiser.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from common import put_into_readme, recipe_of
from diffusers import UNet2DModel
from methods import METHODS

from stepdistill.build import build, open_teacher
from stepdistill.data import Data, TeacherPairs
from stepdistill.evaluation.records import device_name, installed_versions
from stepdistill.models.families import open_pipeline
from stepdistill.profiling import measure

DIGITS = "bundled:digits"
PUBLISHED = Path(__file__).resolve().with_name("overhead.json")


@dataclass(frozen=True)
class Arguments:
    """Measure the overhead of recipes' updates."""

    recipes: tyro.conf.Positional[tuple[str, ...]] = (
        "digits_dmd2/no-gan",
        "digits_dmd2",
        "digits_kd",
        "digits_cd",
        "digits_tscd",
        "digits_ladd",
        "shapes_sd_dmd2/no-gan",
        "shapes_sd_dmd2",
        "shapes_sd_kd",
        "shapes_sd_tscd",
        "shapes_sd_shared/no-gan",
        "shapes_sd3_dmd2/no-gan",
    )
    """Names under train/; ``name/no-gan`` leaves the adversarial term out; ``methods`` is each method's on digits."""
    widths: tuple[str, ...] = ("16,32", "32,64")
    """Channels of the digits network's two levels: 16,32 is 0.17 M parameters, 32,64 0.65 M."""
    batch: int = 64
    """Samples of an update."""
    repeats: int = 21
    """Pairs of timings."""
    threads: int = 1
    """Of torch."""
    out: Path | None = None
    """JSON file to write; with ``eval/overhead.json`` the table in the project's README is written too."""


def main(given: Arguments) -> list[dict[str, object]]:
    """Print and return one row per recipe, width and kind of update."""
    torch.set_num_threads(given.threads)
    rows: list[dict[str, object]] = []
    every = [f"digits_{method}" for method in METHODS]
    for name in every if given.recipes == ("methods",) else given.recipes:
        teacher = recipe_of(name).teacher
        widths = [tuple(map(int, w.split(","))) for w in given.widths] if teacher.source == DIGITS else [None]
        for width in widths:
            rows += measure_recipe(name, width, given)
    if given.out:
        record = {"device": device_name("cpu"), "versions": installed_versions(), "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    if given.out and given.out.resolve() == PUBLISHED:
        put_into_readme("overhead", table(rows, str(record["device"])))
    return rows


def table(rows: list[dict[str, object]], device: str) -> str:
    """The rows as Markdown."""
    lines = ["| recipe | parameters | update | update / bare evaluations | bytes held / minimum |", "|" + " --- |" * 5]
    for r in rows:
        lines.append(
            f"| {r['recipe']} | {r['parameters'] / 1e6:.2f} M | {r['update']} | {r['ratio']:.3f} | "
            f"{r['bytes_ratio']:.2f} |"
        )
    note = (
        f"Batch {rows[0]['batch']}, float32, {device}; medians over pairs of an update and its evaluations, one after "
        "the other. Digits recipes on networks of the teacher's shape, two and four times as wide. The minimum is the "
        "one evaluation with a backward pass that needs most. An adversarial gradient flows through discriminator and "
        "student: both graphs are alive at once."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def measure_recipe(name: str, width: tuple[int, ...] | None, given: Arguments) -> list[dict[str, object]]:
    """All kinds of update of one recipe on a digits-like network of a width, random weights, or on its teacher's."""
    recipe = recipe_of(name)
    recipe = replace(recipe, run=replace(recipe.run, batch=given.batch), data=_small(recipe.data, given.batch))
    opened = open_teacher(recipe.teacher)
    if width is not None:
        pipeline = copy.copy(opened.pipeline)
        config = dict(opened.denoiser.net.config) | {"block_out_channels": width}
        pipeline.unet = UNet2DModel.from_config(config)
        opened = open_pipeline(pipeline)
    params = sum(p.numel() for p in opened.denoiser.parameters())
    trainer = build(recipe, opened=opened).trainer
    kinds = {0: "+".join(t.name for t in trainer.turns if t.due(0))}
    if not all(turn.due(1) for turn in trainer.turns):
        kinds[1] = "+".join(t.name for t in trainer.turns if t.due(1))
    rows = []
    for index, kind in kinds.items():
        cost = measure(trainer, index, given.repeats)
        row = {
            "recipe": name,
            "parameters": params,
            "update": kind,
            "batch": given.batch,
            "threads": given.threads,
            "milliseconds": round(1e3 * cost.seconds, 2),
            "bare_milliseconds": round(1e3 * cost.bare_seconds, 2),
            "ratio": round(cost.ratio, 4),
            "held_bytes": cost.bytes,
            "minimum_bytes": cost.minimum_bytes,
            "bytes_ratio": round(cost.bytes_ratio, 3),
            "evaluations": list(cost.evaluations),
        }
        rows.append(row)
        print(
            f"{name:<20} {params / 1e6:5.2f} M  {kind:<22} {row['milliseconds']:8.1f} ms  "
            f"bare {row['bare_milliseconds']:8.1f} ms  ratio {row['ratio']:.3f}  "
            f"bytes held / minimum {row['bytes_ratio']:.2f}"
        )
    return rows


def _small(data: Data, batch: int) -> Data:
    """As many teacher trajectories as one batch needs: making them is not part of an update."""
    return replace(data, count=batch) if isinstance(data, TeacherPairs) else data


if __name__ == "__main__":
    main(tyro.cli(Arguments))
