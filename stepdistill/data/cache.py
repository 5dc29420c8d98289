"""What is costly to make, kept on disk: whole tables in one file each, and a bounded store of single entries."""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.checkpoint import write_atomically

DIGEST = 32
"""Bytes of the checksum at the head of an entry."""
AFTER_EVICTION = 0.9
"""Share of its bound to which a full store is emptied, so that not every further entry looks for the oldest."""


def cached(
    folder: Path | None, kind: str, key: str, names: Sequence[str], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What ``make`` returns, made once and kept as ``folder/KIND-HASH.safetensors``; a damaged file is made anew.

    Of several processes that ask at once, one makes it and the others wait.

    Args:
        folder: the run's cache; None keeps nothing.
        kind: beginning of the file's name.
        key: everything that the tensors depend on; hashed.
        names: of the tensors.
        make: makes them.
    """
    if folder is None:
        return make()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    with _alone(path):
        if path.is_file():
            try:
                stored = load_file(path)
                return {name: stored[name] for name in names}
            except (SafetensorError, KeyError) as error:
                warnings.warn(f"{path} is damaged ({error}) and is made anew", stacklevel=2)
        tensors = make()
        write_atomically(path, lambda p: save_file({k: v.contiguous() for k, v in tensors.items()}, p))
        return tensors


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process at a time is here with that path."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{path}: another process is making it; waiting", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def store_in(folder: str, gigabytes: float, default: Path | None) -> Store | None:
    """The store in a folder that the user has named, or, if that is empty, in the run's own; None without either."""
    chosen = Path(folder) if folder else default
    return None if chosen is None else Store(chosen, gigabytes)


class _Entry(NamedTuple):
    used: int  # nanoseconds
    size: int
    path: Path


class Store:
    """Tensors by key, one small file each, for any number of runs and processes at once.

    A file is written aside and renamed, and starts with a checksum: what is read is whole or counts as absent, and
    whoever misses an entry makes it and puts it back. So a fill that was killed goes on where it stopped, and two that
    run at once do no harm. Beyond the bound those entries leave that were used longest ago, but none that was used
    since the oldest process that is still at work opened the store; where nothing can leave, nothing more is kept,
    which is said once.

    Locks are ``flock``'s (filelock 3): of the machine, or of a network file system that has them.

    Keys are names of files, ``KIND-HASH``.

    Args:
        folder: may be shared by runs; made if it is not there.
        gigabytes: of 10^9 bytes; the bound.

    Raises:
        OSError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path, gigabytes: float):
        self.folder, self.limit = folder / "entries", int(gigabytes * 1e9)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            with self._lock:
                (self.folder / ".now").touch()  # entries' clock, which is a file server's perhaps
                now = (self.folder / ".now").stat().st_mtime_ns
                self._lease = FileLock(self.folder / f"{now}-{uuid.uuid4().hex}.lease")
                self._lease.acquire()
                self._set_total(sum(entry.size for entry in self._entries()))  # a killed process may have left it wrong
                for part in self.folder.glob("*/*.part"):  # written under the lock only, so nobody's
                    part.unlink()
        except OSError as error:
            raise OSError(f"cache {folder}: cannot be written to ({error}); name another with data.cache") from error
        self._closed_to_new = False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors kept under ``key``; None if there are none, or, with a warning, if the entry is damaged."""
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            if hashlib.sha256(raw[DIGEST:]).digest() != raw[:DIGEST]:
                raise ValueError("its checksum is wrong")
            tensors = safetensors.torch.load(raw[DIGEST:])
        except (SafetensorError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}) and is made anew", stacklevel=2)
            return None
        with suppress(FileNotFoundError):  # another process may have made room just now
            os.utime(path)
        return tensors

    def has(self, key: str) -> bool:
        """Whether there is an entry, whole or not."""
        return self._path(key).is_file()

    def put(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep tensors by key, in place of what is there; those that find no room are left out, which is said once."""
        if self._closed_to_new:
            return
        packed = {key: _packed(tensors) for key, tensors in entries.items()}
        with self._lock:
            total = self._total()
            try:
                for key, raw in packed.items():
                    path = self._path(key)
                    grows = len(raw) - (path.stat().st_size if path.is_file() else 0)
                    if total + grows > self.limit:
                        total = self._make_room(total, grows)
                    if total + grows > self.limit:
                        self._close(f"holds {self.limit / 1e9:g} GB that are all in use; raise data.cache_gb")
                        break
                    path.parent.mkdir(exist_ok=True)
                    aside = path.with_suffix(".part")
                    aside.write_bytes(raw)
                    os.replace(aside, path)
                    total += grows
            except OSError as error:
                self._close(f"cannot be written to ({error})")
            self._set_total(total)

    def bytes(self) -> int:
        """Size of all entries."""
        return self._total()

    def close(self) -> None:
        """What this store has used may leave from now on; a process that ends does so too."""
        self._lease.release()
        Path(self._lease.lock_file).unlink(missing_ok=True)

    def _close(self, reason: str) -> None:
        self._closed_to_new = True
        warnings.warn(f"cache {self.folder} {reason}; whatever it lacks is made anew each time", stacklevel=4)

    def _path(self, key: str) -> Path:
        return self.folder / key[-2:] / f"{key}.entry"

    def _entries(self) -> Iterator[_Entry]:
        for path in self.folder.glob("??/*.entry"):
            stat = path.stat()
            yield _Entry(stat.st_mtime_ns, stat.st_size, path)

    def _make_room(self, total: int, wanted: int) -> int:
        """Drop entries, under the lock, until ``wanted`` bytes fit, or as many as may leave; the new total."""
        in_use_since = self._oldest_lease()
        for entry in sorted(self._entries()):
            if total <= AFTER_EVICTION * self.limit - wanted or entry.used >= in_use_since:
                break
            entry.path.unlink()
            total -= entry.size
        return total

    def _oldest_lease(self) -> int:
        """When the oldest process that is still at work began, in nanoseconds; leases of dead ones are dropped."""
        begun = []
        for path in self.folder.glob("*.lease"):
            if str(path) != self._lease.lock_file and not _is_held(path):
                path.unlink(missing_ok=True)
            else:
                begun.append(int(path.name.partition("-")[0]))
        return min(begun)

    def _total(self) -> int:
        return int((self.folder / ".total").read_text())

    def _set_total(self, total: int) -> None:
        aside = self.folder / ".total.part"
        aside.write_text(str(total))
        os.replace(aside, self.folder / ".total")


def _is_held(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    raw = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    return hashlib.sha256(raw).digest() + raw
