"""Images from an exported student by diffusers' own pipeline: what anybody else's machine makes of the folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from stepdistill.exported import load_exported, load_student, read_configs, stand_in, trained_steps
from stepdistill.inference import FewStep, Parts, optimize_by
from stepdistill.inference.optimized import optimized_of
from stepdistill.inference.sampler import TAKES
from stepdistill.models.families.base import family_for, family_of
from stepdistill.sampling import sample_rngs
from stepdistill.stock import call_parameters

Output = Literal["pil", "uint8", "float"]
Wanted = Sequence[str] | Sequence[int] | Tensor | int
"""Prompts, class labels, or how many."""
Draw = Callable[[Wanted, list[torch.Generator]], Tensor]
"""(part of what is wanted, one generator each) -> (B, C, H, W), or videos (B, T, C, H, W), in [0, 1]."""


@torch.no_grad()
def sample(
    source: str | Path | DiffusionPipeline,
    wanted: Wanted,
    *,
    seed: int = 0,
    first: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    output: Output = "pil",
    optimize: bool | Parts = False,
    **options: Any,
) -> list[Image.Image] | list[list[Image.Image]] | Tensor:
    """Few-step samples of an exported student, made by the stock pipeline with the arguments it was trained under.

    A sample's noise depends on ``seed`` and its number alone, not on its batch. (Flow-matching pipelines draw noise
    between steps, where the rule has any, from torch's own generator; there it depends on the batch too.)

    Args:
        source: a run directory, an exported folder, or the pipeline that ``load_exported`` made of one.
        wanted: prompts, or class labels, or for unconditional students how many.
        seed: of the noise.
        first: number of the first sample.
        steps: for callers that want to be sure; None is what the student was trained for.
        guidance: ``guidance_scale`` of the call; None is the recorded one.
        batch: samples made at once.
        device: where.
        output: PIL images (of videos, a list of frames each), or uint8 or float32 (N, C, H, W) in [0, 1] (of videos,
            (N, T, C, H, W)).
        optimize: sample by the few-step loop of ``stepdistill.optimize`` instead of the pipeline's own call, with its
            parts for the time of this call: the same images to rounding. A pipeline that is optimised already is
            sampled so in any case, and keeps what it cached from call to call.
        options: more arguments of the pipeline's call, such as ``negative_prompt``.

    Raises:
        FileNotFoundError: if there is no exported student.
        ValueError: if it is damaged, ``steps`` is not what it was trained for, or an argument does not fit it.
    """
    wanted = [wanted] if isinstance(wanted, str) else wanted.tolist() if isinstance(wanted, Tensor) else wanted
    n = wanted if isinstance(wanted, int) else len(wanted)
    if n < 1:
        raise ValueError(f"nothing to sample: {wanted!r}; give prompts, labels or a number")
    if guidance is not None:
        options["guidance_scale"] = guidance
    parts = optimize if isinstance(optimize, Parts) else Parts() if optimize else None
    images = None
    with ExitStack() as undo:
        draw = _drawing(source, wanted, steps, torch.device(device), options, parts, undo)
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            part = stop - start if isinstance(wanted, int) else list(wanted[start:stop])
            with torch.random.fork_rng():
                torch.manual_seed(seed + first + start)
                made = draw(part, sample_rngs(seed, range(first + start, first + stop)))
            if images is None:
                images = torch.empty(n, *made.shape[1:])
            images[start:stop] = made
    if output == "float":
        return images
    levels = (images * 255).round().to(torch.uint8)
    return levels if output == "uint8" else _pil(levels)


def folder_of(source: Path) -> Path:
    """The exported folder: itself, or ``pipeline/`` of a run.

    Raises:
        FileNotFoundError: if there is neither.
    """
    folder = source / "pipeline" if (source / "pipeline").is_dir() else source
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{source}: neither a run with a pipeline/ nor a pipeline folder (no model_index.json)")
    return folder


def _drawing(
    source: Any,
    wanted: Wanted,
    steps: int | None,
    device: torch.device,
    options: dict[str, Any],
    parts: Parts | None,
    undo: ExitStack,
) -> Draw:
    if isinstance(source, DiffusionPipeline):
        return _stock(source, wanted, steps, device, options, parts, undo)
    folder = folder_of(Path(source))
    index, scheduler = read_configs(folder)
    _check_steps(steps, trained_steps(folder, index, scheduler), scheduler)
    if isinstance(index["_class_name"], list):
        return _own(folder, scheduler, wanted, device, options, parts)
    return _stock(load_exported(folder), wanted, steps, device, options, parts, undo)


def _stock(
    pipeline: DiffusionPipeline,
    wanted: Wanted,
    steps: int | None,
    device: torch.device,
    options: dict[str, Any],
    parts: Parts | None,
    undo: ExitStack,
) -> Draw:
    record, name = pipeline.scheduler.config.get("_student"), type(pipeline).__name__
    if record is None:
        raise ValueError(f"this {name} is no exported student; export one with save_pipeline")
    _check_steps(steps, len(record["times"]), pipeline.scheduler)
    _check_wanted(wanted, record["takes"])
    known = call_parameters(pipeline)
    _refuse(name, [key for key in options if key not in known])
    family = family_of(pipeline)
    pipeline.to(device).set_progress_bar_config(disable=True)
    optimized = optimized_of(pipeline)
    if parts is not None and optimized is None:
        optimized = undo.enter_context(optimize_by(pipeline, parts))
    if optimized is not None:
        _refuse("the few-step loop", [key for key in options if key not in TAKES])
        sampler = optimized.sampler
        return lambda part, rngs: sampler.images(part, rngs, **options)
    dtype = pipeline.components[family.module].dtype

    def draw(part: Wanted, rngs: list[torch.Generator]) -> Tensor:
        call = record["call"] | options | {record["takes"]: part}
        if "latents" in known:  # others draw the same numbers themselves
            noise = randn_tensor((len(rngs), *record["shape"]), rngs, device, torch.float32)
            call["latents"] = family.pack(noise).to(dtype)
        made = pipeline(**call, generator=rngs, output_type="np")
        array = np.asarray(made.frames if hasattr(made, "frames") else made.images, dtype=np.float32)
        return torch.from_numpy(array).movedim(-1, -3)

    return draw


def _own(
    folder: Path,
    scheduler: SchedulerMixin,
    wanted: Wanted,
    device: torch.device,
    options: dict[str, Any],
    parts: Parts | None,
) -> Draw:
    """Class-conditional students, whose folder brings code: it is not run, their network is sampled here."""
    _refuse(folder.name, list(options))
    _check_wanted(wanted, "class_labels")
    student = load_student(folder).to(device)
    family = family_for(student.net, scheduler)
    pipeline = stand_in(student.net, scheduler)
    shape = family.sample_shape(pipeline, None)
    loop = FewStep(student)
    if parts is not None and parts.cuda_graph:
        raise ValueError(f"cuda_graph: {folder.name} brings its pipeline's own code, which has none; leave it out")
    if parts is not None:
        optimize_by(pipeline, parts)  # for as long as the network lives, which is this call

    def draw(part: Wanted, rngs: list[torch.Generator]) -> Tensor:
        cond = family.cond(student.net, {"labels": torch.tensor(part, device=device)})
        noise = randn_tensor((len(rngs), *shape), rngs, device, torch.float32)
        if parts is None:
            images = student.sampler.run(student, noise, cond, rngs)
        else:
            fresh = [randn_tensor(noise.shape, rngs, device, torch.float32) for _ in range(loop.plan.draws)]
            with torch.inference_mode():
                images = loop.run(noise, torch.stack(fresh) if fresh else None, cond, *loop.table(len(rngs), device))
        return (images / 2 + 0.5).clamp(0, 1)

    return draw


def _check_steps(steps: int | None, trained: int, scheduler: SchedulerMixin) -> None:
    if steps is None or steps == trained:
        return
    scheduler.set_timesteps(trained)
    grid = ", ".join(f"{t:g}" for t in scheduler.timesteps.tolist())
    raise ValueError(
        f"steps {steps}: this student was trained for {trained} (timesteps {grid}); use steps {trained}, or distil one "
        f"for {steps}"
    )


def _check_wanted(wanted: Wanted, takes: str) -> None:
    what = {"prompt": "prompts", "class_labels": "class labels", "batch_size": "a number of samples"}[takes]
    if isinstance(wanted, int):
        fits = takes == "batch_size"
    else:
        fits = takes != "batch_size" and all(isinstance(w, str if takes == "prompt" else int) for w in wanted)
    if not fits:
        raise ValueError(f"this student takes {what}; got {wanted!r}")


def _refuse(name: str, unknown: Sequence[str]) -> None:
    if unknown:
        raise ValueError(f"{unknown[0]}: {name} takes no such argument; leave it out")


def _pil(levels: Tensor) -> list[Any]:
    if levels.ndim == 5:
        return [_pil(video) for video in levels]
    arrays = levels.movedim(1, -1).numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
