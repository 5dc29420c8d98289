"""WebDataset shards: samples are found where they lie, in any order; what is no plain tar is refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepdistill.data import Report, Setting, WebShards
from stepdistill.data.tars import braces
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import open_pipeline
from stepdistill.objective import Step
from stepdistill.sampling import Sampler, trailing
from tests.tiny import sd


def png(level: int) -> bytes:
    """A grey image."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (level,) * 3).save(out, "PNG")
    return out.getvalue()


def shard(path: Path, files: dict[str, bytes]) -> Path:
    """A tar of these files, in their order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two shards of three samples, captions as text and as JSON."""
    files = {}
    for i in range(6):
        files[f"set/{i:03d}.png"] = png(40 * i)
        files[f"set/{i:03d}.cls"] = b"7"
        caption = f"grey {i}"
        files |= {f"set/{i:03d}.txt": caption.encode()} if i % 2 else {
            f"set/{i:03d}.json": json.dumps({"caption": caption}).encode()
        }  # fmt: skip
    for k in range(2):
        part = {name: content for name, content in files.items() if int(name[4:7]) // 3 == k}
        shard(tmp_path / f"shard-{k:02d}.tar", part)
    return str(tmp_path / "shard-{00..01}.tar")


def test_samples_are_found_where_they_lie(shards: str) -> None:
    rows = WebShards(shards).rows(pytest.fail)
    assert [row.text for row in rows] == [f"grey {i}" for i in range(6)]
    for i in (4, 0, 3):
        assert rows[i].content() == png(40 * i) and rows[i].content(8) == png(40 * i)[:8]


def test_shards_train_like_any_source(shards: str, tmp_path: Path) -> None:
    opened = open_pipeline(sd.pipeline())
    setting = Setting(opened, Guided(opened.denoiser), Sampler(trailing(1)), 4, 0, "cpu", tmp_path / "cache", Report())
    source = WebShards(shards).open(setting)
    again = WebShards(shards, memory=0.0).open(setting)
    for index in (3, 0):
        assert torch.equal(again(Step.at(index)).x0, source(Step.at(index)).x0)
    assert setting.report.as_dict() == {"source": "WebShards", "rows": 6, "skipped": 0, "reasons": {}, "examples": []}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{008..010}.tar", ["s-008.tar", "s-009.tar", "s-010.tar"]),
        ("s-{9..11}.tar", ["s-9.tar", "s-10.tar", "s-11.tar"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{x}", ["{x}"]),
    ],
)
def test_braces_are_a_shells(pattern: str, expected: list[str]) -> None:
    assert braces(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("https://example.org/a-{0..9}.tar", "only local files are read; download them first"),
        ("pipe:cat a.tar", "only local files are read"),
        ("nowhere-{0..1}.tar", "nowhere-0.tar: no such file"),
        ("nowhere-*.tar", r"nowhere-\*.tar: no such file"),
    ],
)
def test_what_is_not_there_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WebShards(pattern).rows(pytest.fail)


def test_stars_take_all_shards_in_order(shards: str, tmp_path: Path) -> None:
    assert WebShards(str(tmp_path / "*.tar")).captions(6) == WebShards(shards).captions(6)


def damaged(tmp_path: Path, how: str) -> Path:
    """A shard of three samples that is not as it should be."""
    path = shard(tmp_path / "bad.tar", {f"{i}.{s}": c for i in range(3) for s, c in (("png", png(i)), ("txt", b"x"))})
    raw = bytearray(path.read_bytes())
    if how == "packed":
        raw = bytearray(gzip.compress(raw))
    elif how == "cut":
        del raw[1200:]
    elif how == "header":
        raw[2048 : 2048 + 512] = b"\x55" * 512  # the third file's
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("how", ["packed", "cut", "header"])
def test_a_damaged_shard_stops_the_run_or_is_counted(tmp_path: Path, how: str) -> None:
    """A broken header in the middle looks to tarfile like the end of the archive."""
    path = damaged(tmp_path, how)
    told: list[str] = []
    good = shard(tmp_path / "good.tar", {"a.png": png(1), "a.txt": b"a"})
    data = WebShards(f"{tmp_path}/{{bad,good}}.tar")
    rows = data.rows(lambda name, problem: told.append(f"{name} {problem}"))
    assert [row.name for row in rows] == [f"{good}:a.png"]
    assert len(told) == 1 and told[0].startswith(f"{path} damaged shard")
    with pytest.raises(ValueError, match=r"bad.tar cannot be used \(damaged shard: .* set data.on_bad to 'skip'"):
        data.captions(1)


def test_samples_without_image_or_with_a_caption_that_is_none_are_told(tmp_path: Path) -> None:
    files = {"a.txt": b"no image", "b.png": png(0), "b.json": b"[]", "c.png": png(0), "c.txt": b"\xff", "d.png": png(0)}
    told: list[str] = []
    rows = WebShards(str(shard(tmp_path / "s.tar", files))).rows(lambda name, problem: told.append(problem.kind))
    assert told == ["missing image", "no object", "caption is no Unicode"]
    assert [(row.name.rpartition(":")[2], row.text) for row in rows] == [("d.png", "")]  # refused as it is used
