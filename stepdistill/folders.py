"""Folders of exported files: written whole or not at all, and readable without guessing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place when the block ends well.

    It is flushed to disk and renamed, so that ``path`` holds the old folder or the whole new one. (Folders cannot be
    exchanged in one call: a crash between the two renames leaves the old one beside it, as ``.NAME.PID.old``.)

    Raises:
        OSError: if it cannot be written, as on a full disk; what was at ``path`` is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a killed process that had this id
        aside.mkdir()
        yield aside
        for root, _, files in os.walk(aside):
            for name in (*files, "."):
                _fsync(Path(root, name))
        _swap(aside, path)
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and has its own exception for a full disk
        number = error.errno if isinstance(error, OSError) else None
        number = number or (errno.ENOSPC if "os error 28" in str(error) else errno.EIO)
        reason = str(error).strip().splitlines()[0]
        raise OSError(number, f"could not write {path}: {reason}; nothing already there was lost") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    replaces = path.exists()
    if replaces:
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if replaces:
            os.replace(old, path)
        raise
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # the new one is in place; a leftover is not worth failing for


def _fsync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def empty(path: Path) -> bool:
    """Whether there is nothing, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def make_public(folder: Path) -> None:
    """Undo what saving leaves of this machine: paths in configs, and files that nobody else may read."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:  # where it was loaded from
            write_json(file, config)
    mode = next(folder.rglob("*.json")).stat().st_mode
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)  # safetensors leaves it to its owner alone


def write_json(file: Path, value: dict[str, Any]) -> None:
    """As diffusers writes its configs."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """An object of an exported folder.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give the folder of an exported student, or export it again")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text or of its encoding
        raise ValueError(f"{file} is damaged ({error}); export the student again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged (not a JSON object); export the student again")
    return value
