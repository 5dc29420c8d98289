"""Hugging Face ``datasets``: local folders and files or the hub's, whole or streaming."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.data.base import Setting
from stepdistill.data.cache import store_in
from stepdistill.data.images import ImageSource, Told
from stepdistill.data.prompts import PromptSource
from stepdistill.data.report import Bad, Report
from stepdistill.data.rows import Row, checked_text
from stepdistill.data.stream import Stream
from stepdistill.objective import Batch, Step

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TRIES = 2000
"""Rows of a stream, beyond a batch's own, that may be bad before it counts as broken."""
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
"""Of single files, by their suffix."""


@dataclass(frozen=True)
class HubImages(ImageSource):
    """Images with captions or classes of a data set that ``datasets`` opens (``pip install 'stepdistill[data]'``)."""

    path: str
    """A local folder (of parquet files, say, or one that ``save_to_disk`` wrote), a file, or a hub id."""
    name: str = ""
    """Its configuration, where it has several."""
    split: str = "train"
    """As ``datasets`` writes them: ``train``, ``train[:10%]``."""
    image_column: str = "image"
    text_column: str = "text"
    """Of captions; not looked at with ``label_column``."""
    label_column: str = ""
    """Of class numbers, for class-conditional teachers."""
    streaming: bool = False
    """Read it forwards as it comes, without a copy on disk. Rows are shuffled within blocks of ``shuffle``; a resumed
    run goes on at the very row, for which it notes down its place in the run's cache."""
    shuffle: int = 256
    """Rows of a block, all of which are in memory; streaming only."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.shuffle < 1:
            raise ValueError(f"data.shuffle must be at least 1; got {self.shuffle}")
        if self.streaming and self.buckets != "none":
            raise ValueError(
                "data.buckets need all images' sizes beforehand, and a stream has none; set streaming False"
            )

    def captions(self, n: int) -> list[str]:
        """See ``Data``."""
        if self.label_column or not self.streaming:
            return [] if self.label_column else super().captions(n)
        first = (row[self.text_column] for row, _ in zip(self._stream(), range(10 * n), strict=False))
        return [text for text in first if isinstance(text, str) and text][:n]

    def rows(self, bad: Told) -> Sequence[Row]:
        """See ``ImageSource``."""
        data = self._raw(open_dataset(self.path, self.name, self.split))
        if not len(data):
            raise ValueError(f"data.path {self.path}: split {self.split!r} is empty")
        known = data[self._told_by][:]
        return [
            self._row(f"{self.path}[{self.split}] {i}", value, functools.partial(_cell, data, i, self.image_column))
            for i, value in enumerate(known)
        ]

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        if not self.streaming:
            return super().open(setting)
        report, store = setting.report or Report(), store_in(self.cache, self.cache_gb, setting.cache)
        (size,) = self._sizes(setting.opened)
        identity = repr((self.path, self.name, self.split, self.shuffle))
        file = f"stream-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.txt"
        stream = Stream(self._stream, self.shuffle, setting.seed, setting.cache / file if setting.cache else None)

        def row_at(position: int) -> Row:
            number, cells = stream.at(position)
            image = cells[self.image_column]
            name = f"{self.path}[{self.split}] {number}"
            return self._row(name, cells[self._told_by], lambda: image)

        report.opened(type(self).__name__, None)
        of_number = self.batch_by_batch(row_at, size, setting, store, self._told(report), setting.batch + TRIES)

        def batch(step: Step) -> Batch:
            given = of_number(step.index)
            report.tell()
            return given

        return batch

    @property
    def _told_by(self) -> str:
        return self.label_column or self.text_column

    def _row(self, name: str, told: object, cell: Callable[[], Any]) -> Row:
        read = functools.partial(_content, cell)
        if self.label_column:
            return Row(name, read, label=told if isinstance(told, int) else -1)
        try:
            return Row(name, read, checked_text(told).strip())
        except Bad:
            return Row(name, read)  # counts as having no caption

    def _stream(self) -> IterableDataset:
        return self._raw(open_dataset(self.path, self.name, self.split, streaming=True))

    def _raw(self, data: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The columns that are used, images undecoded.

        Raises:
            ValueError: if there is no such column.
        """
        import datasets

        columns = data.column_names or list(next(iter(data)))
        for field in ("image_column", "label_column" if self.label_column else "text_column"):
            if getattr(self, field) not in columns:
                there = ", ".join(columns)
                raise ValueError(
                    f"data.{field} {getattr(self, field)!r}: no such column in {self.path}; it has {there}"
                )
        data = data.select_columns([self.image_column, self._told_by])
        if isinstance((data.features or {}).get(self.image_column), datasets.Image):
            data = data.cast_column(self.image_column, datasets.Image(decode=False))
        return data


@dataclass(frozen=True)
class HubPrompts(PromptSource):
    """Prompts from a column of a data set that ``datasets`` opens (``pip install 'stepdistill[data]'``)."""

    path: str
    """A local folder (of parquet files, say, or one that ``save_to_disk`` wrote), a file, or a hub id."""
    name: str = ""
    """Its configuration, where it has several."""
    split: str = "train"
    """As ``datasets`` writes them: ``train``, ``train[:10%]``."""
    text_column: str = "text"

    def texts(self, report: Report | None = None) -> list[str]:
        """See ``PromptSource``."""
        data = open_dataset(self.path, self.name, self.split)
        if self.text_column not in data.column_names:
            there = ", ".join(data.column_names)
            raise ValueError(f"data.text_column {self.text_column!r}: no such column in {self.path}; it has {there}")
        texts = []
        for i, value in enumerate(data[self.text_column][:]):
            try:
                texts.append(checked_text(value))
            except Bad as problem:
                if self.on_bad == "error":
                    raise ValueError(
                        f"data: {self.path} row {i} cannot be used ({problem}); mend or remove it, or set data.on_bad "
                        "to 'skip'"
                    ) from problem
                (report or Report()).skip(f"{self.path} row {i}", problem)
        if not texts:
            raise ValueError(f"data.path {self.path}: no prompts in column {self.text_column!r}")
        return texts


def open_dataset(path: str, name: str, split: str, *, streaming: bool = False) -> Dataset | IterableDataset:
    """One split of a data set.

    Raises:
        ValueError: in one line, if ``datasets`` is not installed or cannot open it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data: Hugging Face datasets is not installed; pip install 'stepdistill[data]'") from error
    local = Path(path)
    try:
        if local.is_dir() and any((local / one).is_file() for one in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(path)
            data = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return data.to_iterable_dataset() if streaming else data
        if local.is_file():
            if local.suffix not in BUILDERS:
                raise ValueError(f"a file must be one of {', '.join(BUILDERS)}")
            builder, files = BUILDERS[local.suffix], {"train": path}
            return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
        return datasets.load_dataset(path, name or None, split=split, streaming=streaming)
    except Exception as error:  # whatever its many readers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"data.path {path!r}, split {split!r}: datasets cannot open it ({reason})") from error


def _cell(data: Dataset, row: int, column: str) -> Any:
    return data[row][column]


def _content(cell: Callable[[], Any], first: int) -> bytes:
    """The bytes of an undecoded image: of ``Image`` columns, of binary ones, or of the file that a text names."""
    value = cell()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise Bad("missing image")
    if isinstance(value, str):
        with Path(value).open("rb") as file:
            return file.read(first)
    if not isinstance(value, bytes):
        raise Bad("damaged image", f"a column of images holds {type(value).__name__}")
    return value if first < 0 else value[:first]
