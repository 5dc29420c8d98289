"""Image data: one size a batch, told to the network; the cache instead of encoders; bad rows refused or counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from stepdistill.build import build
from stepdistill.data import Captioned, ClassFolders, Data, Prompts, Report, Setting, epochs, image_shape
from stepdistill.models.denoiser import OF_SIZE, Guided
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.objective import Batch, Step
from stepdistill.objectives import CD, DMD2
from stepdistill.recipe import Recipe, Teacher
from stepdistill.sampling import Sampler, trailing
from stepdistill.trainer import AdamW, Run
from tests.tiny import dit, flux, flux2, pixart, sana, sd, sd3, sdxl, unet2d

SIZES = ((16, 16), (30, 18), (18, 30), (16, 17), (40, 22), (19, 30), (16, 16))
"""Widths and heights."""


def picture(path: Path, size: tuple[int, int], level: int) -> None:
    """A file of one grey, with its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)
    path.with_suffix(".txt").write_text(f"grey {level}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several shapes; the grey tells them apart."""
    for i, size in enumerate(SIZES):
        picture(tmp_path / "images" / f"{i}.png", size, 20 * i)
    return tmp_path / "images"


def setting_of(opened: Opened, cache: Path | None = None, batch: int = 3) -> Setting:
    """A run on it."""
    teacher = Guided(opened.denoiser, 2.0 if opened.null else 1.0, opened.null)
    return Setting(opened, teacher, Sampler(trailing(1)), batch, 0, "cpu", cache, Report())


@pytest.fixture(scope="module")
def tiny_sdxl() -> Opened:
    """A tiny SDXL of 16x16 pixels."""
    return open_pipeline(sdxl.pipeline())


@pytest.fixture(scope="module")
def tiny_sd() -> Opened:
    """A tiny SD of 16x16 pixels."""
    return open_pipeline(sd.pipeline())


def bucketed(folder: Path, **changes: object) -> Captioned:
    """With buckets of 256 pixels in steps of 4: 12x20, 16x16 and 20x12."""
    return Captioned(str(folder), buckets="generated", bucket_step=4, **changes)


@pytest.mark.parametrize("family", [sd, sd3, sdxl, flux, flux2, dit, sana], ids=lambda f: f.__name__.rpartition(".")[2])
@torch.no_grad()
def test_an_images_shape_is_that_of_a_decoded_sample(family: object) -> None:
    opened = open_pipeline(family.pipeline())
    assert image_shape(opened) == opened.decode(torch.zeros(1, *opened.sample_shape)).shape[1:]


# Buckets


@pytest.mark.parametrize("memory", [1.0, 0.0], ids=["table", "batch by batch"])
def test_a_batch_has_one_size_which_the_network_is_told(tiny_sdxl: Opened, folder: Path, memory: float) -> None:
    source = bucketed(folder, memory=memory).open(setting_of(tiny_sdxl))
    seen = set()
    for index in range(20):
        batch = source(Step.at(index))
        height, width = (2 * side for side in batch.shape[2:])
        seen.add((height, width))
        assert batch.x0.shape == batch.shape == (3, 4, height // 2, width // 2)
        told = torch.tensor([[height, width, 0.0, 0.0, height, width]]).expand(3, 6)
        assert_close(batch.cond["time_ids"], told, rtol=0, atol=0)
    assert seen == {(12, 20), (16, 16), (20, 12)}


def test_an_image_keeps_its_caption_and_its_shape(tiny_sdxl: Opened, folder: Path) -> None:
    """Each grey is encoded at the size its file is closest to, and stands beside its own words."""
    source = bucketed(folder).open(setting_of(tiny_sdxl, batch=1))
    nearest = [(16, 16), (12, 20), (20, 12), (16, 16), (12, 20), (20, 12), (16, 16)]
    expected = {}
    for i, size in enumerate(nearest):
        x0 = tiny_sdxl.to_latents(torch.full((1, 3, *size), 20 * i / 127.5 - 1))
        expected[i] = x0, tiny_sdxl.encode([f"grey {20 * i}"], size)
    found = []
    for index in range(7):
        batch = source(Step.at(index))
        (i,) = [
            i
            for i, (x0, cond) in expected.items()
            if x0.shape == batch.x0.shape and torch.allclose(x0, batch.x0, rtol=0, atol=1e-4)
            and torch.allclose(cond["prompt"], batch.cond["prompt"], rtol=0, atol=1e-4)
        ]  # fmt: skip
        found.append(i)
    assert sorted(found) == list(range(7))


def test_guidance_compares_samples_of_the_same_size(tiny_sdxl: Opened, folder: Path) -> None:
    """The null condition of SDXL holds a size too, the teacher's: a batch of another bucket needs its own."""
    setting = setting_of(tiny_sdxl)
    source = bucketed(folder).open(setting)
    batch = next(b for b in map(source, map(Step.at, range(20))) if b.shape[2] != b.shape[3])
    t, size = torch.full((3,), 0.5), (2 * batch.shape[2], 2 * batch.shape[3])
    null = tiny_sdxl.family.null(tiny_sdxl.pipeline, "", size)
    with torch.no_grad():
        guided = setting.teacher(batch.x0, t, batch.cond, want="eps")
        plain = tiny_sdxl.denoiser(batch.x0, t, batch.cond, want="eps")
        nulls = {k: v.expand(3, *v.shape[1:]) for k, v in null.items()}
        without = tiny_sdxl.denoiser(batch.x0, t, nulls, want="eps")
        wrong = tiny_sdxl.denoiser(batch.x0, t, {k: v.expand(3, *v.shape[1:]) for k, v in tiny_sdxl.null.items()})
    assert_close(guided, without + 2.0 * (plain - without), rtol=0, atol=1e-5)
    assert not torch.allclose(wrong, without, atol=1e-4)


@pytest.mark.parametrize("family", [sd, sd3, sdxl, pixart], ids=lambda family: family.__name__.rpartition(".")[2])
def test_conditions_that_follow_the_size_are_those_that_guidance_leaves_alone(family: object) -> None:
    opened = open_pipeline(family.pipeline())
    sides = [64 * round(opened.family.sample_shape(opened.pipeline, None)[1] / 64 + 1) * k for k in (1, 2)]
    one, other = (opened.encode(["a dog"], (side, sides[1])) for side in sides)
    changed = {k for k in one if not torch.equal(one[k], other[k])}
    assert changed == OF_SIZE & one.keys() and (changed or family not in (sdxl, pixart))


@pytest.mark.parametrize("family", [sd, sd3, sdxl], ids=lambda family: family.__name__.rpartition(".")[2])
def test_methods_train_on_buckets(family: object, folder: Path) -> None:
    """A GAN's heads, a critic and a rollout take any size that the network takes."""
    adam = {"student": AdamW(), "critic": AdamW(), "disc": AdamW()}
    opened = open_pipeline(family.pipeline())
    data = replace(bucketed(folder), enlarge=4.0)
    recipe = Recipe(Teacher("x", guidance=2.0), DMD2(), data, adam, Sampler(trailing(1)), run=Run(steps=1, batch=2))
    trainer = build(recipe, opened=opened).trainer
    shapes = set()
    for index in range(6):
        shapes.add(trainer.data(Step.at(index)).shape)
        assert all(value.isfinite() for value in trainer.step(index).values())
    assert len(shapes) > 1


@pytest.mark.parametrize(
    ("make", "change", "said"),
    [
        (dit.pipeline, {}, r"data.buckets 'generated': the teacher cannot make .* makes \[16, 16\] only"),
        (sd.pipeline, {"buckets": "sdxl"}, None),
        (sd.pipeline, {"bucket_step": 3}, r"the teacher cannot make .* multiples of 4.* another data.bucket_step"),
        (unet2d.pipeline, {}, "works on pixels of one size; use 'none'"),
    ],
)
def test_buckets_are_refused_where_the_teacher_has_one_size(
    make: Callable[[], object], change: dict[str, object], said: str | None, folder: Path
) -> None:
    opened, data = open_pipeline(make()), replace(bucketed(folder), **change)
    if said is None:
        assert len(data._sizes(opened)) == 40
        return
    with pytest.raises(ValueError, match=said) as caught:
        data.open(setting_of(opened))
    assert "\n" not in str(caught.value)


# Batch by batch


@pytest.mark.parametrize("buckets", ["none", "generated"])
def test_a_batch_depends_on_its_index_alone_whatever_was_seen_before(
    tiny_sd: Opened, folder: Path, tmp_path: Path, buckets: str
) -> None:
    data = replace(bucketed(folder, memory=0.0), buckets=buckets)
    source = data.open(setting_of(tiny_sd))
    batches = [source(Step.at(i)) for i in range(8)]
    for cache in (None, tmp_path / "cache"):
        for order in ((7, 2, 5), (0, 7)):
            other = data.open(setting_of(tiny_sd, cache))
            for i in order:
                again = other(Step.at(i, 1, 2))
                assert_close(again.x0, batches[i].x0, rtol=0, atol=1e-5)
                assert_close(again.cond, batches[i].cond, rtol=0, atol=1e-5)


def test_batch_by_batch_gives_what_a_table_gives(tiny_sd: Opened, folder: Path) -> None:
    table, lazy = (Captioned(str(folder), memory=m).open(setting_of(tiny_sd)) for m in (1.0, 0.0))
    for index in range(6):
        one, other = table(Step.at(index)), lazy(Step.at(index))
        assert_close(one.x0, other.x0, rtol=0, atol=1e-5)
        assert_close(one.cond, other.cond, rtol=0, atol=1e-5)


def test_a_killed_fill_ends_with_the_same_bits(
    tiny_sd: Opened, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last bits depend on who is encoded together, so a half filled group is encoded whole again."""
    monkeypatch.setattr("stepdistill.data.encoding.AT_ONCE", 5)

    asked: list[int] = []
    encode = tiny_sd.pipeline.vae.encode

    def counted(images: Tensor) -> Any:
        asked.append(len(images))
        return encode(images)

    monkeypatch.setattr(tiny_sd.pipeline.vae, "encode", counted)

    def run(cache: Path) -> list[Batch]:
        source = Captioned(str(folder)).open(setting_of(tiny_sd, cache))
        return [source(Step.at(i)) for i in range(3)]

    whole = run(tmp_path / "a")
    run(tmp_path / "b")
    for i, path in enumerate(sorted((tmp_path / "b").rglob("*.entry"))):
        if i % 3:
            path.unlink()
    asked.clear()
    resumed = run(tmp_path / "b")
    assert asked == [7]
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.x0, other.x0) and torch.equal(one.cond["prompt"], other.cond["prompt"])


@pytest.mark.parametrize("memory", [1.0, 0.0], ids=["table", "batch by batch"])
def test_with_a_full_cache_no_encoder_is_moved_or_asked(
    tiny_sd: Opened, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: float
) -> None:
    data, setting = bucketed(folder, memory=memory), setting_of(tiny_sd, tmp_path / "cache")
    expected = [data.open(setting)(Step.at(i)) for i in range(10)]
    pipeline = tiny_sd.pipeline
    for name in ("vae", "text_encoder"):
        monkeypatch.setattr(getattr(pipeline, name), "forward", None)
        monkeypatch.setattr(getattr(pipeline, name), "to", lambda *args: pytest.fail("moved"))
    monkeypatch.setattr(pipeline.vae, "encode", None)
    monkeypatch.setattr(pipeline.vae, "decode", None)
    source = data.open(setting_of(tiny_sd, tmp_path / "cache"))
    for i, batch in enumerate(expected):
        assert torch.equal(source(Step.at(i)).x0, batch.x0)
        assert torch.equal(source(Step.at(i)).cond["prompt"], batch.cond["prompt"])


def test_prompts_and_captions_share_what_is_encoded(tiny_sd: Opened, folder: Path, tmp_path: Path) -> None:
    Captioned(str(folder)).open(setting_of(tiny_sd, tmp_path))
    before = len(list(tmp_path.rglob("prompts-*.entry")))
    Prompts(prompts=("grey 0", "grey 20")).open(setting_of(tiny_sd, tmp_path))
    assert before == 7 == len(list(tmp_path.rglob("prompts-*.entry")))


def test_other_weights_or_settings_are_other_entries(tiny_sd: Opened, folder: Path, tmp_path: Path) -> None:
    def kept(opened: Opened, **changes: object) -> int:
        replace(Captioned(str(folder)), **changes).open(setting_of(opened, tmp_path))
        return len(list(tmp_path.rglob("latents-*.entry")))

    assert kept(tiny_sd) == kept(tiny_sd, memory=0.5) == 7
    assert kept(tiny_sd, enlarge=3.0) == 14
    other = open_pipeline(sd.pipeline())
    assert kept(other) == 14
    with torch.no_grad():
        next(other.pipeline.vae.parameters()).add_(1e-6)
    assert kept(other) == 21


# Rows that cannot be used


@pytest.fixture
def spoilt(folder: Path) -> Path:
    """Four good images, one damaged, one without a caption, one too small, one that is none."""
    for i in range(4, 7):
        (folder / f"{i}.png").unlink()
        (folder / f"{i}.txt").unlink()
    picture(folder / "damaged.png", (16, 16), 1)
    (folder / "damaged.png").write_bytes((folder / "damaged.png").read_bytes()[:50])
    picture(folder / "tiny.png", (3, 2), 2)
    picture(folder / "none.jpg", (16, 16), 3)
    (folder / "none.jpg").write_bytes(b"no image")
    picture(folder / "uncaptioned.png", (16, 16), 4)
    (folder / "uncaptioned.txt").write_text(" \n")
    return folder


@pytest.mark.filterwarnings("ignore:.*cannot be used and are left out")
@pytest.mark.parametrize("memory", [1.0, 0.0], ids=["table", "batch by batch"])
def test_bad_rows_are_left_out_counted_and_reported(
    tiny_sd: Opened, spoilt: Path, tmp_path: Path, memory: float
) -> None:
    setting = setting_of(tiny_sd, tmp_path / "cache")
    source = Captioned(str(spoilt), on_bad="skip", memory=memory).open(setting)
    setting.report.keep(tmp_path / "data.json")
    greys = tiny_sd.encode([f"grey {20 * i}" for i in range(4)])["prompt"]
    for index in range(8):
        for row in source(Step.at(index)).cond["prompt"]:
            assert min(float((row - grey).abs().max()) for grey in greys) < 1e-4
    told = json.loads((tmp_path / "data.json").read_text())
    assert told["source"] == "Captioned" and told["rows"] == 8 and told["skipped"] == 4 == setting.report.skipped
    assert told["reasons"] == {"damaged image": 2, "no caption": 1, "too small": 1}
    assert {Path(one["row"]).name for one in told["examples"]} == {
        "damaged.png", "none.jpg", "tiny.png", "uncaptioned.png"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*cannot be used and are left out")
def test_a_bad_row_is_judged_once(
    tiny_sd: Opened, spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its group would be encoded anew by every run."""
    data = Captioned(str(spoilt), on_bad="skip")
    reports = []
    for _ in range(2):
        setting = setting_of(tiny_sd, tmp_path / "cache")
        data.open(setting)
        reports.append(setting.report.as_dict())
        monkeypatch.setattr("stepdistill.data.encoding.fitted", None)  # not to be called again
    assert reports[0] == reports[1] and reports[0]["reasons"]["damaged image"] == 2
    with pytest.raises(ValueError, match=r"cannot be used \(no caption\)"):
        replace(data, on_bad="error").open(setting_of(tiny_sd, tmp_path / "cache"))


def test_a_bad_rows_stand_in_is_the_same_after_a_resume(tiny_sd: Opened, spoilt: Path) -> None:
    data = Captioned(str(spoilt), on_bad="skip", memory=0.0)
    with pytest.warns(UserWarning, match="left out"):
        source = data.open(setting_of(tiny_sd))
        batches = [source(Step.at(i)) for i in range(6)]
        resumed = data.open(setting_of(tiny_sd))
        for i in (5, 3):
            assert torch.equal(resumed(Step.at(i)).x0, batches[i].x0)


@pytest.mark.parametrize("memory", [1.0, 0.0], ids=["table", "batch by batch"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("damaged.png", r"damaged.png cannot be used \(damaged image: .*\); mend or remove it, or set data.on_bad"),
        ("tiny.png", r"tiny.png cannot be used \(too small: 3x2 pixels for 16x16\)"),
        ("none.jpg", r"none.jpg cannot be used \(damaged image: none of PNG, JPEG"),
        ("uncaptioned.png", r"uncaptioned.png cannot be used \(no caption\)"),
    ],
)
def test_a_bad_row_stops_the_run_in_one_line(
    tiny_sd: Opened, spoilt: Path, name: str, said: str, memory: float
) -> None:
    for path in (path for path in spoilt.iterdir() if path.stem not in {*"0123", Path(name).stem}):
        path.unlink()
    with pytest.raises(ValueError, match=said) as caught:
        source = Captioned(str(spoilt), memory=memory).open(setting_of(tiny_sd))
        [source(Step.at(i)) for i in range(3)]
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*cannot be used and are left out")
@pytest.mark.parametrize("memory", [1.0, 0.0], ids=["table", "batch by batch"])
def test_a_source_of_bad_rows_alone_is_an_error(tiny_sd: Opened, spoilt: Path, memory: float) -> None:
    for i in range(4):
        (spoilt / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=r"no row can be used; the first: "):
        Captioned(str(spoilt), on_bad="skip", memory=memory).open(setting_of(tiny_sd))(Step.at(0))


@pytest.mark.filterwarnings("ignore:.*cannot be used and are left out")
def test_a_bucket_of_bad_rows_alone_gives_its_turns_to_the_next(tiny_sd: Opened, folder: Path) -> None:
    """A fuzzer found it: with images encoded as they come, training stopped though good ones were there."""
    for i in (1, 4):  # the wide ones
        path = folder / f"{i}.png"
        path.write_bytes(path.read_bytes()[:-30])
    data = bucketed(folder, memory=0.0, on_bad="skip")
    source = data.open(setting_of(tiny_sd))
    batches = [source(Step.at(i)) for i in range(8)]
    assert {batch.shape[2:] for batch in batches} == {(8, 8), (10, 6)}
    again = data.open(setting_of(tiny_sd))
    assert all(torch.equal(again(Step.at(i)).x0, batches[i].x0) for i in (6, 2))


# Folders


def test_captions_come_from_csv_from_folders_within_and_from_their_names(tmp_path: Path) -> None:
    for name in ("red_fox/a.png", "red_fox/b.png", "owl/c.jpg", "d.png"):
        picture(tmp_path / name, (16, 16), 0)
    for name in ("red_fox/b", "owl/c", "d"):
        (tmp_path / name).with_suffix(".txt").unlink()
    rows = Captioned(str(tmp_path), class_caption="a photo of a {}").rows(pytest.fail)
    texts = {Path(row.name).name: row.text for row in rows}
    assert texts == {"a.png": "grey 0", "b.png": "a photo of a red fox", "c.jpg": "a photo of a owl", "d.png": ""}
    lines = 'title,file_name,text\n"one, two",red_fox/a.png,x\nthree,owl/c.jpg,y\n'
    (tmp_path / "metadata.csv").write_text(lines)
    data = Captioned(str(tmp_path), text_column="title")
    assert [(Path(r.name).name, r.text) for r in data.rows(pytest.fail)] == [("a.png", "one, two"), ("c.jpg", "three")]
    assert data.captions(5) == ["one, two", "three"]
    with pytest.raises(ValueError, match=r"metadata.csv, line 2 cannot be used \(missing column: no prompts\)"):
        Captioned(str(tmp_path), text_column="prompts").captions(1)


def test_class_folders_give_labels_to_class_conditional_teachers(tmp_path: Path) -> None:
    for i, name in enumerate(("ant/0.png", "ant/1.png", "bee/2.png", "cat/3.png")):
        picture(tmp_path / name, (16, 16), 60 * i)
    opened = open_pipeline(dit.pipeline())
    for memory in (1.0, 0.0):
        batch = ClassFolders(str(tmp_path), memory=memory).open(setting_of(opened, batch=4))(Step.at(0))
        order = epochs(4, 4, 0)(0).tolist()
        assert batch.cond["class_labels"].tolist() == [[0, 0, 1, 2][i] for i in order]
        grey = torch.tensor([60.0 * i / 127.5 - 1 for i in order])
        assert_close(batch.x0, opened.to_latents(grey.view(4, 1, 1, 1).expand(4, 3, 16, 16)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory": -1.0}, "data.memory"),
        ({"cache_gb": float("nan")}, "data.cache_gb"),
        ({"enlarge": 0.5}, "data.enlarge"),
        ({"bucket_step": 0}, "data.bucket_step"),
        ({"aspect": 0.0}, "data.aspect"),
        ({"class_caption": "x"}, "class_caption"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(Captioned("folder"), **change)


def test_a_run_leaves_its_books(tiny_sd: Opened, spoilt: Path, tmp_path: Path) -> None:
    data: Data = Captioned(str(spoilt), on_bad="skip")
    recipe = Recipe(Teacher("x"), CD(), data, {"student": AdamW()}, Sampler(trailing(1)), run=Run(steps=1, batch=2))
    with pytest.warns(UserWarning, match="Captioned: 4 of 8 rows cannot be used"):
        report = build(recipe, opened=tiny_sd, cache=tmp_path / "cache").report
    assert (report.rows, report.skipped) == (8, 4)
