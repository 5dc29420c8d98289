"""The shapes world, its bundled teachers and their judges: the drawing, the files, and what they can do."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.evaluation.shapes import ShapesJudges, load_judges, load_shapes_classifier
from stepdistill.shapes import ABSENT, COLOURS, HEADS, SHAPES, SIZE, Scenes, align, caption, captions, coverage, draw

ASSETS = Path(__file__).parents[1] / "assets"
FOLDERS = ("shapes-judges", "shapes-sd", "shapes-sd3")
COLUMN = {name: column for column, name in enumerate(HEADS)}


def manifest(folder: str) -> dict:
    return json.loads((ASSETS / folder / "MANIFEST.json").read_text())


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw(1000, seed=31337)


@pytest.fixture(scope="module")
def judges() -> ShapesJudges:
    return load_judges()


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


# The drawing


def test_the_same_seed_draws_the_same_scenes() -> None:
    first, second, other = draw(50, 3), draw(50, 3), draw(50, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (50, 3, SIZE, SIZE) and first.images.dtype == torch.uint8
    assert first.attributes.shape == (50, len(HEADS)) and first.attributes.dtype == torch.int64


def inside(name: str, u: float, v: float, radius: float) -> bool:
    """Whether a point of the shape's own frame, y downwards, lies in it; from corners and circles, not distances."""
    if name == "circle":
        return math.hypot(u, v) < radius
    if name == "ring":
        return 0.53 * radius < math.hypot(u, v) < 1.03 * radius
    if name == "square":
        h = 0.86 * radius
        corners = [(-h, -h), (h, -h), (h, h), (-h, h)]
    else:
        r = 1.24 * radius
        corners = [(r * math.sin(a), -r * math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    crossed = False
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y1 > v) != (y2 > v) and u < x1 + (v - y1) * (x2 - x1) / (y2 - y1):
            crossed = not crossed
    return crossed


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_coverage_is_the_share_of_points_inside(shape: int) -> None:
    x, y, radius, rotation = 15.3, 17.1, 7.4, 0.2
    fine, side = 4, SIZE * 4
    share = torch.zeros(SIZE, SIZE)
    for row in range(side):
        for column in range(side):
            dx, dy = (column + 0.5) / fine - x, (row + 0.5) / fine - y
            u = math.cos(rotation) * dx + math.sin(rotation) * dy
            v = math.cos(rotation) * dy - math.sin(rotation) * dx
            share[row // fine, column // fine] += inside(SHAPES[shape], u, v, radius) / fine**2
    drawn = coverage(torch.tensor([shape]), torch.tensor([[x, y, radius, rotation]]))[0]
    difference = (drawn - share).abs()
    assert float(difference.mean()) < 0.006
    assert float(difference.max()) < 0.35  # a sharp corner
    assert abs(float(drawn.sum() - share.sum())) < 0.03 * float(share.sum())


def test_centres_have_their_paint_and_corners_the_background(scenes: Scenes) -> None:
    for index in range(100):
        image, attributes = scenes.images[index].float(), scenes.attributes[index]
        for thing in range(2):
            x, y, radius, _ = scenes.geometry[index, thing].tolist()
            if attributes[COLUMN["shape2" if thing else "shape"]] in (ABSENT, SHAPES.index("ring")):
                continue
            assert radius >= 5.5
            error = (image[:, int(y), int(x)] - scenes.paint[index, thing + 1]).abs().max()
            assert error < 14, (index, thing)  # brightness varies by up to 9, and bicubic overshoots


def test_attributes_are_consistent_and_all_occur(scenes: Scenes) -> None:
    a = {name: scenes.attributes[:, column] for name, column in COLUMN.items()}
    pair = a["layout"] > 0
    assert 0.2 < float(pair.float().mean()) < 0.3
    for name in ("shape2", "colour2"):
        assert torch.equal(a[name] == ABSENT, ~pair)
    assert torch.equal(a["size"] == ABSENT, pair)
    assert not (a["colour"] == a["background"]).any() and not (a["colour2"] == a["background"]).any()
    for name, values in HEADS.items():
        assert set(a[name][a[name] != ABSENT].tolist()) == set(range(len(values)))
    x, y = scenes.geometry[..., 0], scenes.geometry[..., 1]
    assert (x[:, 0] < x[:, 1])[a["layout"] == 1].all() and (y[:, 0] < y[:, 1])[a["layout"] == 2].all()


# Captions


def test_a_full_caption_reads_well() -> None:
    values = [1, 4, 0, 0, ABSENT, 3, 2]
    everything = [value != ABSENT for value in values]
    assert caption(values, everything) == "a red circle left of a blue ring on a white background"
    assert caption([0, 5, 2, 3, 1, ABSENT, ABSENT], [True] * 5 + [False] * 2) == (
        "a large yellow triangle on a black background"
    )
    assert caption([0, 5, 2, 3, 1, ABSENT, ABSENT], [True] + [False] * 6) == "a shape"


def test_captions_name_what_the_mask_says(scenes: Scenes) -> None:
    told = captions(scenes.attributes, 1, dropout=0.4)
    assert told.texts == captions(scenes.attributes, 1, dropout=0.4).texts
    for text, values, named in zip(told.texts, scenes.attributes.tolist(), told.named.tolist(), strict=True):
        words = text.replace(" on a ", " | ").split(" | ")
        background = words[1].removesuffix(" background") if len(words) > 1 else None
        things = words[0].replace(" left of ", " & ").replace(" above ", " & ").split(" & ")
        expected = [set(), set()]
        for name, thing in (("size", 0), ("colour", 0), ("shape", 0), ("colour2", 1), ("shape2", 1)):
            if named[COLUMN[name]]:
                expected[thing].add(HEADS[name][values[COLUMN[name]]])
        for thing, spoken in enumerate(things):
            assert set(spoken.split()) - {"a", "shape"} == expected[thing]
        assert background == (list(COLOURS)[values[1]] if named[1] else None)
        assert len(things) == 1 + (values[0] > 0) and named[0]
    full = captions(scenes.attributes, 1, dropout=0.0)
    assert torch.equal(full.named, scenes.attributes != ABSENT)


def test_only_named_attributes_count() -> None:
    truth = torch.tensor([[0, 1, 2, 3, 1, ABSENT, ABSENT]])
    seen = torch.tensor([[0, 1, 2, 5, 1, 3, 3]])
    named = truth != ABSENT
    assert align(seen, truth, named).tolist() == [False]
    named[0, COLUMN["colour"]] = False
    assert align(seen, truth, named).tolist() == [True]


# The files


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_those_of_the_manifest(folder: str) -> None:
    root = ASSETS / folder
    recorded = manifest(folder)["files"]
    found = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} - {"MANIFEST.json"}
    assert found == set(recorded)
    for name, entry in recorded.items():
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == entry["sha256"], name


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_gate_is_passed(folder: str) -> None:
    gates = manifest(folder)["gates"]
    assert gates and all(gate["measured"] >= gate["bound"] for gate in gates.values())


def test_all_of_it_is_small_and_holds_no_pickle() -> None:
    files = [path for folder in FOLDERS for path in (ASSETS / folder).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


@pytest.fixture(scope="module", params=["shapes-sd", "shapes-sd3"])
def teacher(request: pytest.FixtureRequest) -> tuple[DiffusionPipeline, dict]:
    """A teacher as a user would load it, without any argument."""
    pipe = DiffusionPipeline.from_pretrained(ASSETS / request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe, manifest(request.param)["call"]


def test_a_bare_load_is_float32_throughout(teacher: tuple[DiffusionPipeline, dict]) -> None:
    pipe, _ = teacher
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert len(modules) == (3 if "unet" in modules else 5)
    assert {weight.dtype for part in modules.values() for weight in part.state_dict().values()} == {torch.float32}


def test_a_teacher_draws_what_it_is_told(
    teacher: tuple[DiffusionPipeline, dict], judges: ShapesJudges, scenes: Scenes
) -> None:
    """Loose: 40 images of 10 steps; the manifest has 500 images of 50."""
    pipe, call = teacher
    told = captions(scenes.attributes[:40], 0, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    images = pipe(told.texts, num_inference_steps=10, generator=generator, output_type="pt", **call).images
    assert images.shape == (40, 3, SIZE, SIZE) and bool(images.isfinite().all())
    seen = judges.classifier.attributes(2 * images - 1)
    assert float(align(seen, scenes.attributes[:40], told.named).float().mean()) > 0.5
    background, layout = (seen[:, c] == scenes.attributes[:40, c] for c in (COLUMN["background"], COLUMN["layout"]))
    assert float(background.float().mean()) > 0.9 and float(layout.float().mean()) > 0.8


def test_reconstructions_keep_every_attribute(
    teacher: tuple[DiffusionPipeline, dict], judges: ShapesJudges, scenes: Scenes
) -> None:
    vae = teacher[0].vae
    assert isinstance(vae, AutoencoderKL) and vae.config.shift_factor == 0.0
    part = scenes.attributes[:200]
    with torch.no_grad():
        latents = vae.encode(scaled(scenes.images[:200])).latent_dist.mean
        seen = judges.classifier.attributes(vae.decode(latents).sample)
    assert latents.shape == (200, 4, 8, 8)
    assert 0.8 < float(latents.std()) * vae.config.scaling_factor < 1.2
    assert float(align(seen, part, part != ABSENT).float().mean()) >= 0.96


def test_the_sd3_folder_records_its_sequence_length() -> None:
    index = json.loads((ASSETS / "shapes-sd3" / "model_index.json").read_text())
    assert index["_max_sequence_length"] == manifest("shapes-sd3")["call"]["max_sequence_length"] == 16


# The judges


def test_the_classifier_tells_all_attributes_of_new_scenes(judges: ShapesJudges, scenes: Scenes) -> None:
    seen = judges.classifier.attributes(scaled(scenes.images))
    assert float(align(seen, scenes.attributes, scenes.attributes != ABSENT).float().mean()) >= 0.99
    assert judges.classifier.features(scaled(scenes.images[:3])).shape == (3, 128)


@pytest.mark.parametrize("wrong", ["shape", "colour"])
def test_the_clip_score_falls_for_a_wrong(wrong: str, judges: ShapesJudges, scenes: Scenes) -> None:
    attributes = scenes.attributes[:200]
    changed = attributes.clone()
    changed[:, COLUMN[wrong]] = (changed[:, COLUMN[wrong]] + 1) % len(HEADS[wrong])
    images = scaled(scenes.images[:200])
    right, other = (
        judges.clip_scores(images, captions(rows, 0, dropout=0.0).texts).mean() for rows in (attributes, changed)
    )
    assert float(right) > 70
    assert float(right - other) > 12


def test_the_text_encoders_are_the_text_tower_of_the_clip_judge(
    teacher: tuple[DiffusionPipeline, dict], judges: ShapesJudges
) -> None:
    pipe, _ = teacher
    texts = ["a red circle left of a blue square on a white background", "blurry", ""]
    ids = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, judges.tokenize(texts))
    out = pipe.text_encoder(ids)
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output @ judges.clip.text_projection
    torch.testing.assert_close(pooled, judges.clip.encode_text(ids), atol=1e-4, rtol=1e-4)


def test_a_file_that_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="rebuild"):
        load_shapes_classifier(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((ASSETS / "shapes-judges/classifier.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors"):
        load_shapes_classifier(tmp_path / "cut.safetensors")
    state = load_file(ASSETS / "shapes-judges" / "classifier.safetensors")
    save_file({name: value for name, value in state.items() if name != "hidden.bias"}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a shapes classifier"):
        load_shapes_classifier(tmp_path / "other.safetensors")
