"""Attacks on data: whatever is in a source, a batch comes out, or one clear line, and no row is lost uncounted."""

from __future__ import annotations

import csv
import functools
import io
import json
import tarfile
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from fuzz_parts import Attack, Draw, Ended, assert_one_clear_line, files, usually
from hypothesis import strategies as st
from PIL import Image
from transformers.utils import logging as transformers_logging

from stepdistill.build import open_teacher
from stepdistill.data import Captioned, Data, Prompts, Report, Setting, WebShards
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import Opened
from stepdistill.objective import Step
from stepdistill.recipe import Teacher
from stepdistill.sampling import Sampler, trailing

BATCH = 2


# What is tried

ON_BAD = st.sampled_from(["skip", "error"])
MEMORY = st.sampled_from([1.0, 0.0])
BUCKETS = st.sampled_from(["none", "generated"])
ODD = ("", " ", "née 🦊 \u200b\u202e", "\ud800", "x" * 5000, "a\x00b", "\x1b[31m", "{}", "a\nb", "\ufeff")
TEXTS = st.just("a red ring") | st.text(max_size=30) | st.sampled_from(ODD)
BYTES = TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
KEYS = st.sampled_from(["prompt", "text", "caption", "file_name", "x"])
ROWS = st.dictionaries(KEYS, JSON, max_size=3).map(lambda row: json.dumps(row).encode())
ODD_LINES = (b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "\\ud800"}', b"NaN", b"{", b"")
LINES = st.just(b'{"text": "a blue square"}') | BYTES | ROWS | st.sampled_from(ODD_LINES)
SUFFIXES = st.sampled_from([".png", ".jpg", ".txt", ".json", ".cls", "", ".seg.png"])


@st.composite
def pictures(draw: Draw) -> tuple[bytes, bool]:
    """An image file's content, and whether it is surely good."""
    how = draw(usually("good", st.sampled_from(["bytes", "empty", "cut", "flipped", "odd"])))
    if how in ("bytes", "empty"):
        return draw(st.binary(min_size=1, max_size=60)) if how == "bytes" else b"", False
    odd = how == "odd"
    mode = draw(st.sampled_from(["RGBA", "L", "P", "1", "CMYK", "I;16", "LA"])) if odd else "RGB"
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"] if odd else ["PNG", "JPEG", "WEBP"]))
    sides = st.sampled_from([1, 2, 31, 300, 3000]) if odd else st.integers(32, 80)
    file = io.BytesIO()
    try:
        Image.new(mode, (draw(sides), draw(sides))).save(file, kind)
    except (OSError, ValueError, KeyError):  # not every kind of file has every mode
        return b"", False
    raw = bytearray(file.getvalue())
    if how == "cut":
        del raw[draw(st.integers(0, len(raw) - 1)) :]
    elif how == "flipped":
        for _ in range(draw(st.integers(1, 4))):
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(raw), how == "good"


def prompts_file(draw: Draw, folder: Path) -> Ended:
    """Text and JSON lines of anything."""
    path = folder / draw(st.sampled_from(["p.jsonl", "p.txt"]))
    good = b'{"text": "a cat"}'
    lines = draw(st.lists(usually(good, LINES, 0.5), max_size=6))
    path.write_bytes(b"\n".join(lines))
    whole = all(_is_text(line) for line in lines)  # a file that is no UTF-8 is refused as a whole
    sure = lines.count(good) if whole and path.suffix == ".jsonl" else None
    return ended(Prompts(str(path), on_bad=draw(ON_BAD), memory=draw(MEMORY)), folder, sure=sure)


def image_folder(draw: Draw, folder: Path) -> Ended:
    """Images good and bad, with captions beside them; the sure ones must be used, the rest refused or counted."""
    sure = 0
    images = draw(st.lists(pictures(), min_size=1, max_size=5))
    for i, (raw, good) in enumerate(images):
        path = folder / f"{i}{draw(st.sampled_from(['.png', '.jpg', '.webp', '.JPEG']))}"
        path.write_bytes(raw)
        caption = draw(usually(b"a cat", st.none() | BYTES))
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption)
        sure += good and caption is not None and _is_text(caption) and bool(caption.decode("utf-8-sig").strip())
    return ended(_captioned(draw, folder), folder, rows=len(images), sure=sure)


def metadata(draw: Draw, folder: Path) -> Ended:
    """``metadata.jsonl`` or ``metadata.csv`` of anything, some of which names images that are there."""
    names = [f"{i}.png" for i in range(3)]
    for name in names:
        (folder / name).write_bytes(draw(pictures())[0])
    odd = st.sampled_from(["no.png", "", ".", "..", "/dev/zero", "a\x00b", "\ud800", "x" * 300, "a\nb", *names])
    if draw(st.booleans()):
        named = st.builds(lambda name, text: json.dumps({"file_name": name, "text": text}).encode(), odd, JSON)
        good = json.dumps({"file_name": "1.png", "text": "a cat"}).encode()
        (folder / "metadata.jsonl").write_bytes(b"\n".join(draw(st.lists(usually(good, named | LINES), max_size=6))))
    else:
        file = io.StringIO()
        writer = csv.writer(file, escapechar="\\")
        cells = st.lists(odd | TEXTS | st.sampled_from(["file_name", "text"]), max_size=4)
        writer.writerow(draw(usually(["file_name", "text"], cells, 0.9)))
        writer.writerows(draw(st.lists(usually(["1.png", "a cat"], cells), max_size=5)))
        (folder / "metadata.csv").write_bytes(file.getvalue().encode("utf-8", "surrogatepass"))
    return ended(_captioned(draw, folder), folder)


def shards(draw: Draw, folder: Path) -> Ended:
    """Tar files of anything, some of them damaged."""
    for k in range(draw(st.integers(1, 2))):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in range(draw(st.integers(0, 4))):
                name = draw(usually(f"{i}", st.sampled_from([f"a/{i}", "née", ".", "../up", "x" * 120])))
                _add(tar, name + draw(usually(".png", SUFFIXES)), draw(pictures())[0])
                _add(tar, name + draw(usually(".txt", SUFFIXES)), draw(usually(b"a cat", LINES)))
                kind = draw(usually(None, st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE])))
                if kind is not None:
                    _add(tar, name + draw(SUFFIXES), draw(LINES), kind)
        raw = bytearray(file.getvalue())
        how = draw(usually("whole", st.sampled_from(["cut", "flipped", "bytes"])))
        if how == "cut":
            del raw[draw(st.integers(0, len(raw))) :]
        elif how == "flipped":
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
        elif how == "bytes":
            raw = bytearray(draw(st.binary(max_size=700)))
        (folder / f"{k}.tar").write_bytes(raw)
    data = WebShards(f"{folder}/*.tar", on_bad=draw(ON_BAD), memory=draw(MEMORY), buckets=draw(BUCKETS), bucket_step=8)
    return ended(data, folder)


ATTACKS: dict[str, Attack] = {
    "prompts": prompts_file,
    "image folder": image_folder,
    "metadata": metadata,
    "shards": shards,
}


def _captioned(draw: Draw, folder: Path) -> Captioned:
    column = draw(usually("", st.sampled_from(["text", "nope"]), 0.8))
    return Captioned(
        str(folder), text_column=column, on_bad=draw(ON_BAD), memory=draw(MEMORY), buckets=draw(BUCKETS), bucket_step=8
    )


def _add(tar: tarfile.TarFile, name: str, raw: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(raw), kind
    tar.addfile(info, io.BytesIO(raw))


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


# How it ends


@functools.cache
def teacher() -> Opened:
    """The bundled SD teacher of 32x32 pixels."""
    torch.set_num_threads(1)
    for logging in (diffusers_logging, transformers_logging):  # of captions cut to the encoder's length
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return open_teacher(Teacher("bundled:shapes-sd"))


def ended(data: Data, folder: Path, *, rows: int | None = None, sure: int | None = None) -> Ended:
    """Open a source and take two batches.

    Args:
        data: the source.
        folder: what it reads; not a byte of it may change.
        rows: how many there are, if that is known.
        sure: how many of them are good beyond doubt, if that is known.

    Raises:
        AssertionError: if it ends in anything but batches as they should be or an error of one line; if rows are lost
            without being counted.
    """
    before = files(folder)
    opened, report = teacher(), Report()
    setting = Setting(opened, Guided(opened.denoiser), Sampler(trailing(1)), BATCH, 0, "cpu", None, report)
    try:
        source = data.open(setting)
        batches = [source(Step.at(i)) for i in range(2)]
    except (ValueError, OSError) as error:
        assert_one_clear_line(str(error))
        assert data.on_bad == "error" or not sure, f"refused though {sure} rows are good: {error}"
        return "refused"
    finally:
        assert files(folder) == before, "input was changed"
    for batch in batches:
        assert len(batch) == BATCH and all(len(v) == BATCH and v.isfinite().all() for v in batch.cond.values())
        assert batch.x0 is None or (batch.x0.shape == batch.shape and batch.x0.isfinite().all())
    if data.on_bad == "error":
        assert report.skipped == 0, "skipped rows that the user wanted to know of"
    if rows is not None:
        assert report.rows == rows and (sure is None or rows - report.skipped >= sure)
    return "some skipped" if report.skipped else "used"
