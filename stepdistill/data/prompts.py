"""Prompts alone, for data-free methods: a file's, a recipe's own, or captions of made-up scenes."""

from __future__ import annotations

import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from stepdistill import shapes
from stepdistill.data.base import CACHE_GB, MEMORY, Data, Setting, epochs
from stepdistill.data.cache import Store, store_in
from stepdistill.data.encoding import encoded
from stepdistill.data.report import Bad, Report
from stepdistill.data.rows import text_in
from stepdistill.objective import Batch, Step


@dataclass(frozen=True)
class PromptSource(Data):
    """A list of prompts: all of them once an epoch, in a new order each time."""

    provides = frozenset()

    memory: float = field(default=MEMORY, kw_only=True)
    """GB that encoded prompts may take on the run's device. Within it each prompt is encoded once, before training;
    beyond it, or at 0, batch by batch, or read from the cache."""
    cache: str = field(default="", kw_only=True)
    """Folder that keeps encoded prompts; runs and processes may share one. Empty is the run's own."""
    cache_gb: float = field(default=CACHE_GB, kw_only=True)
    """GB that it may take; what was used longest ago leaves first."""
    on_bad: Literal["error", "skip"] = field(default="error", kw_only=True)
    """What to do about a row without a text: stop, or leave it out and say how many, in the log and in data.json."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("memory", "cache_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"data.{name} must be at least 0; got {getattr(self, name)}")

    @abstractmethod
    def texts(self, report: Report | None = None) -> list[str]:
        """All prompts, at least one; those left out are taken down in ``report``.

        Raises:
            ValueError: in one line, if they cannot be had.
        """

    def reported(self, setting: Setting) -> list[str]:
        """All prompts, with the run's books on them."""
        report = setting.report or Report()
        texts = self.texts(report)
        report.opened(type(self).__name__, len(texts) + report.skipped)
        return texts

    def store(self, setting: Setting) -> Store | None:
        """The cache on disk."""
        return store_in(self.cache, self.cache_gb, setting.cache)

    def captions(self, n: int) -> list[str]:
        """See ``Data``."""
        return self.texts()[:n]

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        texts = self.reported(setting)
        cond_of = encoded(texts, setting, self.memory, self.store(setting))
        rows_of = epochs(len(texts), setting.batch, setting.seed)
        shape = (setting.batch, *setting.opened.sample_shape)
        return lambda step: Batch(cond_of(rows_of(step.index)), shape)


@dataclass(frozen=True)
class Prompts(PromptSource):
    """Prompts of your own, from a file or listed in the recipe."""

    file: str = ""
    """Text with one prompt a line, or ``.jsonl`` with a "prompt", "text" or "caption" in each line. UTF-8. Prompts are
    taken as they are; blank lines are left out and counted."""
    prompts: tuple[str, ...] = ()
    """The prompts themselves."""

    def __post_init__(self) -> None:
        """Check that there is one source."""
        super().__post_init__()
        if bool(self.file) == bool(self.prompts):
            both = "both are" if self.file else "neither is"
            raise ValueError(f"data Prompts takes a file or prompts; {both} given")
        blank = next((i for i, text in enumerate(self.prompts) if not text.strip()), None)
        if blank is not None:
            raise ValueError(f"data.prompts[{blank}] is blank; leave it out (null_rate gives the empty prompt)")

    def texts(self, report: Report | None = None) -> list[str]:
        """See ``PromptSource``."""
        if self.prompts:
            return list(self.prompts)
        return read_prompts(Path(self.file), skipped=(report or Report()) if self.on_bad == "skip" else None)


def check_made_up(count: int, dropout: float) -> None:
    """Ranges of whatever draws scenes.

    Raises:
        ValueError: naming the field.
    """
    if count < 1:
        raise ValueError(f"data.count must be at least 1; got {count}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"data.dropout must lie in [0, 1]; got {dropout}")


@dataclass(frozen=True)
class ShapesPrompts(PromptSource):
    """Captions of random scenes of ``stepdistill.shapes``, what the bundled text-to-image teachers know."""

    count: int = 8192
    """Captions; many are alike."""
    seed: int = 0
    dropout: float = 0.15
    """Chance of each attribute to be left out of its caption."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_made_up(self.count, self.dropout)

    def texts(self, report: Report | None = None) -> list[str]:
        """See ``PromptSource``."""
        attributes = shapes.random_attributes(self.count, torch.Generator().manual_seed(self.seed))
        return shapes.captions(attributes, self.seed, self.dropout).texts


def read_prompts(path: Path, name: str = "data.file", *, skipped: Report | None = None) -> list[str]:
    """The prompts of a text or ``.jsonl`` file; warns of blank lines.

    Args:
        path: the file.
        name: of the field, in errors.
        skipped: takes down lines that cannot be used; None makes errors of them.

    Raises:
        ValueError: in one line, if it is missing, not UTF-8, has no prompt, or a line of JSON is not as it should be.
    """
    lines = read_utf8(path, name).removesuffix("\n").split("\n")
    kept = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise ValueError(f"{name} {path}: no prompts in it; write one a line")
    if len(kept) < len(lines):
        warnings.warn(f"{path}: {len(lines) - len(kept)} of {len(lines)} lines are blank and left out", stacklevel=2)
    if path.suffix != ".jsonl":
        return [line for _, line in kept]
    texts = []
    for number, line in kept:
        try:
            texts.append(text_in(object_of(line)))
        except Bad as problem:
            if skipped is None:
                raise ValueError(f"{name} {path}, line {number}: {problem}") from problem
            skipped.skip(f"{path.name}, line {number}", problem)
    if not texts:
        raise ValueError(f"{name} {path}: no line can be used; the first: {skipped.first()}")
    return texts


def object_of(line: str) -> dict[str, Any]:
    """A line of JSON.

    Raises:
        Bad: if it is no object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # of numbers with thousands of digits, of nesting
        raise Bad("not JSON", str(error)) from error
    if not isinstance(row, dict):
        raise Bad("no object", "must be {...}")
    return row


def read_utf8(path: Path, name: str) -> str:
    """A file's text, without a byte order mark; ``name`` says in errors what the file is.

    Raises:
        ValueError: if it is missing or not UTF-8; names the place.
    """
    if not path.is_file():
        raise ValueError(f"{name} {path}: no such file")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name} {path}: not UTF-8 at line {line}, byte {error.start} of the file; save it as UTF-8"
        ) from error
