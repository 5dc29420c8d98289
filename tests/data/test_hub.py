"""Hugging Face data sets, whole and streaming: the same rows, found again at any position."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stepdistill.data import HubImages, HubPrompts, Report, Setting
from stepdistill.data.stream import Stream
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.objective import Step
from stepdistill.sampling import Sampler, trailing
from tests.tiny import dit, sd

datasets = pytest.importorskip("datasets", reason="the extra 'data'")


def png(level: int) -> bytes:
    """A grey image."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (level,) * 3).save(out, "PNG")
    return out.getvalue()


def rows(n: int) -> Any:
    """A data set of n greys with captions and classes."""
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    cells = [{"image": {"bytes": png(i), "path": None}, "text": f"grey {i}", "label": i % 2} for i in range(n)]
    return datasets.Dataset.from_list(cells, features=features)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty rows in three parquet files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    folder = tmp_path / "parquet"
    folder.mkdir()
    for k in range(3):
        rows(20).shard(3, k, contiguous=True).to_parquet(folder / f"train-{k:05d}-of-00003.parquet")
    return folder


@pytest.fixture(scope="module")
def opened() -> Opened:
    """A tiny SD of 16x16 pixels."""
    return open_pipeline(sd.pipeline())


def setting_of(opened: Opened, cache: Path | None = None, batch: int = 3) -> Setting:
    """A run on it."""
    return Setting(opened, Guided(opened.denoiser), Sampler(trailing(1)), batch, 0, "cpu", cache, Report())


def test_a_folder_a_file_and_a_saved_data_set_hold_the_same(folder: Path, tmp_path: Path) -> None:
    rows(20).save_to_disk(tmp_path / "disk")
    rows(20).to_parquet(tmp_path / "one.parquet")
    for path in (folder, tmp_path / "disk", tmp_path / "one.parquet"):
        found = HubImages(str(path)).rows(pytest.fail)
        assert [row.text for row in found] == [f"grey {i}" for i in range(20)]
        assert found[7].content() == png(7)
        assert HubImages(str(path), streaming=True).captions(2) == ["grey 0", "grey 1"]
        assert HubPrompts(str(path)).texts() == [row.text for row in found]


def test_streams_give_every_row_once_an_epoch_and_the_same_after_a_resume(
    opened: Opened, folder: Path, tmp_path: Path
) -> None:
    data = HubImages(str(folder), streaming=True, shuffle=4)
    source = data.open(setting_of(opened, tmp_path / "cache", batch=4))
    batches = [source(Step.at(i)) for i in range(10)]
    texts = opened.encode([f"grey {i}" for i in range(20)])["prompt"]
    order = [int((texts - row).abs().flatten(1).amax(1).argmin()) for b in batches for row in b.cond["prompt"]]
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20)) and order[:20] != order[20:]
    for cache in (tmp_path / "cache", tmp_path / "none"):
        resumed = data.open(setting_of(opened, cache, batch=4))
        for i in (8, 3, 9):
            torch.testing.assert_close(resumed(Step.at(i)).x0, batches[i].x0, rtol=0, atol=1e-5)
            torch.testing.assert_close(resumed(Step.at(i)).cond, batches[i].cond, rtol=0, atol=1e-5)


def test_classes_are_labels_of_class_conditional_teachers(folder: Path) -> None:
    opened = open_pipeline(dit.pipeline())
    for streaming in (False, True):
        data = HubImages(str(folder), label_column="label", streaming=streaming)
        batch = data.open(setting_of(opened))(Step.at(0))
        grey = ((batch.x0 - opened.to_latents(torch.full((1, 3, 16, 16), -1.0))).abs().flatten(1).amax(1) > 0).tolist()
        assert set(batch.cond["class_labels"].tolist()) <= {0, 1} and len(grey) == 3 and data.captions(3) == []


def test_bad_rows_are_refused_or_counted(opened: Opened, folder: Path, tmp_path: Path) -> None:
    cells = [{"image": png(i), "text": f"grey {i}"} for i in range(4)]
    cells += [{"image": b"no image", "text": "x"}, {"image": None, "text": "y"}, {"image": png(0), "text": None}]
    datasets.Dataset.from_list(cells).to_parquet(tmp_path / "bad.parquet")
    for streaming in (False, True):
        data = HubImages(str(tmp_path / "bad.parquet"), on_bad="skip", streaming=streaming)
        setting = setting_of(opened)
        with pytest.warns(UserWarning, match="rows cannot be used and are left out"):
            source = data.open(setting)
            [source(Step.at(i)) for i in range(10)]
        told = setting.report.as_dict()
        assert told["skipped"] == 3 and told["reasons"] == {"damaged image": 1, "missing image": 1, "no caption": 1}
        assert told["rows"] == (None if streaming else 7)
    with pytest.raises(ValueError, match=r"bad.parquet\[train\] \d cannot be used .* set data.on_bad to 'skip'"):
        HubImages(str(tmp_path / "bad.parquet")).open(setting_of(opened))
    with pytest.raises(ValueError, match=r"bad.parquet row 6 cannot be used \(no caption\)"):
        HubPrompts(str(tmp_path / "bad.parquet")).texts()
    assert HubPrompts(str(tmp_path / "bad.parquet"), on_bad="skip").texts()[-2:] == ["x", "y"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_column": "img"}, r"data.image_column 'img': no such column in .*; it has image, text, label"),
        ({"text_column": "caption"}, r"data.text_column 'caption': no such column"),
        ({"label_column": "class"}, r"data.label_column 'class': no such column"),
        ({"split": "test"}, r"split 'test': datasets cannot open it"),
        ({"path": "/nowhere/at/all"}, r"data.path '/nowhere/at/all', split 'train': datasets cannot open it"),
        ({"path": __file__}, r"a file must be one of \.parquet"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_there_is_refused_in_a_line(
    opened: Opened, folder: Path, change: dict[str, Any], said: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=said) as caught:
        HubImages(**{"path": str(folder), "streaming": streaming} | change).open(setting_of(opened))(Step.at(0))
    assert "\n" not in str(caught.value)


def test_streams_have_no_buckets() -> None:
    with pytest.raises(ValueError, match=r"data.buckets need all images' sizes beforehand"):
        HubImages("x", streaming=True, buckets="sdxl")


# The stream itself


class Counted:
    """Numbers that count how often they are read."""

    def __init__(self, n: int, reads: list[int]):
        self.n, self.reads, self.start = n, reads, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(self.start, self.n):
            self.reads.append(i)
            self.start = i + 1
            yield {"i": i}

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]


def at(stream: Stream, *positions: int) -> list[int]:
    """Rows at positions; their names are their numbers."""
    found = [stream.at(position) for position in positions]
    assert all(number == cells["i"] for number, cells in found)
    return [number for number, _ in found]


def test_a_position_of_a_stream_is_the_same_however_it_is_reached(tmp_path: Path) -> None:
    reads: list[int] = []
    stream = Stream(lambda: Counted(10, reads), 4, 0, tmp_path / "notes.txt")
    order = at(stream, *range(40))
    assert reads == [*range(10)] * 4  # read forwards, once
    blocks = [order[k : k + 4] for k in range(0, 40, 4)]
    endless = [*range(10)] * 4
    assert [sorted(block) for block in blocks] == [sorted(endless[k : k + 4]) for k in range(0, 40, 4)]
    assert any(block != endless[4 * k : 4 * k + 4] for k, block in enumerate(blocks))
    assert at(stream, 3, 39, 0) == [order[3], order[39], order[0]]
    fresh = Stream(lambda: Counted(10, reads), 4, 0)
    assert at(fresh, 30, 7, 39) == [order[30], order[7], order[39]]
    assert at(Stream(lambda: Counted(10, reads), 4, 1), *range(40)) != order


def test_a_resumed_stream_goes_on_where_it_was_without_reading_all_before(tmp_path: Path) -> None:
    reads: list[int] = []
    notes = tmp_path / "notes.txt"
    order = at(Stream(lambda: Counted(1000, reads), 10, 0, notes), *range(950))
    with notes.open("a") as file:
        file.write("[200, 1, {")  # torn by a kill
    reads.clear()
    assert at(Stream(lambda: Counted(1000, reads), 10, 0, notes), 945, 946) == order[945:947]
    assert reads == list(range(940, 950))


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        Stream(lambda: Counted(0, []), 4, 0).at(0)
