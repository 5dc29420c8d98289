"""Metrics on disk, progress on the terminal, and a warning for a discriminator that has learned nothing."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import rich.progress
import torch
from rich.console import Console
from torch import Tensor

from stepdistill.checkpoint import write_atomically

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
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._guessing: dict[str, int] = {}
        self._last = 0

    def add(self, logs: Mapping[str, Tensor]) -> None:
        """Take in one step's scalars; nothing is read from their device yet."""
        for name, value in logs.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
            self._counts[name] = self._counts.get(name, 0) + 1

    def write(self, index: int) -> dict[str, float]:
        """Append the means as the line of ``index`` and start anew; returns them."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": index, **means}) + "\n")
            except OSError as error:
                raise OSError(f"could not write {self.path}: {error}; the last checkpoint is intact") from error
        self._watch(means, index)
        return means

    def window(self) -> dict[str, tuple[float, int]]:
        """Sums and counts not yet written, for a checkpoint."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}

    def rewind(self, index: int, window: Mapping[str, tuple[float, int]]) -> None:
        """Forget lines after ``index`` and take up the sums that were open there."""
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in window.items()}
        self._counts = {name: count for name, (_, count) in window.items()}
        self._last = index
        if self.path and self.path.exists():
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


def brief(means: Mapping[str, float]) -> str:
    """The terms worth a glance, on one line."""
    shown = [(k, v) for k, v in means.items() if not k.endswith("grad_norm")]
    return "  ".join(f"{k} {v:.3g}" for k, v in shown[:6])


class Progress:
    """A bar with step, losses and time left on a terminal; a plain line every ten seconds elsewhere.

    Args:
        title: what is going on.
        done: steps done already.
        total: steps in all.
    """

    def __init__(self, title: str, done: int, total: int):
        self.title, self.done, self.total = title, done, total
        self.console = Console(stderr=True)
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
        rate = (self.done - self._begun) / max(self._shown - self._start, 1e-9)
        left = f"  {(self.total - self.done) / rate:.0f} s left" if rate > 0 else ""
        print(f"{self.title}  {self.done}/{self.total}{left}  {self._text}".rstrip(), file=sys.stderr, flush=True)
