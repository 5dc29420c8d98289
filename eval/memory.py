"""Peak memory: what plans say against what is measured, and what one shared backbone saves DMD2.

    python eval/memory.py --out eval/memory.json

Measured is torch's CPU allocator during real steps (torch.profiler); planned is the rehearsal of ``stepdistill plan``
on fake tensors. Real sizes are planned only: bfloat16 on a card, one 1024x1024 (SD 1.5: 512x512) sample.
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
from stepdistill.data import ShapesData
from stepdistill.evaluation.records import installed_versions
from stepdistill.known_teachers import KNOWN, PREFIX, Known, open_known, open_untrained
from stepdistill.memory import Noise, rehearse, size_of, whole_steps
from stepdistill.models.families import Opened
from stepdistill.placement import Placement
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.recipes import find
from stepdistill.rehearsal import measured_peak

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

    sizes: tuple[str, ...] = tuple(KNOWN)
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


def dmd2(
    source: str, form: str, batch: int, dtype: str = "float32", *, rank: int = 16, checkpointing: bool = False
) -> Recipe:
    """DMD2 with its discriminator, student and critic both ``form``."""
    recipe = find("shapes_sd_dmd2")
    weights = Weights(form="lora", rank=rank) if form == "lora" else Weights()
    guidance = 3.5 if "flux" in source else 3.0
    where = Placement(checkpointing=("student", "critic") if checkpointing else ())
    run = replace(recipe.run, batch=batch, dtype=dtype, steps=4)
    few = ShapesData(count=64)  # captions alone are looked at
    return replace(recipe, teacher=Teacher(source, guidance=guidance), data=few, warm_start=None, student=weights,
                   critic=weights, placement=where, run=run)  # fmt: skip


def both(recipe: Recipe, open_it: Callable[[], Opened]) -> dict[str, Any]:
    """Planned and measured peak of real steps on noise, in bytes."""
    opened = open_it()
    planned = rehearse(recipe, opened)
    noise = Noise(recipe.data, recipe.data.examples(opened, recipe.run.batch))
    stage = replace(recipe, data=noise, warm_start=None)
    opened = open_it()  # a network that no adapters have been put into
    gc.collect()

    def steps() -> None:
        trainer = build(stage, opened=opened).trainer
        for index in whole_steps(trainer) * 2:
            trainer.step(index)

    here = size_of([*opened.denoiser.parameters(), *opened.denoiser.buffers()])
    measured = measured_peak(steps) + here + planned.data
    return {"planned": planned.peak, "measured": measured, "ratio": round(planned.peak / measured, 4)}


def real_size(name: str, form: str, *, checkpointing: bool) -> dict[str, Any]:
    """A known teacher's plan."""
    recipe = dmd2(PREFIX + name, form, 1, "bfloat16", checkpointing=checkpointing)
    m = rehearse(recipe, open_known(name), as_on_cuda=True)
    return {
        "teacher": name, "form": form, "checkpointing": checkpointing, "weights": m.weights, "optimizer": m.optimizer,
        "gradients": m.gradients, "peak": m.peak,
    }  # fmt: skip


def main(given: Arguments) -> None:
    """Plan, measure, print, and write."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"versions": installed_versions(), "bundled": [], "cut_down": [], "real": [], "shared": []}

    def add(part: str, row: dict[str, Any]) -> None:
        found[part].append(row)
        print(part, json.dumps(row), flush=True)
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")

    for name in BUNDLED:
        recipe = replace(find(name), warm_start=None)
        add("bundled", {"recipe": name} | both(recipe, lambda: open_teacher(recipe.teacher)))  # noqa: B023
    for name, known in cut_down().items():
        for form, checkpointing in (("full", False), ("lora", True)):
            recipe = dmd2(PREFIX + name, form, 2, checkpointing=checkpointing)
            row = {"teacher": name, "form": form, "checkpointing": checkpointing}
            add("cut_down", row | both(recipe, lambda: open_untrained(known, device="cpu")))  # noqa: B023
    for batch in (1, 32):
        full, lora = (both(dmd2("bundled:shapes-sd", form, batch), lambda: open_teacher(Teacher("bundled:shapes-sd")))
                      for form in ("full", "lora"))  # fmt: skip
        row = {"teacher": "bundled:shapes-sd", "batch": batch, "three_networks": full, "shared": lora}
        add("shared", row | {"ratio": round(lora["measured"] / full["measured"], 3)})
    for name in given.sizes:
        rows = {form: real_size(name, form, checkpointing=False) for form in ("lora", "full")}
        for row in rows.values():
            add("real", row)
        ratio = round(rows["lora"]["peak"] / rows["full"]["peak"], 3)
        add("shared", {"teacher": name, "batch": 1, "ratio": ratio})
        add("real", real_size(name, "lora", checkpointing=True))
    if given.out:
        put_into_readme("memory", table(found))


def table(found: dict[str, Any]) -> str:
    """Real sizes as Markdown."""
    lines = ["| DMD2, batch 1, bfloat16 | three full networks | shared backbone | ratio | and recomputed activations |",
             "|" + " --- |" * 5]  # fmt: skip
    of = {(r["teacher"], r["form"], r["checkpointing"]): r["peak"] / 1e9 for r in found["real"]}
    for row in found["shared"]:
        name = row["teacher"]
        if name in KNOWN:
            lines.append(
                f"| {name} | {of[name, 'full', False]:.1f} GB | {of[name, 'lora', False]:.1f} GB | {row['ratio']:.2f} "
                f"| {of[name, 'lora', True]:.1f} GB |"
            )
    for row in (r for r in found["shared"] if r["teacher"] not in KNOWN):
        full, lora = (row[key]["measured"] / 1e6 for key in ("three_networks", "shared"))
        lines.append(
            f"| bundled shapes-sd, float32, batch {row['batch']}, measured | {full:.0f} MB | {lora:.0f} MB "
            f"| {row['ratio']:.2f} | |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
