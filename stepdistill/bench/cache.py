"""What was measured once, kept under everything it depends on: small JSON files, one for each outcome."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import stepdistill

FORMAT = 1
CODE = ("schedule.py", "sampling.py", "student.py", "stock.py", "exported.py", "shapes.py", "lora_files.py")
"""With the packages below, the code that makes numbers: between releases a version alone says nothing."""
CODE_FOLDERS = ("functional", "models", "evaluation", "data")
LAYOUT = ("columns", "grids", "page", "plots", "records", "report", "tables")
NOT_NUMBERS = tuple(f"evaluation/{name}.py" for name in LAYOUT)
KEPT_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""What a pipeline's outcome depends on; pictures and cards are left aside."""


def default_folder() -> Path:
    """Where outcomes are kept unless somebody says otherwise: beside the user's other caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepdistill" / "bench"


class Cache:
    """A folder of outcomes by key, and the hashes of files that keys are made of.

    Several processes may write to one folder: every file is written aside and renamed.

    Args:
        folder: made if it is not there.

    Raises:
        OSError: if nothing can be written there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write(folder / ".writable", "")
        except OSError as error:
            raise OSError(f"--cache {folder}: cannot be written to ({error.strerror}); name another folder") from error
        self._hashes = self._stored_hashes()
        self._stored = dict(self._hashes)
        self._loaded: dict[str, dict[str, Any]] = {}

    def path(self, key: str) -> Path:
        """The file of an outcome."""
        return self.folder / key[:2] / f"{key}.json"

    def load(self, key: str) -> dict[str, Any] | None:
        """The outcome under ``key``; None if there is none, or, with a warning, if it is damaged."""
        if key in self._loaded:
            return self._loaded[key]
        path = self.path(key)
        try:
            entry = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:  # not JSON, or not UTF-8
            return self._damaged(path, str(error))
        match entry:
            case {"format": int(kind), "key": str(own), "sha256": str(digest), "value": dict(value)}:
                if (kind, own) == (FORMAT, key) and digest == _digest(value):
                    self._loaded[key] = value
                    return value
        return self._damaged(path, "its contents are not those that were written")

    def save(self, key: str, facts: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Keep an outcome, with the facts that its key was made of, for people who wonder."""
        entry = {"format": FORMAT, "key": key, "facts": facts, "sha256": _digest(value), "value": value}
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(path, json.dumps(entry))

    def file_hash(self, path: Path) -> str:
        """SHA-256 of a file, read again only when its size or time of change is another."""
        real = os.path.realpath(path)
        stat = os.stat(real)
        known = self._hashes.get(real)
        if known is None or known[:2] != [stat.st_size, stat.st_mtime_ns]:
            digest = hashlib.sha256()
            with open(real, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            known = self._hashes[real] = [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]
        return known[2]

    def folder_hash(self, folder: Path) -> str:
        """SHA-256 over the configs and weights of a folder, and their names."""
        files = sorted(p for p in folder.rglob("*") if p.suffix in KEPT_FILES and p.is_file())
        return _digest({str(p.relative_to(folder)): self.file_hash(p) for p in files})

    def code_hash(self) -> str:
        """SHA-256 over the library's own code that makes numbers."""
        return _digest({name: self.file_hash(path) for name, path in _code_files().items()})

    def flush(self) -> None:
        """Keep the hashes of files."""
        if self._hashes != self._stored:
            self._write(self.folder / "files.json", json.dumps(self._hashes))
            self._stored = dict(self._hashes)

    def _stored_hashes(self) -> dict[str, list]:
        try:
            stored = json.loads((self.folder / "files.json").read_bytes())
        except (FileNotFoundError, ValueError):  # hashes are made again, so a damaged file costs nothing else
            return {}
        return stored if isinstance(stored, dict) else {}

    def _damaged(self, path: Path, reason: str) -> None:
        warnings.warn(f"cache entry {path} is damaged ({reason}); it is measured again", stacklevel=3)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def key_of(facts: Mapping[str, Any]) -> str:
    """The key of an outcome: SHA-256 over everything it depends on."""
    return _digest(facts)


@lru_cache(maxsize=1)
def _code_files() -> dict[str, Path]:
    root = Path(stepdistill.__file__).parent
    files = [root / name for name in CODE] + [p for name in CODE_FOLDERS for p in (root / name).rglob("*.py")]
    named = {p.relative_to(root).as_posix(): p for p in files}
    return {name: named[name] for name in sorted(named) if name not in NOT_NUMBERS}


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
