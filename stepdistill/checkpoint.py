"""Checkpoints: one safetensors file each, written aside and renamed, so that a crash leaves the last one intact."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from stepdistill import distributed
from stepdistill.models.nets import Nets

FORMAT = "stepdistill-checkpoint-2"


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


@dataclass(frozen=True)
class Progressed:
    """What a checkpoint holds beside tensors."""

    index: int
    """Steps done: every stream of randomness, the place in the data and whose turn it is follow from it."""
    window: Mapping[str, tuple[list[float], int]] = field(default_factory=dict)
    """Sums of metrics not yet written, one for each process, and what they count."""
    scales: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Loss scales by turn, and the updates since they changed."""


class Checkpoints:
    """The numbered checkpoints of one run: taken between two steps, written by a thread while the next ones go on.

    A file holds whole tensors, also of networks that are sharded, so that any number of processes can go on from it.

    Args:
        folder: where they lie; the main process alone writes there, all read.
        keep_last: how many to keep.
    """

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last
        self._copies: dict[str, Tensor] = {}
        self._writer: Thread | None = None
        self._failure: BaseException | None = None

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def save(self, done: Progressed, nets: Nets, optimizers: Mapping[str, Optimizer]) -> None:
        """Copy the state to the CPU, and start writing it; checkpoints beyond ``keep_last`` are dropped afterwards.

        Args:
            done: how far the run is.
            nets: everyone but the teacher is stored.
            optimizers: by name.

        Raises:
            OSError: if the checkpoint before could not be written; see ``finish``.
        """
        self.finish()
        tensors = {f"nets.{k}": v for k, v in nets.trainable_state().items()}
        groups: dict[str, Any] = {}
        for name, optimizer in optimizers.items():
            state = optimizer.state_dict()
            groups[name] = state["param_groups"]
            for i, slots in state["state"].items():
                tensors |= {f"optim.{name}.{i}.{slot}": v for slot, v in slots.items()}
        self._copy(tensors)
        if distributed.is_main():
            meta = json.dumps({"format": FORMAT, "groups": groups, **asdict(done)})
            path = self.folder / f"{done.index:08d}.safetensors"
            self._writer = Thread(target=self._write, args=(path, meta), name=f"writes {path.name}")
            self._writer.start()

    def join(self) -> None:
        """Wait for the writer."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def finish(self) -> None:
        """Wait for the writer, and raise what stopped it.

        Raises:
            OSError: if the disk is full or not writable; older checkpoints are as they were.
        """
        self.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Into memory that is kept from one checkpoint to the next: asking for it anew takes longer than copying."""
        if any(hasattr(v, "full_tensor") for v in tensors.values()):
            for key, value in tensors.items():  # one after the other: whole, they may not fit a device together
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                if distributed.is_main():
                    self._copies[key] = whole.detach().cpu()
            return
        if not distributed.is_main():
            return
        for key, value in tensors.items():
            if key not in self._copies:
                plain = {"device": "cpu", "memory_format": torch.contiguous_format}
                self._copies[key] = torch.empty_like(value, pin_memory=value.is_cuda, **plain)
        copies = [self._copies[key] for key in tensors]
        torch._foreach_copy_(copies, [v.detach() for v in tensors.values()], non_blocking=True)
        if any(v.is_cuda for v in tensors.values()):
            torch.cuda.synchronize()

    def _write(self, path: Path, meta: str) -> None:
        try:
            header = {"stepdistill": meta, "sha256": checksum(meta, self._copies)}
            write_atomically(path, lambda aside: save_file(self._copies, aside, metadata=header))
            for old in self.paths()[: -self.keep_last]:
                old.unlink()
        except BaseException as error:
            self._failure = error

    def load(self, nets: Nets, optimizers: Mapping[str, Optimizer]) -> Progressed | None:
        """Put the newest good checkpoint into ``nets`` and ``optimizers``.

        Returns:
            How far the run was; None if there is no checkpoint.

        Raises:
            ValueError: if checkpoints are there but none can be read, or they belong to other networks.
        """
        path = distributed.on_main(self.newest)
        if path is None:
            return None
        meta, tensors = read_checkpoint(path)
        try:
            window = {k: ([float(v) for v in sums], int(count)) for k, (sums, count) in meta["window"].items()}
            scales = {k: (float(scale), int(clean)) for k, (scale, clean) in meta["scales"].items()}
            done = Progressed(int(meta["index"]), window, scales)
            if done.index < 0:
                raise ValueError(f"step {done.index}")
            _restore(path, meta, tensors, nets, optimizers)
        except _OtherRun:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            # its checksum is right, so this is what somebody has written
            raise ValueError(
                f"checkpoint {path} does not hold what this run needs ({type(error).__name__}: {error}); move it away, "
                "and the one before it is taken"
            ) from error
        return done

    def newest(self) -> Path | None:
        """The newest checkpoint whose checksum is right; None if there is no checkpoint at all.

        Raises:
            ValueError: if none can be read.
        """
        for left in self.folder.glob(".*.part"):  # of a writer that was killed
            left.unlink()
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                read_checkpoint(path, verify=True)
                return path
            except (SafetensorError, OSError, ValueError) as error:
                damaged.append(f"{path.name} ({str(error).splitlines()[0]})")
                warnings.warn(f"checkpoint {path} is damaged and passed over: {damaged[-1]}", stacklevel=2)
        if damaged:
            raise ValueError(f"no checkpoint in {self.folder} can be read: {', '.join(damaged)}; start the run anew")
        return None

    def state(self) -> dict[str, Tensor]:
        """Everyone's state in the newest checkpoint, as ``Nets.trainable_state`` names it.

        Raises:
            ValueError: if there is none.
        """
        path = distributed.on_main(self.newest)
        if path is None:
            raise ValueError(f"no checkpoint in {self.folder}; start the run anew")
        return {k.removeprefix("nets."): v for k, v in read_checkpoint(path)[1].items() if k.startswith("nets.")}


def checksum(meta: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over ``meta`` and the names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_checkpoint(path: Path, *, verify: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is in a checkpoint's file, and nothing on disk is touched: its description, and tensors on the CPU.

    Raises:
        SafetensorError: if it is damaged so that it cannot be opened.
        ValueError: if it is none of ours, or, on request, if one of its bytes is not what was written.
    """
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    text = header.get("stepdistill", "")
    if verify and text and header.get("sha256") != checksum(text, tensors):
        raise ValueError("its checksum is wrong: something has changed it since it was written")
    meta = json.loads(text or "{}")
    if meta.get("format") != FORMAT:
        raise ValueError(f"not a {FORMAT}")
    return meta, tensors


class _OtherRun(ValueError):
    """A checkpoint that some other run has written, or nobody's."""


def _restore(
    path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], nets: Nets, optimizers: Mapping[str, Optimizer]
) -> None:
    stored = {k.removeprefix("nets."): v for k, v in tensors.items() if k.startswith("nets.")}
    current = nets.trainable_state()
    unlike = [k for k in stored if k in current and _kind(stored[k]) != _kind(current[k])]
    wrong = sorted(stored.keys() ^ current.keys()) or unlike
    if wrong or set(meta["groups"]) != set(optimizers):
        raise _OtherRun(f"checkpoint {path} belongs to another recipe: {(wrong or sorted(meta['groups']))[0]} differs")
    with torch.no_grad():
        for key, value in current.items():
            value.copy_(_as(value, stored[key]))
    for name, optimizer in optimizers.items():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        prefix = f"optim.{name}."
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                i, slot = key.removeprefix(prefix).split(".")
                like = params[int(i)]
                expected = {"exp_avg": _kind(like), "exp_avg_sq": _kind(like), "step": ((), torch.float32)}  # AdamW's
                if _kind(value) != expected.get(slot, _kind(value)):
                    raise _OtherRun(f"checkpoint {path} belongs to another recipe: {key} differs")
                state.setdefault(int(i), {})[slot] = _as(like, value) if value.shape == like.shape else value
        if any({"exp_avg", "exp_avg_sq"} & set(slots) and len(slots) < 3 for slots in state.values()):
            raise _OtherRun(f"checkpoint {path} is incomplete: some of {name}'s weights lack a part of their state")
        groups = optimizer.state_dict()["param_groups"]
        settings = [_settings(*pair) for pair in zip(groups, meta["groups"][name], strict=True)]
        optimizer.load_state_dict({"state": state, "param_groups": settings})


def _settings(here: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's settings with the numbers that a checkpoint holds for it; how it computes is this machine's."""
    found = dict(here)
    for name, value in here.items():
        if isinstance(value, float):
            found[name] = float(stored[name])
        elif isinstance(value, tuple):
            found[name] = tuple(float(new) for new, _ in zip(stored[name], value, strict=True))
    return found


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _as(like: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, or where ``like`` is sharded this process's shard of it."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
