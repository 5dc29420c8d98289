"""Prompts alone, for data-free methods: a file's, a recipe's own, or captions of made-up scenes."""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stepdistill import shapes
from stepdistill.data.base import MEMORY, Data, Setting, companions, epochs, lent, to_device
from stepdistill.logging import Progress
from stepdistill.models.denoiser import Cond
from stepdistill.objective import Batch, Step

COLUMNS = ("prompt", "text", "caption")
"""Where a line of JSON has its text; the first one that is there counts."""
AT_ONCE = 64
"""Prompts encoded together."""


@dataclass(frozen=True)
class PromptSource(Data):
    """A list of prompts: all of them once an epoch, in a new order each time."""

    provides = frozenset()

    memory: float = field(default=MEMORY, kw_only=True)
    """GB that encoded prompts may take on the run's device. Within it each prompt is encoded once, before training;
    beyond it, or at 0, batch by batch."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.memory >= 0:
            raise ValueError(f"data.memory must be at least 0; got {self.memory}")

    @abstractmethod
    def texts(self) -> list[str]:
        """All prompts, at least one.

        Raises:
            ValueError: in one line, if they cannot be had.
        """

    def captions(self, n: int) -> list[str]:
        """See ``Data``."""
        return self.texts()[:n]

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        texts = self.texts()
        cond_of = encoded(texts, setting, self.memory)
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

    def texts(self) -> list[str]:
        """See ``PromptSource``."""
        return list(self.prompts) or read_prompts(Path(self.file))


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

    def texts(self) -> list[str]:
        """See ``PromptSource``."""
        attributes = shapes.random_attributes(self.count, torch.Generator().manual_seed(self.seed))
        return shapes.captions(attributes, self.seed, self.dropout).texts


def encoded(texts: Sequence[str], setting: Setting, memory: float) -> Callable[[Tensor], Cond]:
    """A function from row numbers (B,) of ``texts`` to their conditions, each (B, ...) on the run's device.

    Args:
        texts: prompts; those that occur twice are encoded once.
        setting: the run.
        memory: GB that the table of all of them may take; beyond it they are encoded whenever they are asked for.

    Raises:
        ValueError: if the teacher takes no prompts.
    """
    opened, device = setting.opened, setting.device
    unique = list(dict.fromkeys(texts))
    with lent(opened, device, vae=False):
        parts = [to_device(opened.encode(unique[:AT_ONCE]), device)]
        size = sum(v.nbytes for v in parts[0].values()) / len(unique[:AT_ONCE])
        whole = size * len(unique) <= memory * 1e9
        if whole and len(unique) > AT_ONCE:
            with Progress("encoding prompts", AT_ONCE, len(unique)) as progress:
                for start in range(AT_ONCE, len(unique), AT_ONCE):
                    parts.append(to_device(opened.encode(unique[start : start + AT_ONCE]), device))
                    progress.advance(len(unique[start : start + AT_ONCE]))
    if whole:
        table = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        place = {text: i for i, text in enumerate(unique)}
        entry = torch.tensor([place[text] for text in texts])
        return lambda rows: {k: v[entry[rows]] for k, v in table.items()}

    for name, part in companions(opened).items():
        if name != "vae":
            part.to(device)  # to stay
    return lambda rows: to_device(opened.encode([texts[i] for i in rows.tolist()]), device)


def read_prompts(path: Path, name: str = "data.file") -> list[str]:
    """The prompts of a text or ``.jsonl`` file, ``name`` in errors; warns of blank lines.

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
    return [text_of(line, f"{name} {path}, line {number}")[1] for number, line in kept]


def text_of(line: str, where: str) -> tuple[dict, str]:
    """A line of JSON, and the text in it.

    Raises:
        ValueError: if it is no object, or has no text.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    names = [name for name in COLUMNS if isinstance(row, dict) and name in row]
    if not names or not isinstance(row[names[0]], str):
        raise ValueError(f"{where}: must be an object with a text as its {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}")
    return row, row[names[0]]


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
