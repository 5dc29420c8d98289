"""Where weights of extractors come from: a path, or a folder that an environment variable names. Nothing is fetched."""

from __future__ import annotations

import hashlib
import os
import pickle
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = "STEPDISTILL_WEIGHTS"
"""Environment variable: the folder with the weights of extractors."""


def find_weights(given: str | PathLike[str] | None, name: str, what: str) -> Path:
    """A file or folder of weights.

    Args:
        given: its path; None for ``name`` in the folder that ``STEPDISTILL_WEIGHTS`` names.
        name: of the published file or folder.
        what: stands in the message: what it is and where it is published.

    Raises:
        FileNotFoundError: if it is not there; says which file, and where to put it.
    """
    folder = os.environ.get(WEIGHTS)
    path = Path(given) if given is not None else Path(folder) / name if folder else None
    if path is not None and path.exists():
        return path
    at = f"at {path}" if path is not None else f"given, and {WEIGHTS} is not set"
    raise FileNotFoundError(
        f"no {what} {at}; pass its path, or put {name} into a folder and name that folder in {WEIGHTS}"
    )


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a .pth/.pt by torch's reader that runs no code.

    Raises:
        ValueError: if the file is damaged or holds something else than tensors by name.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a whole file of weights ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold tensors by name, got {type(state).__name__}")
    return state


def sha256_of(path: Path) -> str:
    """Of a file; of a folder that of its configuration and safetensors files, in the order of their names."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()
