"""Where batches come from: real data, the teacher's own samples, or conditions alone."""

from __future__ import annotations

import functools
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import sklearn.datasets
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from stepdistill.checkpoint import write_atomically
from stepdistill.logging import Progress
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.families import Opened
from stepdistill.models.lora import bare_state
from stepdistill.objective import Batch, Step
from stepdistill.sampling import DpmPP2M, Sampler, trailing

HELD_OUT_DIGITS = 360
SPLIT_SEED = 0


class Digits(NamedTuple):
    """Grey 8x8 images of handwritten digits; both tensors on the CPU and in the same order."""

    images: Tensor  # (N, 1, 8, 8) float32 in [-1, 1]; -1 is paper, 1 is ink, 17 grey levels 0.125 apart
    labels: Tensor  # (N,) int64 in 0..9


def load_digits(split: Literal["train", "heldout", "all"] = "train") -> Digits:
    """Scikit-learn's 1797 real digits (UCI optdigits, test part), scaled by x / 8 - 1.

    The split is fixed and keeps the class proportions: 1437 images to train on, 360 held out.
    Order is fixed too: shuffled for the two parts, scikit-learn's own for "all".
    """
    bunch = sklearn.datasets.load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(bunch.target).long()
    if split == "all":
        return Digits(images, labels)
    train, heldout = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=HELD_OUT_DIGITS, stratify=bunch.target, random_state=SPLIT_SEED
    )
    rows = {"train": train, "heldout": heldout}
    if split not in rows:
        raise ValueError(f"split must be 'train', 'heldout' or 'all', got {split!r}")
    index = torch.from_numpy(rows[split])
    return Digits(images[index], labels[index])


class Setting(NamedTuple):
    """What a data source may need to know of the run it serves."""

    opened: Opened
    teacher: Guided
    sampler: Sampler  # the student's
    batch: int
    seed: int
    device: str
    cache: Path | None  # folder for what is costly to make; None keeps it in memory


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

    def check(self, sampler: Sampler) -> None:  # noqa: B027 (most sources serve every student)
        """Raise a ValueError if this source cannot serve a student with that sampler; opens nothing."""


@dataclass(frozen=True)
class Labels(Data):
    """Class labels, all equally likely, and nothing else: for data-free methods."""

    provides = frozenset()

    classes: int = 10
    """Labels are 0 ... classes - 1; 0 gives none, for an unconditional teacher."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.classes < 0:
            raise ValueError(f"data.classes must be at least 0; got {self.classes}")

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        family, net = setting.opened.family, setting.opened.denoiser.net
        shape = (setting.batch, *setting.opened.sample_shape)
        family.cond(net, _given(torch.arange(self.classes)))  # the network must know all of them

        def batch(step: Step) -> Batch:
            labels = step.integers(self.classes, setting.batch) if self.classes else torch.arange(0)
            return Batch(_to(family.cond(net, _given(labels)), setting.device), shape)

        return batch


@dataclass(frozen=True)
class DigitsData(Data):
    """Real handwritten digits with their labels: the training split of ``load_digits``, reshuffled every epoch."""

    provides = frozenset({"x0"})

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        digits = load_digits("train")
        if setting.opened.sample_shape != digits.images.shape[1:]:
            raise ValueError(
                f"data DigitsData holds images of shape {tuple(digits.images.shape[1:])}; "
                f"the teacher's are {setting.opened.sample_shape}"
            )
        conditional = bool(setting.opened.family.examples(setting.opened.pipeline, 1))
        given = {"labels": digits.labels} if conditional else {}
        cond = setting.opened.family.cond(setting.opened.denoiser.net, given)
        cond, x0 = _to(cond, setting.device), digits.images.to(setting.device)
        rows_of = _epochs(len(x0), setting.batch, setting.seed)

        def batch(step: Step) -> Batch:
            rows = rows_of(step.index)
            return Batch({k: v[rows] for k, v in cond.items()}, (setting.batch, *x0.shape[1:]), x0=x0[rows])

        return batch


@dataclass(frozen=True)
class TeacherPairs(Data):
    """The teacher's own trajectories from noise to image, made once before training and kept in the run's cache.

    ``path`` holds its states at the student's grid, ``x0`` its samples.

    Raises:
        ValueError: if the student's grid is not a part of the solver's.
    """

    provides = frozenset({"path", "x0"})

    count: int = 8000
    """Trajectories."""
    classes: int = 10
    """Labels are 0 ... classes - 1, in turn; 0 gives none, for an unconditional teacher."""
    solver: Sampler = field(default_factory=lambda: Sampler(trailing(16), DpmPP2M()))
    """How the teacher is sampled: the student's ceiling."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.count < 1:
            raise ValueError(f"data.count must be at least 1; got {self.count}")
        if self.classes < 0:
            raise ValueError(f"data.classes must be at least 0; got {self.classes}")

    def check(self, sampler: Sampler) -> None:
        """The student's times must be states of the solver."""
        grid = self._grid()
        outside = [t for t in sampler.times if round(t, 9) not in grid]
        if outside:
            raise ValueError(
                f"the student's time {outside[0]:g} is not on the solver's grid of {self.solver.steps} steps; "
                f"let data.solver have a multiple of {sampler.steps} steps"
            )

    def _grid(self) -> dict[float, int]:
        return {round(t, 9): i for i, t in enumerate((*self.solver.times, 0.0))}

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        self.check(setting.sampler)
        grid = self._grid()
        states = [grid[round(t, 9)] for t in (*setting.sampler.times, 0.0)]
        labels = torch.arange(self.count) % self.classes if self.classes else torch.arange(0)
        cond = setting.opened.family.cond(setting.opened.denoiser.net, _given(labels))
        path = self._paths(setting, cond)[:, states].to(setting.device)
        cond = _to(cond, setting.device)
        rows_of = _epochs(self.count, setting.batch, setting.seed)

        def batch(step: Step) -> Batch:
            rows = rows_of(step.index)
            picked = path[rows]
            shape = (setting.batch, *path.shape[2:])
            return Batch({k: v[rows] for k, v in cond.items()}, shape, x0=picked[:, -1], path=picked)

        return batch

    def _paths(self, setting: Setting, cond: Cond) -> Tensor:
        """All states of all trajectories, (count, solver steps + 1, ...), from the cache if they are there."""
        teacher, denoiser = setting.teacher, setting.opened.denoiser
        guidance = f"{teacher.scale} {teacher.interval}"
        key = f"{self!r} {setting.seed} {guidance} {denoiser.dtype} {weights_hash(denoiser.net)}"
        name = f"pairs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if setting.cache is not None and (setting.cache / name).is_file():
            try:
                return load_file(setting.cache / name)["path"]
            except (SafetensorError, KeyError) as error:
                warnings.warn(f"{setting.cache / name} is damaged ({error}) and is made anew", stacklevel=2)
        parts = []
        with Progress("teacher trajectories", 0, self.count) as progress, torch.no_grad():
            for start in range(0, self.count, 500):
                part = {k: v[start : start + 500].to(setting.device) for k, v in cond.items()}
                n = min(500, self.count - start)
                rng = Step.at(start, setting.seed, device=setting.device).rng
                noise = torch.randn((n, *setting.opened.sample_shape), generator=rng, device=setting.device)
                parts.append(self.solver.run(setting.teacher, noise, part, rng, path=True).cpu())
                progress.advance(n)
        path = torch.cat(parts)
        if setting.cache is not None:
            write_atomically(setting.cache / name, lambda p: save_file({"path": path.contiguous()}, p))
        return path


def _given(labels: Tensor) -> dict[str, Tensor]:
    """What a family makes conditions of: the labels, or nothing where there are none."""
    return {"labels": labels} if len(labels) else {}


def _to(cond: Cond, device: str) -> Cond:
    return {k: v.to(device) for k, v in cond.items()}


def _epochs(size: int, batch: int, seed: int) -> Callable[[int], Tensor]:
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


def weights_hash(net: nn.Module) -> str:
    """SHA-256 over a network's parameters and buffers, adapters left aside."""
    digest = hashlib.sha256()
    for name, value in bare_state(net).items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
