"""Checkpoints: one safetensors file each, written aside and renamed, so that a crash leaves the last one intact."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from stepdistill.models.nets import Nets

FORMAT = "stepdistill-checkpoint-1"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, flush it to disk, then rename it over ``path``.

    Raises:
        OSError: if it cannot be written (a full disk, say); ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(f"could not write {path}: {error}; nothing already there was lost") from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Checkpoints:
    """The numbered checkpoints of one run.

    Args:
        folder: where they lie.
        keep_last: how many to keep.
    """

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def save(
        self, index: int, nets: Nets, optimizers: Mapping[str, Optimizer], window: Mapping[str, tuple[float, int]]
    ) -> Path:
        """Write the state after ``index`` steps and drop checkpoints beyond ``keep_last``.

        Args:
            index: steps done.
            nets: everyone but the teacher is stored.
            optimizers: by name.
            window: sums of metrics not yet written.

        Raises:
            OSError: if the disk is full or not writable; older checkpoints stay.
        """
        tensors = {f"nets.{k}": v for k, v in nets.trainable_state().items()}
        groups: dict[str, Any] = {}
        for name, optimizer in optimizers.items():
            state = optimizer.state_dict()
            groups[name] = state["param_groups"]
            for i, slots in state["state"].items():
                tensors |= {f"optim.{name}.{i}.{slot}": v for slot, v in slots.items()}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        meta = {"format": FORMAT, "index": index, "groups": groups, "window": window}
        path = self.folder / f"{index:08d}.safetensors"
        write_atomically(path, lambda p: save_file(tensors, p, metadata={"stepdistill": json.dumps(meta)}))
        for old in self.paths()[: -self.keep_last]:
            old.unlink()
        return path

    def load(self, nets: Nets, optimizers: Mapping[str, Optimizer]) -> tuple[int, dict[str, tuple[float, int]]] | None:
        """Put the newest good checkpoint into ``nets`` and ``optimizers``.

        Returns:
            Steps done and the open sums of metrics; None if there is no checkpoint.

        Raises:
            ValueError: if checkpoints are there but none can be read, or they belong to other networks.
        """
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                meta, tensors = _read(path)
            except (SafetensorError, OSError, ValueError) as error:
                damaged.append(f"{path.name} ({str(error).splitlines()[0]})")
                warnings.warn(f"checkpoint {path} is damaged and passed over: {damaged[-1]}", stacklevel=2)
                continue
            _restore(path, meta, tensors, nets, optimizers)
            return meta["index"], {k: (v[0], v[1]) for k, v in meta["window"].items()}
        if damaged:
            raise ValueError(f"no checkpoint in {self.folder} can be read: {', '.join(damaged)}; start the run anew")
        return None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        meta = json.loads((file.metadata() or {}).get("stepdistill", "{}"))
        if meta.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT}")
        return meta, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)


def _restore(
    path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], nets: Nets, optimizers: Mapping[str, Optimizer]
) -> None:
    stored = {k.removeprefix("nets."): v for k, v in tensors.items() if k.startswith("nets.")}
    current = nets.trainable_state()
    wrong = sorted(stored.keys() ^ current.keys()) or [k for k in stored if stored[k].shape != current[k].shape]
    if wrong or set(meta["groups"]) != set(optimizers):
        raise ValueError(f"checkpoint {path} belongs to another recipe: {(wrong or sorted(meta['groups']))[0]} differs")
    with torch.no_grad():
        for key, value in current.items():
            value.copy_(stored[key])
    for name, optimizer in optimizers.items():
        prefix = f"optim.{name}."
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                i, slot = key.removeprefix(prefix).split(".")
                state.setdefault(int(i), {})[slot] = value
        optimizer.load_state_dict({"state": state, "param_groups": meta["groups"][name]})
