"""A folder of images: with captions beside them or in metadata, or one folder for each class."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.data.images import ImageSource, Told
from stepdistill.data.prompts import object_of, read_utf8
from stepdistill.data.report import Bad
from stepdistill.data.rows import SUFFIXES, Row, text_in

METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Captioned(ImageSource):
    """A folder of images with their captions; images in folders inside it count too.

    Either ``metadata.jsonl`` names them, ``{"file_name": "a.png", "text": "..."}`` a line, or ``metadata.csv`` with
    these columns, as Hugging Face's image folders do; or ``NAME.txt`` stands beside each ``NAME.png``, ``.jpg``,
    ``.jpeg`` or ``.webp``; or ``class_caption`` makes captions of the folders' names. Images are scaled and cropped
    around the middle.
    """

    folder: str
    text_column: str = ""
    """Of the metadata; empty takes the first there is of prompt, text and caption."""
    class_caption: str = ""
    """Caption of an image that has none of its own, with ``{}`` for the name of its folder: "a photo of a {}"."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.class_caption and "{}" not in self.class_caption:
            raise ValueError(f"data.class_caption must have {{}} for the folder's name; got {self.class_caption!r}")

    def rows(self, bad: Told) -> list[Row]:
        """See ``ImageSource``."""
        folder = existing(self.folder)
        metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
        rows = list(self._beside(folder, bad) if metadata is None else self._listed(metadata, bad))
        if not rows:
            raise ValueError(
                f"data.folder {folder}: no images with captions there; give metadata.jsonl or metadata.csv, or "
                "NAME.txt beside NAME.png"
            )
        return rows

    def _listed(self, metadata: Path, bad: Told) -> Iterator[Row]:
        text = read_utf8(metadata, "data.folder")
        lines = _lines_of_json(text) if metadata.suffix == ".jsonl" else _lines_of_csv(text, str(metadata))
        for number, line in lines:
            name = f"{metadata}, line {number}"
            try:
                row = line if isinstance(line, dict) else object_of(line)
                caption = text_in(row, self.text_column).strip()
                if not isinstance(row.get("file_name"), str) or not row["file_name"]:
                    raise Bad("missing column", "no file_name")
            except Bad as problem:
                bad(name, problem)
                continue
            path = metadata.parent / row["file_name"]
            yield image_file(path, text=caption or self._of_class(path, metadata.parent))

    def _beside(self, folder: Path, bad: Told) -> Iterator[Row]:
        for path in images_in(folder):
            beside, caption = path.with_suffix(".txt"), ""
            if beside.is_file():
                try:
                    caption = read_utf8(beside, "caption").strip()
                except ValueError as error:
                    bad(str(path), Bad("caption is no Unicode", str(error)))
                    continue
            yield image_file(path, text=caption or self._of_class(path, folder))

    def _of_class(self, path: Path, folder: Path) -> str:
        if not self.class_caption or path.parent == folder:
            return ""
        return self.class_caption.replace("{}", path.parent.name.replace("_", " "))


@dataclass(frozen=True)
class ClassFolders(ImageSource):
    """Images in one folder for each class, for class-conditional teachers; labels are the folders' alphabetical order,
    as torchvision's ``ImageFolder`` has it.
    """

    folder: str

    def captions(self, n: int) -> list[str]:
        """See ``Data``; classes have none."""
        return []

    def rows(self, bad: Told) -> list[Row]:
        """See ``ImageSource``."""
        folder = existing(self.folder)
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        rows = [image_file(path, label=label) for label, one in enumerate(classes) for path in images_in(one)]
        if not rows:
            raise ValueError(f"data.folder {folder}: no folders with images there; put each class's into one")
        return rows


def existing(folder: str) -> Path:
    """A folder that is there.

    Raises:
        ValueError: if it is not.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"data.folder {folder}: no such folder")
    return path


def images_in(folder: Path) -> Sequence[Path]:
    """All image files below a folder, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def image_file(path: Path, **known: Any) -> Row:
    """The row of an image file."""
    return Row(str(path), functools.partial(_first_bytes, path), **known)


def _first_bytes(path: Path, first: int) -> bytes:
    if not path.is_file():  # nor a device, which may have no end
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        return file.read(first)


def _lines_of_json(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _lines_of_csv(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"data.folder {where}, line {reader.line_num}: not CSV ({error})") from error
