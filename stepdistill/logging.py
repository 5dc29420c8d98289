"""Metrics on disk and in trackers, progress on the terminal, a warning for a discriminator that learns nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import rich.progress
import torch
from rich.console import Console
from torch import Tensor

from stepdistill import distributed
from stepdistill.checkpoint import write_atomically

Line = dict[str, Any]
"""One line of a file of a run's figures: ``step``, and figures by name."""
CHANCE = 0.55
"""Mean accuracy below which a discriminator counts as guessing."""
PATIENCE = 300
"""Steps it may guess before a warning."""


class MetricsFile:
    """Means of logged scalars over the steps since the last line, one JSON object a line.

    Args:
        path: metrics.jsonl; None keeps nothing on disk.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._sums: dict[str, Tensor | float] = {}  # of this process; a mean over all is taken when it is written
        self._counts: dict[str, int] = {}
        self._guessing: dict[str, int] = {}
        self._last = 0

    def add(self, logs: Mapping[str, Tensor]) -> None:
        """Take in one step's scalars; nothing is read from their device yet."""
        for name, value in logs.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
            self._counts[name] = self._counts.get(name, 0) + 1

    def write(self, index: int) -> dict[str, float]:
        """Append the means, over all processes, as the line of ``index`` and start anew; returns them."""
        means = {name: math.fsum(sums) / len(sums) / count for name, (sums, count) in self.window().items()}
        self._sums, self._counts = {}, {}
        if self.path and distributed.is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": index, **means}) + "\n")
            except OSError as error:
                raise OSError(f"could not write {self.path}: {error}; the last checkpoint is intact") from error
        self._watch(means, index)
        return means

    def window(self) -> dict[str, tuple[list[float], int]]:
        """Sums not yet written, one for each process, and counts, for a checkpoint."""
        each = distributed.gathered([float(total) for total in self._sums.values()])
        return {name: ([sums[i] for sums in each], self._counts[name]) for i, name in enumerate(self._sums)}

    def rewind(self, index: int, window: Mapping[str, tuple[list[float], int]]) -> None:
        """Forget lines after ``index`` and take up the sums that were open there."""
        self._sums, self._counts = {}, {}
        for name, (sums, count) in window.items():
            # with another number of processes each goes on from the mean
            own = sums[distributed.rank()] if len(sums) == distributed.world() else math.fsum(sums) / len(sums)
            self._sums[name] = torch.tensor(own, dtype=torch.float64)
            self._counts[name] = count
        self._last = index
        if self.path and self.path.exists() and distributed.is_main():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= index]
            write_atomically(self.path, lambda aside: aside.write_text("".join(f"{line}\n" for line in kept)))

    def _watch(self, means: Mapping[str, float], index: int) -> None:
        for name, value in means.items():
            if not name.endswith("disc_accuracy"):
                continue
            before = self._guessing.get(name, 0)
            if before < 0:
                continue  # it has been warned about
            guessing = before + index - self._last if value < CHANCE else 0
            if guessing >= PATIENCE:
                warnings.warn(
                    f"{name} has stayed below {CHANCE} for {guessing} steps (0.5 is chance): either the discriminator "
                    "does not learn (raise its learning rate, look at lower noise with gan.times, tap earlier "
                    "features), or the student leaves it nothing to see; compare with gan.weight 0",
                    stacklevel=2,
                )
                guessing = -1
            self._guessing[name] = guessing
        self._last = index


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")  # the torn last line of a killed process: after every checkpoint


def read_lines(path: Path) -> list[Line]:
    """The lines of a JSON lines file of a run, up to a torn or damaged one; none where there is no file."""
    if not path.is_file():
        return []
    lines: list[Line] = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # of the text, of its encoding, or brackets without end
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def brief(means: Mapping[str, float]) -> str:
    """The terms worth a glance, on one line."""
    shown = [(k, v) for k, v in means.items() if not k.endswith("grad_norm")]
    return "  ".join(f"{k} {v:.3g}" for k, v in shown[:6])


class Progress:
    """A bar with step, losses and time left on a terminal; a plain line every ten seconds elsewhere; nothing in
    processes beside the main one.

    Args:
        title: what is going on.
        done: steps done already.
        total: steps in all.
    """

    def __init__(self, title: str, done: int, total: int):
        self.title, self.done, self.total = title, done, total
        self.console = Console(stderr=True, quiet=not distributed.is_main())
        self._text = ""
        self._shown = self._start = time.monotonic()
        self._begun = done
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("[bold]{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, text="")

    def __enter__(self) -> Progress:
        """Show it."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._bar.stop()
        if not self.console.is_terminal:
            self._line()

    def advance(self, n: int = 1) -> None:
        """``n`` more are done."""
        self.done += n
        self._bar.advance(self._task, n)
        if not self.console.is_terminal and time.monotonic() - self._shown > 10:
            self._line()

    def show(self, means: Mapping[str, float]) -> None:
        """Losses to show beside the bar."""
        self._text = brief(means)
        self._bar.update(self._task, text=self._text)

    def _line(self) -> None:
        self._shown = time.monotonic()
        if not distributed.is_main():
            return
        rate = (self.done - self._begun) / max(self._shown - self._start, 1e-9)
        left = f"  {(self.total - self.done) / rate:.0f} s left" if rate > 0 else ""
        print(f"{self.title}  {self.done}/{self.total}{left}  {self._text}".rstrip(), file=sys.stderr, flush=True)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: naming what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"run.trackers: {name!r} is not installed; pip install 'stepdistill[{name}]'")


class Trackers:
    """TensorBoard and Weights & Biases, by accelerate's trackers, in the main process; metrics.jsonl is there anyway.

    Args:
        names: of tensorboard, wandb.
        out: run directory. TensorBoard's files lie in ``out/tensorboard``; W&B's project is the folder's parent.
        index: steps done: curves of a resumed run go on from there.
    """

    def __init__(self, names: Sequence[str], out: Path, index: int):
        self._open = []
        if not names or not distributed.is_main():
            return
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState(cpu=not torch.cuda.is_available())  # what accelerate's trackers ask who they are
        folder = out.absolute()
        for name in names:
            if name == "tensorboard":
                self._open.append(TensorBoardTracker(name, folder, purge_step=index + 1))
            else:
                key = hashlib.blake2b(str(folder).encode(), digest_size=6).hexdigest()  # the same run when resumed
                about = {"name": folder.name, "dir": str(folder), "id": key, "resume": "allow"}
                self._open.append(WandBTracker(folder.parent.name, **about))
        for tracker in self._open:
            tracker.start()

    def log(self, means: Mapping[str, float], index: int) -> None:
        """Scalars of step ``index``."""
        for tracker in self._open:
            tracker.log(dict(means), step=index)

    def close(self) -> None:
        """Write what is left."""
        for tracker in self._open:
            tracker.finish()
