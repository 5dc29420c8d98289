"""Images with captions or classes: rows of any source to batches, encoded once, each batch of one size."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import torch

from stepdistill import shapes
from stepdistill.data.base import CACHE_GB, MEMORY, Data, Setting, companions, epochs, lent, placed, to_device
from stepdistill.data.buckets import SDXL, generated, nearest, taken_in_turn
from stepdistill.data.cache import Store, store_in
from stepdistill.data.classes import class_cond
from stepdistill.data.encoding import Latents, Texts, encoded
from stepdistill.data.prompts import check_made_up
from stepdistill.data.report import Bad, Report, printable
from stepdistill.data.rows import Row, check_size, checked_text, size_of
from stepdistill.models.denoiser import Cond, of_samples
from stepdistill.models.families import Opened
from stepdistill.models.families.base import Size
from stepdistill.objective import Batch, Step

FACTORS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Pixels along a side of one number of a sample."""


class AllBad(ValueError):
    """Not one row can be used."""


Told = Callable[[str, Bad], None]
"""What is done about a bad row, by its name: it raises, or takes it down."""


@torch.no_grad()
def image_shape(opened: Opened) -> tuple[int, ...]:
    """Shape of one decoded sample: (C, H, W), or (C, T, H, W) of a video, for which one is decoded."""
    vae, sides = companions(opened).get("vae"), opened.sample_shape[1:]
    if vae is None:
        return opened.sample_shape
    for size in ((sides[0] * factor, sides[1] * factor) for factor in FACTORS if len(sides) == 2):
        with suppress(ValueError):  # not this factor
            if opened.family.sample_shape(opened.pipeline, size) == opened.sample_shape:
                return vae.config.get("in_channels", 3), *size
    like = next(opened.denoiser.net.parameters())
    with lent(opened, like.device, vae=True):
        return tuple(opened.decode(torch.zeros(1, *opened.sample_shape, device=like.device)).shape[1:])


@dataclass(frozen=True)
class ImageSource(Data):
    """Images with their captions or classes: all of them once an epoch, in a new order each time."""

    provides = frozenset({"x0"})

    memory: float = field(default=MEMORY, kw_only=True)
    """GB that latents, and again encoded captions, may take on the run's device. Within it all are encoded before
    training; beyond it batch by batch, or read from the cache, and the encoders go to the device when it misses."""
    cache: str = field(default="", kw_only=True)
    """Folder that keeps latents and encoded captions; runs and processes may share one. Empty is the run's own."""
    cache_gb: float = field(default=CACHE_GB, kw_only=True)
    """GB that it may take; what was used longest ago leaves first."""
    on_bad: Literal["error", "skip"] = field(default="error", kw_only=True)
    """What to do about a row that cannot be used (damaged, missing or too small an image, no caption): stop, or leave
    it out and say how many, in the log and in data.json. Beyond ``memory`` damaged images are found as they come."""
    enlarge: float = field(default=2.0, kw_only=True)
    """Factor up to which an image may be enlarged to fill its size; one that needs more is too small."""
    buckets: Literal["none", "generated", "sdxl"] = field(default="none", kw_only=True)
    """Sizes of images: the teacher's alone; or buckets of about as many pixels and several aspect ratios, each batch
    of one, or SDXL's own table."""
    bucket_step: int = field(default=64, kw_only=True)
    """Sides of generated buckets are multiples of it."""
    aspect: float = field(default=2.0, kw_only=True)
    """Largest ratio of sides of generated buckets."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("memory", "cache_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"data.{name} must be at least 0; got {getattr(self, name)}")
        if not 1 <= self.enlarge < math.inf:
            raise ValueError(f"data.enlarge must be at least 1; got {self.enlarge}")
        if self.bucket_step < 1:
            raise ValueError(f"data.bucket_step must be at least 1; got {self.bucket_step}")
        if not 1 <= self.aspect < math.inf:
            raise ValueError(f"data.aspect must be at least 1; got {self.aspect}")

    @abstractmethod
    def rows(self, bad: Told) -> Sequence[Row]:
        """All rows, no image of them opened; ``bad`` is told the names of those that cannot even be listed.

        Raises:
            ValueError: in one line, if there is nothing there.
        """

    def captions(self, n: int) -> list[str]:
        """See ``Data``."""
        rows = self.rows(self._told(Report()))
        return [text for row in rows[: 10 * n] if (text := row.text)][:n]

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        report, store = setting.report or Report(), store_in(self.cache, self.cache_gb, setting.cache)
        told, sizes = self._told(report), self._sizes(setting.opened)
        rows = self.rows(told)
        total = len(rows) + report.skipped
        shelves: dict[Size, list[Row]] = {}
        for row in rows:
            try:
                check_caption(row)
                size = sizes[0]
                if len(sizes) > 1:
                    size = nearest(size_of(row), sizes)
                    check_size(size_of(row), size, self.enlarge)
                shelves.setdefault(size, []).append(row)
            except Bad as problem:
                told(row.name, problem)
        filled = [self._shelf(shelves[size], size, setting, store, told) for size in sorted(shelves)]
        served = [shelf for shelf in filled if shelf is not None]
        if not served:
            raise ValueError(f"data {type(self).__name__}: no row can be used; the first: {report.first()}")
        report.opened(type(self).__name__, total)
        turn = taken_in_turn([count for count, _ in served], setting.batch, setting.seed)

        empty: set[int] = set()  # buckets of bad rows alone, which nobody knows of beforehand beyond ``memory``

        def batch(step: Step) -> Batch:
            first, number = turn(step.index)
            for bucket in ((first + i) % len(served) for i in range(len(served))):
                try:
                    if bucket not in empty:
                        return served[bucket][1](number)
                except AllBad:
                    empty.add(bucket)
                finally:
                    report.tell()
            raise AllBad(f"data {type(self).__name__}: no row can be used; the first: {report.first()}")

        return batch

    def _shelf(
        self, rows: list[Row], size: Size, setting: Setting, store: Store | None, told: Told
    ) -> tuple[int, Callable[[int], Batch]] | None:
        """Rows of one size: how many there are, and their batch by its number. None if no row can be used."""
        latents = Latents(setting, store, size, lambda row, problem: told(row.name, problem), self.enlarge)
        shape = setting.opened.family.sample_shape(setting.opened.pipeline, size)
        if len(rows) * math.prod(shape) * 4 > self.memory * 1e9:
            walk = walked(len(rows), setting.seed)
            most = setting.batch + 2 * len(rows)  # all of them, wherever in an epoch one begins
            return len(rows), self.batch_by_batch(lambda i: rows[walk(i)], size, setting, store, told, most)
        found = latents.all(rows, latents.at_once)
        if not found.members:
            return None
        rows = [rows[i] for i in found.members]
        cond_of = self._conditions(rows, size, setting, store)
        x0_of = placed(found.tensors["latents"], setting.device, self.memory)
        rows_of = epochs(len(rows), setting.batch, setting.seed)

        def batch(number: int) -> Batch:
            picked = rows_of(number)
            return Batch(cond_of(picked), (setting.batch, *shape), x0=x0_of(picked))

        return len(rows), batch

    def batch_by_batch(
        self,
        row_at: Callable[[int], Row],
        size: Size,
        setting: Setting,
        store: Store | None,
        told: Told,
        most: int,
    ) -> Callable[[int], Batch]:
        """Batches by number, encoded when they are asked for: batch k is made of rows k B, ..., k B + B - 1.

        In place of a bad row comes the first good one behind the batch, which has its own turn besides: so a batch
        depends on its number and the data alone, and not on what was seen before. A batch for which ``most`` rows do
        not do raises AllBad.
        """
        latents = Latents(setting, store, size, lambda row, problem: told(row.name, problem), self.enlarge)
        texts = Texts(setting, store, size, lambda text, problem: None)
        n = setting.batch

        def batch(number: int) -> Batch:
            at, rows, parts = number * n, [], []
            while len(rows) < n:
                group = [row_at(at + i) for i in range(n - len(rows))]
                at += len(group)
                if at - number * n > max(most, n):
                    raise AllBad(f"data {type(self).__name__}: among {most} rows there are not {n} that can be used")
                group = [row for row in group if is_captioned(row, told)]
                found = latents(group)
                if found.members:
                    parts.append(found.tensors["latents"])
                    rows += [group[i] for i in found.members]
            x0 = torch.cat(parts).to(setting.device)
            labels = [row.label for row in rows if row.label is not None]
            cond = class_cond(setting.opened, torch.tensor(labels)) if labels else texts([r.text for r in rows]).tensors
            return Batch(to_device(cond, setting.device), (n, *x0.shape[1:]), x0=x0)

        return batch

    def _conditions(
        self, rows: Sequence[Row], size: Size, setting: Setting, store: Store | None
    ) -> Callable[[torch.Tensor], Cond]:
        labels = [row.label for row in rows if row.label is not None]
        if not labels:
            return encoded([row.text for row in rows], setting, self.memory, store, size)
        cond = to_device(class_cond(setting.opened, torch.tensor(labels)), setting.device)
        return functools.partial(of_samples, cond)

    def _told(self, report: Report) -> Told:
        def told(name: str, problem: Bad) -> None:
            if self.on_bad == "error":
                cure = "mend or remove it, or set data.on_bad to 'skip'"
                raise ValueError(f"data: {printable(name)} cannot be used ({problem}); {cure}") from problem
            report.skip(name, problem)

        return told

    def _sizes(self, opened: Opened) -> tuple[Size, ...]:
        """The sizes that images may have, all of which the teacher can make.

        Raises:
            ValueError: if the teacher makes no images in colour, or not of these sizes.
        """
        shape = image_shape(opened)
        if len(shape) != 3 or shape[0] != 3:
            raise ValueError(f"data {type(self).__name__} holds images in colour; the teacher makes {shape}")
        own = shape[1:]
        if self.buckets == "none":
            return (own,)
        if "vae" not in companions(opened):
            name = type(opened.pipeline).__name__
            raise ValueError(f"data.buckets {self.buckets!r}: {name} works on pixels of one size; use 'none'")
        table = SDXL if self.buckets == "sdxl" else generated(math.prod(own), self.bucket_step, self.aspect)
        for size in table:
            try:
                opened.family.sample_shape(opened.pipeline, size)
            except ValueError as error:
                raise ValueError(
                    f"data.buckets {self.buckets!r}: the teacher cannot make {size[0]}x{size[1]} ({error}); use 'none' "
                    "or another data.bucket_step"
                ) from error
        return table


def check_caption(row: Row) -> None:
    """Raise ``Bad`` if a row has neither class nor caption."""
    if row.label is not None and row.label < 0:
        raise Bad("no class")
    if row.label is None and not checked_text(row.text).strip():
        raise Bad("no caption")


def is_captioned(row: Row, told: Told) -> bool:
    """Whether a row has a class or a caption; if not, ``told`` is."""
    try:
        check_caption(row)
    except Bad as problem:
        told(row.name, problem)
        return False
    return True


def walked(size: int, seed: int) -> Callable[[int], int]:
    """The row at each position of an endless walk through one permutation after another, as in ``epochs``."""
    row_of = epochs(size, 1, seed)
    return lambda position: int(row_of(position))


@dataclass(frozen=True)
class ShapesData(ImageSource):
    """Made-up scenes of ``stepdistill.shapes`` with their captions, what the bundled text-to-image teachers learned."""

    count: int = 8192
    seed: int = 0
    dropout: float = 0.15
    """Chance of each attribute to be left out of its caption."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_made_up(self.count, self.dropout)

    def rows(self, bad: Told) -> list[Row]:
        """See ``ImageSource``."""
        scenes = _scenes(self.count, self.seed)
        texts = shapes.captions(scenes.attributes, self.seed, self.dropout).texts
        return [Row(f"scene {i}", functools.partial(_scene, scenes, i), text) for i, text in enumerate(texts)]

    def _sizes(self, opened: Opened) -> tuple[Size, ...]:
        sizes = super()._sizes(opened)
        if sizes != ((shapes.SIZE, shapes.SIZE),):
            raise ValueError(
                f"data ShapesData holds images of {shapes.SIZE}x{shapes.SIZE}; the teacher makes {list(sizes[0])}"
            )
        return sizes


@functools.lru_cache(maxsize=1)
def _scenes(count: int, seed: int) -> shapes.Scenes:
    return shapes.draw(count, seed)


def _scene(scenes: shapes.Scenes, row: int, first: int) -> torch.Tensor:
    return scenes.images[row]
