"""What is written to ``assets/``: half-precision files that load as float32, and the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.folders import make_public
from stepdistill.paths import project_dir

Module = TypeVar("Module", bound=nn.Module)
SD_FOLDER = project_dir("assets") / "shapes-sd"
SD3_FOLDER = project_dir("assets") / "shapes-sd3"
JUDGES = project_dir("assets") / "shapes-judges"


def halves(model: nn.Module) -> dict[str, Tensor]:
    """Weights as they are stored."""
    return {name: value.contiguous().half() for name, value in model.state_dict().items()}


def rounded(model: Module) -> Module:
    """The model in place, with the weights that its file will hold; in eval mode, without gradients."""
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    return model.eval().requires_grad_(False)


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Configurations say float32, weights are stored as float16: half the size, and float32 after any load."""
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.safetensors"):
        weights = {name: value.half() for name, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    make_public(folder)


def hashes(folder: Path) -> dict[str, dict[str, str | int]]:
    """SHA-256 and size of every file but the manifest."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "MANIFEST.json"):
        data = path.read_bytes()
        files[path.relative_to(folder).as_posix()] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return files


def write_manifest(folder: Path, figures: dict[str, object]) -> None:
    """``MANIFEST.json``: the command, versions, what was measured, and the files."""
    import diffusers
    import open_clip
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers, open_clip)}
    manifest = {"command": "python train/shapes_teachers.py", "threads": 1, "versions": versions}
    manifest |= figures | {"files": hashes(folder)}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
