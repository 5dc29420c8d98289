"""WebDataset shards: tar files in which NAME.jpg and NAME.txt (or NAME.json) stand side by side."""

from __future__ import annotations

import functools
import glob
import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stepdistill.data.images import ImageSource, Told
from stepdistill.data.prompts import object_of
from stepdistill.data.report import Bad
from stepdistill.data.rows import SUFFIXES, Row, checked_text, text_in


@dataclass(frozen=True)
class WebShards(ImageSource):
    """Images and captions in local tar files, as the ``webdataset`` library packs them.

    Files of one sample follow one another and share their name up to the first dot. Shards are indexed once, when the
    run begins, by reading their headers and captions; images are then read where they lie, in any order, so a step's
    batch is found again after a resume without reading up to it. That needs plain tars: compressed ones have no
    places.
    """

    shards: str
    """Their paths: ``shard-{000..099}.tar``, ``{a,b}/*.tar``."""
    text_column: str = ""
    """Of NAME.json; empty takes the first there is of prompt, text and caption. NAME.txt needs none."""

    def rows(self, bad: Told) -> list[Row]:
        """See ``ImageSource``."""
        rows = []
        for path in shard_paths(self.shards):
            try:
                for sample in _samples(path, path.stat().st_mtime_ns):
                    rows += self._row(path, sample, bad)
            except (tarfile.TarError, OSError) as error:
                bad(str(path), Bad("damaged shard", f"{error}; it must be a plain tar, not compressed"))
        if not rows:
            raise ValueError(f"data.shards {self.shards}: no images in them; a sample is NAME.jpg with NAME.txt")
        return rows

    def _row(self, path: Path, sample: _Sample, bad: Told) -> Iterator[Row]:
        suffix = next((suffix for suffix in SUFFIXES if suffix in sample.places), None)
        if suffix is None:
            bad(f"{path}:{sample.name}", Bad("missing image", f"none of {', '.join(SUFFIXES)} in the shard"))
            return
        try:
            text = self._caption(sample)
        except Bad as problem:
            bad(f"{path}:{sample.name}", problem)
            return
        place = sample.places[suffix]
        yield Row(f"{path}:{sample.name}{suffix}", functools.partial(_part, path, *place), text)

    def _caption(self, sample: _Sample) -> str:
        if ".txt" in sample.texts:
            return checked_text(_utf8(sample.texts[".txt"])).strip()
        if ".json" in sample.texts:
            return text_in(object_of(_utf8(sample.texts[".json"])), self.text_column).strip()
        return ""


@dataclass
class _Sample:
    name: str
    places: dict[str, tuple[int, int]]  # of images, by suffix: offset and size
    texts: dict[str, bytes]


@functools.lru_cache(maxsize=4096)
def _samples(path: Path, changed: int) -> tuple[_Sample, ...]:
    """The samples of a shard, in order; as long as the file is the same it is looked through once.

    Raises:
        tarfile.TarError: if it is no plain tar, or damaged.
    """
    found: list[_Sample] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, dot, rest = base.partition(".")
            name, suffix = f"{folder}/{stem}".lstrip("/"), f"{dot}{rest}".lower()
            if not found or found[-1].name != name:
                found.append(_Sample(name, {}, {}))
            if suffix in (".txt", ".json"):
                found[-1].texts[suffix] = tar.extractfile(member).read()
            else:
                found[-1].places[suffix] = (member.offset_data, member.size)
        behind = _part(path, tar.offset, tarfile.BLOCKSIZE, -1)
        if behind.strip(b"\0"):  # tarfile takes anything that is no header for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
    return tuple(found)


def _part(path: Path, offset: int, size: int, first: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size if first < 0 else min(size, first))


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Bad("caption is no Unicode", f"byte {error.start}") from error


def shard_paths(pattern: str) -> list[Path]:
    """The files that a pattern with braces and stars names, in its order.

    Raises:
        ValueError: if it names an address or a command, or a file is not there.
    """
    if re.match(r"[a-z0-9+.-]+://|pipe:", pattern, re.IGNORECASE):
        raise ValueError(f"data.shards {pattern}: only local files are read; download them first")
    paths = []
    for one in braces(pattern):
        found = sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else [one]
        if not found or not all(Path(path).is_file() for path in found):
            raise ValueError(f"data.shards {one}: no such file")
        paths += map(Path, found)
    return paths


def braces(pattern: str) -> list[str]:
    """What a shell makes of ``{a,b}`` and ``{000..012}``; several multiply, none is inside another."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else _alternatives(part) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _alternatives(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = numbers.groups()
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
