"""Opening a pretrained pipeline: which module denoises, how it is called, what it predicts and on which schedule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond, Denoiser
from stepdistill.schedule import DiscreteVP, Kind, Schedule


@dataclass(frozen=True)
class Family:
    """One row: everything that differs between pipelines."""

    name: str
    net_class: str
    """Class of the denoising network, as diffusers names it."""
    module: str
    """Component of the pipeline that holds it."""
    schedule: Callable[[SchedulerMixin], Schedule]
    kind: Callable[[SchedulerMixin], Kind]
    call: Callable[[SchedulerMixin], Call]
    """Makes the only code that knows the network's forward arguments."""
    cond: Callable[[nn.Module, Mapping[str, Any]], Cond]
    """(network, {"labels": ...}) -> conditions; checks ranges."""
    null: Callable[[DiffusionPipeline], Cond | None]
    """The unconditional condition, each tensor (1, ...); None where the pipeline has none."""
    examples: Callable[[DiffusionPipeline, int], Cond]
    """Conditions of n samples to look at, spread over what the model knows."""
    sample_shape: Callable[[nn.Module], tuple[int, ...]]
    """Shape of one sample."""
    taps: Callable[[nn.Module], tuple[tuple[str, int], ...]]
    """(submodule, channels) of the features a discriminator reads by default."""


@dataclass(frozen=True)
class Opened:
    """A pretrained pipeline, opened."""

    family: Family
    denoiser: Denoiser
    null: Cond | None
    sample_shape: tuple[int, ...]
    pipeline: DiffusionPipeline
    """The live pipeline; its denoising network is ``denoiser.net``."""


FAMILIES: dict[str, Family] = {}
"""By class of the denoising network."""


def add_family(family: Family) -> Family:
    """Put a family into the table."""
    FAMILIES[family.net_class] = family
    return family


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a live pipeline.

    Raises:
        ValueError: if no family handles any of its networks; says what one file would have to provide.
    """
    for component in pipeline.components.values():
        family = FAMILIES.get(type(component).__name__)
        if family is not None:
            return family
    networks = [type(c).__name__ for c in pipeline.components.values() if isinstance(c, nn.Module)]
    raise ValueError(
        f"no family for {type(pipeline).__name__} (networks: {', '.join(networks) or 'none'}); known: "
        f"{', '.join(sorted(FAMILIES))}. A new one is one file in stepdistill/models/families with a Family row: "
        "schedule, kind, call, conditions, sample shape and taps"
    )


def open_pipeline(
    source: str | Path | DiffusionPipeline, *, custom_pipeline: str | None = None, dtype: torch.dtype = torch.float32
) -> Opened:
    """Open a pretrained pipeline for distillation.

    Args:
        source: a local folder, a hub id, or a live pipeline.
        custom_pipeline: file with the pipeline's class, for folders that diffusers has no class for.
        dtype: the network's arithmetic; weights are loaded in float32.

    Returns:
        Its denoiser, null condition, sample shape and the pipeline itself.

    Raises:
        FileNotFoundError: if a local folder is named that is not there.
        ValueError: if the weights are missing or damaged, or no family handles it.
    """
    pipeline = source if isinstance(source, DiffusionPipeline) else _load(str(source), custom_pipeline)
    family = family_of(pipeline)
    net, scheduler = pipeline.components[family.module], pipeline.scheduler
    denoiser = Denoiser(net, family.schedule(scheduler), family.kind(scheduler), family.call(scheduler), dtype)
    return Opened(family, denoiser, family.null(pipeline), family.sample_shape(net), pipeline)


def _load(source: str, custom_pipeline: str | None) -> DiffusionPipeline:
    path = Path(source)
    if not path.exists() and (path.is_absolute() or source.startswith(".") or source.count("/") != 1):
        raise FileNotFoundError(f"teacher {source!r}: no such folder; give a pipeline folder or a hub id owner/name")
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(f"teacher {source!r}: no model_index.json there, so it is not a diffusers pipeline folder")
    if custom_pipeline is not None and not (path.exists() and Path(custom_pipeline).is_file()):
        raise ValueError(
            f"custom_pipeline {custom_pipeline!r}: code is run from a local file for a local folder only; "
            "download both, read the code, and name the file"
        )
    if path.exists():
        _refuse_foreign_code(path, custom_pipeline)
    try:
        # safetensors only: a pickle is never opened. dtype is always explicit, see the diffusers/transformers defaults.
        return DiffusionPipeline.from_pretrained(
            source,
            custom_pipeline=custom_pipeline,
            dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            **({"trust_remote_code": True} if custom_pipeline else {}),
        )
    except Exception as error:  # whatever the loaders raise, the user needs one line that names the source
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"teacher {source!r}: could not be loaded ({type(error).__name__}: {reason})") from error


def _refuse_foreign_code(folder: Path, custom_pipeline: str | None) -> None:
    """A folder whose index names a .py file of its own would have it run by diffusers, whatever we pass.

    Raises:
        ValueError: if it does, and the file is not the one that was asked for.
    """
    try:
        name = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"teacher {str(folder)!r}: model_index.json is damaged ({error})") from error
    code = folder / f"{name[0]}.py" if isinstance(name, list) else None
    if code is not None and code.is_file() and (custom_pipeline is None or not code.samefile(custom_pipeline)):
        raise ValueError(
            f"teacher {str(folder)!r}: brings its own code, {code.name}, which is not run unasked; read it, then pass "
            f"custom_pipeline={str(code)!r}"
        )


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


def table_index(t: Tensor, n: int, like: Tensor) -> Tensor:
    """Times in (0, 1] as indices of an n-entry table, ``n t - 1``, in ``like``'s dtype; 0 below the first entry."""
    return (t * n - 1).clamp_min(0).to(like.dtype)
