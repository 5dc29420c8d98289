"""Peak memory: what plans say against what is measured, and what one shared backbone saves DMD2.

    python eval/memory.py --out eval/memory.json

Measured is what torch's CPU allocator hands out (torch.profiler's records) during real steps on real data; planned is
the rehearsal of ``stepdistill plan`` on fake tensors. Real sizes are planned only, as on a card: bfloat16, one sample
a device, 1024x1024 (SD 1.5: 512x512). Ten minutes on one core, most of them for the real sizes.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import put_into_readme
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from stepdistill.build import build, open_teacher
from stepdistill.data import DigitsData, ShapesData, TeacherPairs
from stepdistill.evaluation.records import installed_versions
from stepdistill.known_teachers import KNOWN, PREFIX, Known, open_known, open_untrained
from stepdistill.memory import Noise, rehearse, size_of, whole_steps
from stepdistill.models.families import Opened
from stepdistill.placement import Placement
from stepdistill.profiling import measured_peak
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.recipes import find
from stepdistill.trainer import Trainer

BUNDLED = (
    "digits_kd",
    "digits_dmd2",
    "digits_scm",
    "shapes_sd_kd",
    "shapes_sd_dmd2",
    "shapes_sd_shared",
    "shapes_sd3_kd",
)


@dataclass(frozen=True)
class Arguments:
    """Plan and measure."""

    sizes: tuple[str, ...] = ("sd1.5", "sdxl", "sd3.5-medium", "flux-dev")
    """Real sizes to plan."""
    out: Path | None = None
    """JSON file to write; the tables in the project's README are written with it."""


def cut_down() -> dict[str, Known]:
    """The known teachers' classes, narrow and shallow, on small latents."""
    unet = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 32}
    sd = {**unet, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 64,
          "attention_head_dim": 4}  # fmt: skip
    xl = {**unet, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (2, 4),
          "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 64,
          "transformer_layers_per_block": (1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
          "addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 64 + 6 * 16}  # fmt: skip
    sd3 = {"sample_size": 32, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4,
           "joint_attention_dim": 64, "caption_projection_dim": 64, "pooled_projection_dim": 32,
           "pos_embed_max_size": 32, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}  # fmt: skip
    flux = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
            "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True}  # fmt: skip
    prompt = {"prompt": (77, 64)}
    return {
        "sd1.5": Known(lambda: UNet2DConditionModel(**sd), KNOWN["sd1.5"].scheduler, (4, 32, 32), prompt),
        "sdxl": Known(
            lambda: UNet2DConditionModel(**xl), KNOWN["sdxl"].scheduler, (4, 32, 32),
            {**prompt, "pooled": (64,), "time_ids": (6,)},
        ),
        "sd3.5-medium": Known(
            lambda: SD3Transformer2DModel(**sd3), KNOWN["sd3.5-medium"].scheduler, (16, 32, 32),
            {**prompt, "pooled": (32,)},
        ),
        "flux-dev": Known(
            lambda: FluxTransformer2DModel(**flux), KNOWN["flux-dev"].scheduler, (16, 32, 32),
            {**prompt, "pooled": (32,)},
        ),
    }  # fmt: skip


LORA = Weights("lora", rank=16)


def dmd2(
    source: str,
    weights: Weights,
    batch: int,
    dtype: str = "float32",
    *,
    placement: Placement = Placement(),  # noqa: B008 (frozen)
) -> Recipe:
    """DMD2 with its discriminator, student and critic both of ``weights``."""
    recipe = find("shapes_sd_dmd2")
    guidance = 3.5 if "flux" in source else 3.0
    run = replace(recipe.run, batch=batch, dtype=dtype, steps=4)
    return replace(recipe, teacher=Teacher(source, guidance=guidance), data=ShapesData(count=64), warm_start=None,
                   student=weights, critic=weights, placement=placement, run=run)  # fmt: skip


def few(recipe: Recipe) -> Recipe:
    """The recipe with its data cut down, and without a warm start."""
    data = recipe.data
    if isinstance(data, TeacherPairs):
        prompts = data.prompts and replace(data.prompts, count=64)
        data = replace(data, count=64, prompts=prompts)
    elif not isinstance(data, DigitsData):
        data = replace(data, count=64)
    return replace(recipe, data=data, warm_start=None)


def both(recipe: Recipe, open_it: Callable[[], Opened], *, noise: bool = False) -> dict[str, Any]:
    """Planned and measured peak of real steps, in bytes; on noise for teachers that nothing encodes or decodes for."""
    planned = rehearse(recipe, open_it())
    peak = planned.peak - planned.data * noise
    opened = open_it()  # a network that no adapters have been put into
    data = Noise(recipe.data, recipe.data.examples(opened, recipe.run.batch)) if noise else recipe.data
    gc.collect()

    def steps(trainer: Trainer) -> None:
        for index in whole_steps(trainer) * 2:
            trainer.step(index)

    here = size_of([*opened.denoiser.parameters(), *opened.denoiser.buffers()])
    measured = here + measured_peak(steps, lambda: build(replace(recipe, data=data), opened=opened).trainer)
    return {"planned": peak, "measured": measured, "ratio": round(peak / measured, 4)}


VARIANTS: dict[str, tuple[Weights, Placement, int]] = {
    "three full networks": (Weights(), Placement(), 1),
    "shared backbone": (LORA, Placement(), 1),
    "shared backbone, recomputed activations": (LORA, Placement(checkpointing=("student", "critic")), 1),
    "three full networks, teacher and ema offloaded": (Weights(), Placement(offload=("teacher", "ema")), 1),
    "three full networks, sharded over 8 devices": (Weights(), Placement(shard=True), 8),
}
"""Weights of student and critic, where networks are, and over how many devices."""


def real_size(name: str, variant: str) -> dict[str, Any]:
    """A known teacher's plan for one of ``VARIANTS``."""
    weights, placement, devices = VARIANTS[variant]
    recipe = dmd2(PREFIX + name, weights, devices, "bfloat16", placement=placement)
    m = rehearse(recipe, open_known(name), as_on_cuda=True, devices=devices)
    return {"teacher": name, "variant": variant, "parts": m.parts(), "peak": m.peak}


def main(given: Arguments) -> None:
    """Plan, measure, print, and write."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"versions": installed_versions(), "bundled": [], "cut_down": [], "shared": [], "real": []}

    def add(part: str, row: dict[str, Any]) -> None:
        found[part].append(row)
        print(part, json.dumps(row), flush=True)
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")

    for name in BUNDLED:
        recipe = few(find(name))
        add("bundled", {"recipe": name} | both(recipe, lambda: open_teacher(recipe.teacher)))  # noqa: B023
    for name, known in cut_down().items():
        for variant in ("three full networks", "shared backbone, recomputed activations"):
            weights, placement, _ = VARIANTS[variant]
            recipe = dmd2(PREFIX + name, weights, 2, placement=placement)
            row = {"teacher": name, "variant": variant}
            add("cut_down", row | both(recipe, lambda: open_untrained(known, device="cpu"), noise=True))  # noqa: B023
    for batch in (1, 32):
        pair = [dmd2("bundled:shapes-sd", weights, batch) for weights in (Weights(), LORA)]
        full, lora = (both(recipe, lambda: open_teacher(recipe.teacher)) for recipe in pair)  # noqa: B023
        row = {"teacher": "bundled:shapes-sd", "batch": batch, "three_networks": full, "shared": lora}
        add("shared", row | {"ratio": round(lora["measured"] / full["measured"], 3)})
    for name in given.sizes:
        for variant in VARIANTS if name == "sdxl" else list(VARIANTS)[:2]:
            add("real", real_size(name, variant))
    if given.out:
        put_into_readme("memory", table(found))


def table(found: dict[str, Any]) -> str:
    """DMD2 in all variants as Markdown; ratios are to three full networks."""
    lines = ["| DMD2 of | how | peak | ratio |", "| --- | --- | --- | --- |"]
    for row in found["shared"]:
        name = f"bundled shapes-sd, batch {row['batch']}, measured"
        for key, how in (("three_networks", "three full networks"), ("shared", "shared backbone")):
            measured = row[key]["measured"]
            ratio = measured / row["three_networks"]["measured"]
            lines.append(f"| {name} | {how} | {measured / 2**20:.0f} MiB | {ratio:.2f} |")
    whole = {row["teacher"]: row["peak"] for row in found["real"] if row["variant"] == "three full networks"}
    for row in found["real"]:
        ratio = row["peak"] / whole[row["teacher"]]
        lines.append(f"| {row['teacher']}, planned | {row['variant']} | {row['peak'] / 2**30:.1f} GiB | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
