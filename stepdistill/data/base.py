"""What every source of batches is, and what sources share: walks through rows, caches, tables on the device."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stepdistill.data.report import Report
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.families import Opened
from stepdistill.models.lora import bare_state
from stepdistill.objective import Batch, Step
from stepdistill.sampling import Sampler

MEMORY = 1.0
"""GB that a table may take on the run's device unless a source says otherwise."""


CACHE_GB = 50.0
"""GB that a cache on disk may take unless a source says otherwise."""


class Setting(NamedTuple):
    """What a data source may need to know of the run it serves."""

    opened: Opened
    teacher: Guided
    sampler: Sampler  # the student's
    batch: int
    seed: int
    device: str
    cache: Path | None  # folder for what is costly to make; None keeps it in memory
    report: Report | None = None  # takes down what the data held and what was left out


@dataclass(frozen=True)
class Data(ABC):
    """Where batches come from; a recipe's ``data`` field."""

    provides: ClassVar[frozenset[str]]
    """Batch fields that are set beyond the conditions."""

    @abstractmethod
    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """A function from a step to its batch that depends on the step's index and randomness alone.

        The index counts batches: with accumulation a step of the trainer takes several.
        """

    @property
    def evaluations(self) -> int:
        """Evaluations of the teacher, unguided, that making it takes."""
        return 0

    def check(self, sampler: Sampler) -> None:  # noqa: B027 (most sources serve every student)
        """Raise a ValueError if this source cannot serve a student with that sampler; opens nothing."""

    def captions(self, n: int) -> list[str]:
        """Prompts of the first samples to look at, at most ``n``; none from sources without text."""
        return []

    def examples(self, opened: Opened, n: int) -> Cond:
        """Conditions of ``n`` samples to look at, each (n, ...).

        Raises:
            ValueError: if the teacher takes prompts and this source has none, or the other way round.
        """
        texts = self.captions(n)
        if texts:
            return opened.encode([texts[i % len(texts)] for i in range(n)])
        if opened.family.examples is None:
            raise ValueError(
                f"data {type(self).__name__} gives no prompts, and {type(opened.pipeline).__name__} takes nothing "
                "else; use Prompts, Captioned, or TeacherPairs with prompts"
            )
        return opened.family.examples(opened.pipeline, n)


def to_device(cond: Cond, device: torch.device | str) -> Cond:
    """Conditions on a device."""
    return {k: v.to(device) for k, v in cond.items()}


def epochs(size: int, batch: int, seed: int) -> Callable[[int], Tensor]:
    """Rows of batch ``index``: a walk through one permutation after another, a function of the index alone."""

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> Tensor:
        return torch.randperm(size, generator=Step.at(epoch, seed, size).rng)

    def rows(index: int) -> Tensor:
        start = index * batch
        parts = []
        while batch > sum(map(len, parts)):
            epoch, offset = divmod(start + sum(map(len, parts)), size)
            parts.append(permutation(epoch)[offset : offset + batch - sum(map(len, parts))])
        return torch.cat(parts)

    return rows


def placed(table: Tensor, device: torch.device | str, memory: float = MEMORY) -> Callable[[Tensor], Tensor]:
    """A function from row numbers (B,) to those rows of ``table`` on ``device``.

    The table itself is put there if it stays within ``memory`` GB; otherwise each batch travels.
    """
    kept = table.to(device) if table.nbytes <= memory * 1e9 else table
    return lambda rows: kept[rows].to(device)


def companions(opened: Opened) -> dict[str, nn.Module]:
    """The pipeline's networks but the denoising one: text encoders, and ``vae`` where there is one."""
    parts = opened.pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module) and name != opened.family.module}


@contextmanager
def lent(opened: Opened, device: torch.device | str, *, vae: bool) -> Iterator[None]:
    """The pipeline's autoencoder, or else its text encoders, on ``device`` for a while; then back where they were."""
    parts = [part for name, part in companions(opened).items() if (name == "vae") == vae]
    homes = [next(part.parameters()).device for part in parts]
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part, home in zip(parts, homes, strict=True):
            part.to(home)


def weights_hash(*nets: nn.Module) -> str:
    """SHA-256 over networks' parameters and buffers, adapters left aside."""
    digest = hashlib.sha256()
    for net in nets:
        for name, value in bare_state(net).items():
            digest.update(name.encode())
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
            digest.update(raw.numpy().data)
    return digest.hexdigest()
