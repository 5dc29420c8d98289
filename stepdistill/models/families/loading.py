"""From a folder or hub id to a live pipeline that training can start from; whatever is wrong is said in one line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock
from torch import nn
from transformers import PreTrainedTokenizerBase


def load_pipeline(source: str | Path, *, custom_pipeline: str | None = None) -> DiffusionPipeline:
    """Load a pipeline in float32, from safetensors only.

    Args:
        source: a local folder, or a hub id.
        custom_pipeline: file with the pipeline's class, for folders that diffusers has no class for.

    Raises:
        FileNotFoundError: if a local folder is named that is not there.
        ValueError: if it is no pipeline, parts are missing or damaged, or it would run code of its own.
    """
    source, path = str(source), Path(source)
    local = path.exists()
    if not local and (path.is_absolute() or source.startswith(".") or source.count("/") != 1):
        raise FileNotFoundError(f"teacher {source!r}: no such folder; give a pipeline folder or a hub id owner/name")
    if custom_pipeline is not None and not (local and Path(custom_pipeline).is_file()):
        raise ValueError(
            f"custom_pipeline {custom_pipeline!r}: code is run from a local file for a local folder only; "
            "download both, read the code, and name the file"
        )
    parts: dict[str, Any] = {}
    index: dict[str, Any] = {}
    if local:
        index = _read_index(path)
        _refuse_foreign_code(path, index, custom_pipeline)
        _check_folders(path, index)
        # some pipelines (SD3 without T5) must be told once more which parts are not there
        parts = {name: None for name, part in index.items() if part == [None, None]}
        parts |= load_networks(path, index, torch.float32)
    try:
        with _alone_with_modules() if custom_pipeline else nullcontext():
            pipeline = DiffusionPipeline.from_pretrained(
                source,
                custom_pipeline=custom_pipeline,
                dtype=torch.float32,  # always explicit: diffusers and transformers differ in their defaults
                use_safetensors=True,  # a pickle is never opened
                low_cpu_mem_usage=False,
                **({"trust_remote_code": True} if custom_pipeline else {}),
                **parts,
            )
    except Exception as error:  # whatever the loaders raise, the user needs one line that names the source
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"teacher {source!r}: could not be loaded ({type(error).__name__}: {reason})") from error
    if "_max_sequence_length" in index:  # an argument of the call that pipelines cannot record, so loading drops it
        pipeline.register_to_config(_max_sequence_length=index["_max_sequence_length"])
    return pipeline


def _alone_with_modules() -> FileLock:
    """Diffusers copies a pipeline's file over the one in a cache that all processes share, then imports that: another
    process that does so at the same moment may find half a file.
    """
    folder = Path(HF_MODULES_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".stepdistill.lock")


def load_networks(
    folder: Path, index: Mapping[str, Any], dtype: torch.dtype, variant: str | None = None
) -> dict[str, nn.Module]:
    """The networks of a pipeline folder by stock classes, every weight of which comes from its files.

    Stock loading makes up what a file lacks, and drops what it cannot place, with a warning.

    Args:
        folder: of the pipeline.
        index: its model_index.json.
        dtype: of all weights.
        variant: which weights, where there are several.

    Raises:
        ValueError: if one cannot be loaded, or config.json and the weights are of two models.
    """
    networks = {}
    for name, part in index.items():
        if not (isinstance(part, list) and part[0] in ("diffusers", "transformers") and (folder / name).is_dir()):
            continue
        cls = component_class(part)
        if issubclass(cls, nn.Module):
            networks[name] = _load_network(folder / name, cls, dtype, variant)
    return networks


def component_class(part: Sequence[str]) -> type:
    """The class that an entry of model_index.json names."""
    library, name = part
    return getattr(importlib.import_module(library), name)


def _load_network(folder: Path, cls: type, dtype: torch.dtype, variant: str | None) -> nn.Module:
    try:
        network, info = cls.from_pretrained(
            folder, dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever the loaders raise, the user needs one line that names the folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder}: {cls.__name__} cannot be loaded ({reason}); get the pipeline again") from error
    wrong = [f"{key} is {kind}" for kind in ("missing", "unexpected", "mismatched") for key in info[f"{kind}_keys"]]
    if wrong:
        raise ValueError(f"{folder}: weight {sorted(wrong)[0]}; config.json and the weights are of two models")
    return network


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        above = folder.parent / "model_index.json"
        hint = f"; it is a part of the pipeline {str(folder.parent)!r}, name that" if above.is_file() else ""
        raise ValueError(
            f"teacher {str(folder)!r}: no model_index.json there, so it is not a diffusers pipeline folder{hint}"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text or of its encoding
        raise ValueError(f"teacher {str(folder)!r}: model_index.json is damaged ({error})") from error
    if not isinstance(index, dict):
        raise ValueError(f"teacher {str(folder)!r}: model_index.json is damaged (not a JSON object)")
    return index


def _refuse_foreign_code(folder: Path, index: dict[str, Any], custom_pipeline: str | None) -> None:
    """An index that names a .py file of the folder would have it run by diffusers, whatever we pass."""
    name = index.get("_class_name")
    code = folder / f"{name[0]}.py" if isinstance(name, list) else None
    if code is not None and code.is_file() and (custom_pipeline is None or not code.samefile(custom_pipeline)):
        raise ValueError(
            f"teacher {str(folder)!r}: brings its own code, {code.name}, which is not run unasked; read it, then pass "
            f"custom_pipeline={str(code)!r}"
        )


def _check_folders(folder: Path, index: dict[str, Any]) -> None:
    parts = [name for name, part in index.items() if isinstance(part, list) and len(part) == 2 and part[1] is not None]
    missing = [name for name in parts if not name.startswith("_") and not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"teacher {str(folder)!r}: its model_index.json names a part {missing[0]!r}, and there is no folder "
            f"{missing[0]}/; download the pipeline again, whole"
        )


def check_parts(pipeline: DiffusionPipeline) -> None:
    """Training wants float32 weights, and text encoders that know every id of their tokenizers.

    Raises:
        ValueError: naming the part.
    """
    name = type(pipeline).__name__
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            found = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
            if found:
                raise ValueError(
                    f"{name}.{part} holds {', '.join(map(str, found))} weights; training starts from float32: load "
                    "the pipeline with dtype=torch.float32 (run.dtype sets the arithmetic)"
                )
        if part.startswith("tokenizer") and module is not None:
            encoder = pipeline.components.get(part.replace("tokenizer", "text_encoder"))
            if encoder is None or not isinstance(module, PreTrainedTokenizerBase):  # a processor holds more than text
                continue
            rows = encoder.get_input_embeddings().num_embeddings
            if len(module) > rows:
                raise ValueError(
                    f"{name}.{part} has {len(module)} ids, and its text encoder knows {rows}; they are of two models"
                )
