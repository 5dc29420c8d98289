"""Prompts and captioned images: encoded once or batch by batch, the same after a resume, refused in one line."""

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

from stepdistill import shapes
from stepdistill.data import (
    Captioned,
    Data,
    Labels,
    Prompts,
    Setting,
    ShapesData,
    ShapesPrompts,
    TeacherPairs,
    epochs,
    image_shape,
)
from stepdistill.data.rows import fitted, size_of
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.objective import Batch, Step
from stepdistill.objectives import CD, KD
from stepdistill.recipe import Recipe, Teacher, decode, encode
from stepdistill.sampling import DpmPP2M, Sampler, trailing
from stepdistill.trainer import AdamW
from tests.tiny import sd, sd3, unet2d

TEXTS = ("a red ring", "a dog", "rain", "a dog", "sun  and moon")
ONE_STEP = Sampler(trailing(1))
SOLVER = Sampler(trailing(4), DpmPP2M())


@pytest.fixture(scope="module", params=[sd, sd3], ids=["sd", "sd3"])
def opened(request: pytest.FixtureRequest) -> Opened:
    """Two tiny text-to-image pipelines; samples of both are (4, 8, 8), pictures 16x16."""
    return open_pipeline(request.param.pipeline())


@pytest.fixture
def setting(opened: Opened) -> Setting:
    """A run of batch 3 that keeps nothing on disk."""
    return Setting(opened, Guided(opened.denoiser, 2.0, opened.null), ONE_STEP, 3, 0, "cpu", None)


def same(one: Cond, other: Cond, atol: float = 1e-5) -> None:
    """Equal but for what the size of a batch does to rounding."""
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name], rtol=0, atol=atol)


class Calls:
    """How often the pipeline's encoder is asked, and for how many prompts."""

    def __init__(self, opened: Opened, monkeypatch: pytest.MonkeyPatch):
        self.prompts: list[int] = []
        known = opened.pipeline.encode_prompt

        def counted(prompt: list[str], *args: Any, **kwargs: Any) -> Any:
            self.prompts.append(len(prompt))
            return known(prompt, *args, **kwargs)

        monkeypatch.setattr(opened.pipeline, "encode_prompt", counted)


# Prompts


def test_every_prompt_comes_once_an_epoch_with_its_own_encoding(setting: Setting) -> None:
    source, rows_of = Prompts(prompts=TEXTS).open(setting), epochs(len(TEXTS), 3, 0)
    assert sorted(torch.cat([rows_of(i) for i in range(5)]).tolist()) == sorted([0, 1, 2, 3, 4] * 3)
    for index in (0, 1, 4):
        batch = source(Step.at(index))
        assert batch.shape == (3, 4, 8, 8) and batch.x0 is None and batch.path is None
        same(batch.cond, setting.opened.encode([TEXTS[i] for i in rows_of(index).tolist()]))


def test_a_batch_depends_on_its_index_alone(setting: Setting) -> None:
    source = Prompts(prompts=TEXTS).open(setting)
    first = source(Step.at(7))
    source(Step.at(2))
    same(source(Step.at(7, 1, 2)).cond, first.cond, 0)
    same(Prompts(prompts=TEXTS).open(setting)(Step.at(7)).cond, first.cond, 0)


def test_prompts_are_encoded_once_before_training_or_with_each_batch(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tuple(f"number {i % 100}" for i in range(150))
    calls = Calls(setting.opened, monkeypatch)
    table = Prompts(prompts=texts).open(setting)
    assert calls.prompts == [64, 36]  # those that are alike once
    batches = [table(Step.at(i)) for i in range(50)]
    assert calls.prompts == [64, 36]
    calls.prompts.clear()
    lazy = Prompts(prompts=texts, memory=0.0).open(setting)
    for index in (0, 30):
        same(lazy(Step.at(index)).cond, batches[index].cond)
    assert calls.prompts == [64, 3, 3]


def test_a_table_is_kept_if_it_is_within_the_budget_to_the_byte(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(v.nbytes for v in setting.opened.encode(["a"]).values())
    calls = Calls(setting.opened, monkeypatch)
    for memory, expected in ((2 * size * 1e-9, [2]), ((2 * size - 1) * 1e-9, [2, 3])):
        calls.prompts.clear()
        Prompts(prompts=("a", "b"), memory=memory).open(setting)(Step.at(0))
        assert calls.prompts == expected


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_files_are_taken_as_they_are_without_blank_lines(name: str, tmp_path: Path) -> None:
    lines = ["# a hash is no comment", "", " two  spaces ", "née", "   "]
    if name == "p.jsonl":
        rows = [json.dumps({key: line}) for key, line in zip(("prompt", "text", "caption"), lines[::2], strict=True)]
        lines = [rows[0], "", rows[1]]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    with pytest.warns(UserWarning, match="lines are blank and left out"):
        texts = Prompts(str(tmp_path / name)).texts()
    assert texts == ["# a hash is no comment", " two  spaces ", "née"][: len(texts)] and len(texts) >= 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no.txt", None, r"data.file \S*no.txt: no such file"),
        ("a.txt", b"", "no prompts in it"),
        ("a.txt", b"\n \n", "no prompts in it"),
        ("a.txt", b"ab\ncd\n\xff", "not UTF-8 at line 3, byte 6"),
        ("a.jsonl", b'{"prompt": "x"}\n{', r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"prompts": "x"}', "line 1: missing column: no prompt, text or caption"),
        ("a.jsonl", b'\n{"text": 3}', "line 2: caption is no text: 3"),
        ("a.jsonl", b'["x"]', "line 1: no object: must be"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: caption is no Unicode: lone surrogate at character 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*are blank")
def test_files_that_are_no_prompts_are_refused(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        Prompts(str(tmp_path / name)).texts()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Prompts(), "takes a file or prompts; neither is given"),
        (lambda: Prompts("a.txt", ("b",)), "takes a file or prompts; both are given"),
        (lambda: Prompts(prompts=("a", " ")), r"data.prompts\[1\] is blank"),
        (lambda: Prompts("a.txt", memory=-1.0), "data.memory must be at least 0"),
        (lambda: ShapesPrompts(0), "data.count must be at least 1"),
        (lambda: ShapesData(count=0), "data.count must be at least 1"),
        (lambda: ShapesData(dropout=1.5), "data.dropout must lie in"),
    ],
)
def test_values_out_of_range_are_named(make: Callable[[], Data], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    "data",
    [
        Prompts("a.txt", memory=0.5),
        Prompts(prompts=("a", "b")),
        Captioned("folder", on_bad="skip", buckets="sdxl"),
        ShapesData(10, 3),
        ShapesPrompts(10, 3, 0.5),
        TeacherPairs(10, solver=SOLVER, prompts=ShapesPrompts(5)),
        TeacherPairs(10),
    ],
)
def test_sources_read_back_from_json(data: Data) -> None:
    assert decode(json.loads(json.dumps(encode(data))), Data, "data") == data


def test_text_and_labels_are_not_mixed_up(setting: Setting) -> None:
    plain = open_pipeline(unet2d.pipeline())
    with pytest.raises(ValueError, match="takes no prompts"):
        Prompts(prompts=TEXTS).examples(plain, 1)
    with pytest.raises(ValueError, match="gives no prompts, and StableDiffusion"):
        Labels().examples(setting.opened, 1)
    with pytest.raises(ValueError, match="takes prompts, not class labels"):
        Labels().open(setting)
    assert Labels(0).examples(plain, 5) == {}


def test_examples_are_the_first_prompts(setting: Setting) -> None:
    same(Prompts(prompts=TEXTS).examples(setting.opened, 7), setting.opened.encode([*TEXTS, *TEXTS[:2]]))


def test_captions_of_scenes_are_the_same_again() -> None:
    texts = ShapesPrompts(50, 3).texts()
    assert len(texts) == 50 and ShapesPrompts(50, 3).texts() == texts != ShapesPrompts(50, 4).texts()
    full = ShapesPrompts(50, 3, 0.0).texts()
    assert all("background" in text for text in full) and not all("background" in text for text in texts)


# Images


def picture(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (16, 16), mode: str = "RGB") -> None:
    """A file of one colour."""
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images with captions beside them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
        picture(folder / f"{name}.png", colour, (48, 20))
        (folder / f"{name}.txt").write_text(f"picture {name}\n")
    return folder


def pairs(source: Callable[[Step], Batch], batches: int) -> tuple[Tensor, Tensor]:
    """Latents and conditions of the first batches."""
    found = [source(Step.at(i)) for i in range(batches)]
    return torch.cat([b.x0 for b in found]), torch.cat([b.cond["prompt"] for b in found])


def test_latents_are_the_autoencoders_and_keep_their_captions(setting: Setting, folder: Path) -> None:
    opened = setting.opened
    assert image_shape(opened) == (3, 16, 16)
    x0, prompt = pairs(Captioned(str(folder)).open(setting), 1)
    order = epochs(3, 3, 0)(0).tolist()
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert_close(x0, opened.to_latents(colours[order][:, :, None, None].expand(3, 3, 16, 16)), rtol=0, atol=1e-5)
    assert_close(prompt, opened.encode([f"picture {'abc'[i]}" for i in order])["prompt"], rtol=0, atol=1e-5)


def test_metadata_name_files_and_captions(setting: Setting, folder: Path) -> None:
    beside = pairs(Captioned(str(folder)).open(setting), 2)
    rows = [json.dumps({"file_name": f"{name}.png", "text": f"picture {name}"}) for name in "abc"]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for text in folder.glob("*.txt"):
        text.unlink()
    named = pairs(Captioned(str(folder)).open(setting), 2)
    assert torch.equal(named[0], beside[0]) and torch.equal(named[1], beside[1])


def test_images_are_cropped_around_the_middle_turned_upright_and_laid_on_white(
    setting: Setting, tmp_path: Path
) -> None:
    wide = Image.new("RGB", (64, 16), "black")
    wide.paste((255, 255, 255), (24, 0, 40, 16))
    turned = wide.rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    wide.save(tmp_path / "a.png")
    turned.save(tmp_path / "b.png", exif=exif)
    picture(tmp_path / "c.png", (0, 0, 0, 0), (20, 20), "RGBA")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x")
    rows = Captioned(str(tmp_path)).rows(pytest.fail)
    assert [size_of(row) for row in rows] == [(16, 64), (16, 64), (20, 20)]
    for row in rows:
        image = fitted(row.content(), (16, 16), 2.0)
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and int(image.min()) == 255


def test_latents_are_made_once_and_anew_when_a_file_changes(
    setting: Setting, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = setting._replace(cache=tmp_path / "cache")

    def entries(kind: str) -> list[Path]:
        return list((tmp_path / "cache").glob(f"entries/??/{kind}-*.entry"))

    first = pairs(Captioned(str(folder)).open(cached), 2)
    with monkeypatch.context() as patched:
        patched.setattr(setting.opened.pipeline.vae, "encode", None)  # not to be called
        again = pairs(Captioned(str(folder)).open(cached), 2)
    assert torch.equal(again[0], first[0])
    picture(folder / "b.png", (9, 9, 9), (48, 21))
    changed = pairs(Captioned(str(folder)).open(cached), 2)
    assert not torch.equal(changed[0], first[0]) and torch.equal(changed[1], first[1])
    assert len(entries("latents")) == 4
    other = open_pipeline(type(setting.opened.pipeline)(**setting.opened.pipeline.components))
    before = other.pipeline.vae.config.scaling_factor
    other.pipeline.vae.register_to_config(scaling_factor=before * 2)
    pairs(Captioned(str(folder)).open(cached._replace(opened=other)), 2)
    other.pipeline.vae.register_to_config(scaling_factor=before)
    assert len(entries("latents")) == 7


def test_images_that_cannot_be_used_stop_the_run_or_are_counted(setting: Setting, folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:40])
    with pytest.raises(
        ValueError, match=r"\S*b.png cannot be used \(damaged image: .*\); .* set data.on_bad to 'skip'"
    ):
        Captioned(str(folder)).open(setting)
    (folder / "c.txt").unlink()
    with pytest.raises(ValueError, match=r"\S*c.png cannot be used \(no caption\)"):
        Captioned(str(folder)).open(setting)
    skipping, cached = Captioned(str(folder), on_bad="skip"), setting._replace(cache=tmp_path / "cache")
    with pytest.warns(
        UserWarning, match=r"Captioned: 2 of 3 rows cannot be used and are left out \(1 no caption, 1 damaged image\)"
    ):
        _, prompt = pairs(skipping.open(cached), 1)
    expected = setting.opened.encode(["picture a"] * 3)["prompt"]
    assert_close(prompt, expected, rtol=0, atol=1e-5)
    _, again = pairs(skipping.open(cached), 1)
    assert torch.equal(again, prompt) and skipping.captions(5) == ["picture a", "picture b"]
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no row can be used; the first: \S*c.png \(no caption\)"):
        skipping.open(setting)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no images with captions there"),
        (
            b'{"file_name": "a.png"}',
            "metadata.jsonl, line 1 cannot be used .missing column: no prompt, text or caption",
        ),
        (b'\n{"text": "x"}', "metadata.jsonl, line 2 cannot be used .missing column: no file_name"),
        (b'{"file_name": "no.png", "text": "x"}', r"no.png cannot be used \(missing image: no such file"),
        (b'{"file_name": "a.png", "text": ""}', r"a.png cannot be used \(no caption\)"),
        (b"\xff", "metadata.jsonl: not UTF-8 at line 1"),
    ],
)
def test_folders_without_images_or_captions_are_refused(
    content: bytes | None, said: str, setting: Setting, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        Captioned(str(tmp_path / "nowhere")).open(setting)
    if content is not None:
        (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        Captioned(str(tmp_path)).open(setting)
    assert "\n" not in str(caught.value)


def test_scenes_are_encoded_with_their_captions(tmp_path: Path) -> None:
    small = open_pipeline(sd.pipeline(sample_size=16))
    setting = Setting(small, Guided(small.denoiser), ONE_STEP, 4, 0, "cpu", tmp_path)
    data = ShapesData(6, 3)
    batch, again = (data.open(setting)(Step.at(1)) for _ in range(2))
    rows = epochs(6, 4, 0)(1)
    scenes = shapes.draw(6, 3)
    assert_close(batch.x0, small.to_latents(scenes.images[rows].float() / 127.5 - 1), rtol=0, atol=1e-5)
    texts = shapes.captions(scenes.attributes, 3).texts
    same(batch.cond, small.encode([texts[i] for i in rows.tolist()]))
    assert torch.equal(again.x0, batch.x0)
    with pytest.raises(ValueError, match=r"images of 32x32; the teacher makes \[16, 16\]"):
        data.open(setting._replace(opened=open_pipeline(sd.pipeline()), cache=None))


# The teacher's trajectories


def test_trajectories_follow_their_prompts_and_guidance(setting: Setting) -> None:
    batch = TeacherPairs(7, solver=SOLVER, prompts=Prompts(prompts=TEXTS)).open(setting)(Step.at(1))
    rows = epochs(7, 3, 0)(1) % len(TEXTS)
    same(batch.cond, setting.opened.encode([TEXTS[i] for i in rows.tolist()]))
    assert batch.path.shape == (3, 2, 4, 8, 8) and torch.equal(batch.x0, batch.path[:, -1])
    with torch.no_grad():
        expected = SOLVER.run(setting.teacher, batch.path[:, 0], batch.cond, torch.Generator())
    assert_close(batch.x0, expected, rtol=0, atol=1e-4)


def test_large_trajectories_are_made_in_parts_with_the_same_noise(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TeacherPairs(7, solver=SOLVER, prompts=Prompts(prompts=TEXTS))
    parts = data.open(setting)(Step.at(0))
    monkeypatch.setattr("stepdistill.data.pairs.SMALL", 1024)
    whole = data.open(setting)(Step.at(0))
    assert torch.equal(parts.path[:, 0], whole.path[:, 0])
    assert_close(parts.path, whole.path, rtol=0, atol=1e-4)


def test_what_changes_trajectories_of_prompts_changes_the_cache(setting: Setting, tmp_path: Path) -> None:
    setting = setting._replace(cache=tmp_path)
    data = TeacherPairs(2, solver=SOLVER, prompts=Prompts(prompts=TEXTS))
    other = Prompts(prompts=(*TEXTS[:-1], "other"))
    for changed in (data, replace(data, prompts=other), replace(data, count=3)):
        changed.open(setting)
        changed.open(setting)
    data.open(setting._replace(sampler=Sampler(trailing(2))))
    negative = open_pipeline(setting.opened.pipeline, negative="blurry")
    data.open(setting._replace(opened=negative, teacher=Guided(negative.denoiser, 2.0, negative.null)))
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def test_recipes_take_prompts_where_no_images_are_needed() -> None:
    adam = {"student": AdamW()}
    with pytest.raises(ValueError, match="objective CD needs data with"):
        Recipe(Teacher("x"), CD(), Prompts(prompts=TEXTS), adam, ONE_STEP)
    Recipe(Teacher("x"), KD(), TeacherPairs(4, solver=SOLVER, prompts=Prompts(prompts=TEXTS)), adam, ONE_STEP)
