"""The shapes benchmark: real scenes pass, each kind of fault is seen where it should be, protocols name the judges."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from stepdistill.evaluation import alignment
from stepdistill.evaluation.alignment import ShapesEvaluator
from stepdistill.evaluation.records import records_from_scores
from stepdistill.evaluation.tables import brief_table
from stepdistill.models.families import open_pipeline
from stepdistill.paths import project_dir
from stepdistill.shapes import HEADS, captions, draw
from tests.tiny import sd


@pytest.fixture(scope="module")
def evaluator() -> ShapesEvaluator:
    """Few captions, and few real scenes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(alignment, "REFERENCE", 600)
        return ShapesEvaluator(300)


@pytest.fixture(scope="module")
def real(evaluator: ShapesEvaluator) -> dict[str, float]:
    """What the captions' own scenes score."""
    return evaluator.ceiling()


def test_real_scenes_are_right_and_near(real: dict[str, float]) -> None:
    assert real["alignment"] > 97 and real["clip_score"] > 70
    assert all(real[f"accuracy_{name}"] > 97 for name in HEADS)
    assert real["precision"] > 95 and real["recall"] > 95 and real["coverage"] > 80
    assert 0 < real["fd"] < 8 and 0 < real["fd_clip"] < 5


def test_images_of_other_captions_are_as_real_but_wrong(evaluator: ShapesEvaluator, real: dict[str, float]) -> None:
    shifted = evaluator.scores(evaluator.held_out.roll(1, 0))
    assert shifted["alignment"] < 5 and shifted["clip_score"] < 20
    for metric in ("fd", "fd_clip", "precision", "recall", "coverage"):
        assert shifted[metric] == pytest.approx(real[metric], rel=1e-4)


def test_one_wrong_attribute_is_found_in_its_own_place(evaluator: ShapesEvaluator, real: dict[str, float]) -> None:
    """Red and blue changed places: colours are wrong, shapes are not."""
    swapped = evaluator.scores(evaluator.held_out.flip(1))
    assert swapped["accuracy_background"] < 80 and swapped["accuracy_colour"] < 80
    for name in ("layout", "shape", "size"):
        assert swapped[f"accuracy_{name}"] > real[f"accuracy_{name}"] - 6


def test_attributes_that_a_caption_leaves_out_do_not_count(evaluator: ShapesEvaluator) -> None:
    """Scenes that differ from the captions' only in what these do not name are as right."""
    scenes = draw(600, alignment.REFERENCE_SEED)
    told = captions(evaluator.attributes, alignment.ASKED_SEED, alignment.DROPOUT)
    assert told.texts == evaluator.texts
    for i in range(20):
        fits = ((scenes.attributes == evaluator.attributes[i]) | ~evaluator.named[i]).all(1)
        images = evaluator.held_out.clone()
        if not fits.any():
            continue
        images[i] = scenes.images[fits][0]
        assert evaluator.scores(images)["alignment"] > 97
        return
    pytest.fail("no scene fits any caption")


@pytest.mark.parametrize("kind", ["noise", "grey"])
def test_pictures_of_nothing_fail_everywhere(kind: str, evaluator: ShapesEvaluator, real: dict[str, float]) -> None:
    shape = (300, 3, 32, 32)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = noise if kind == "noise" else torch.full(shape, 128, dtype=torch.uint8)
    scores = evaluator.scores(images)
    assert scores["alignment"] < 10 and scores["coverage"] < 20
    assert scores["fd"] > 50 and scores["fd_clip"] > 50
    if kind == "grey":  # one point: the whole variance of the real ones, and the gap between the means
        assert scores["fd"] > 100 and scores["fd_clip"] > 100


def test_protocols_name_count_judge_and_reference(evaluator: ShapesEvaluator, real: dict[str, float]) -> None:
    folder = project_dir("assets") / "shapes-judges"
    classifier = hashlib.sha256((folder / "classifier.safetensors").read_bytes()).hexdigest()
    by_judge = {name: evaluator.protocol(name)["extractor_sha256"] for name in real}
    assert {name for name, judge in by_judge.items() if judge != classifier} == {"fd_clip", "clip_score"}
    assert evaluator.protocol("fd")["n"] == 300 and evaluator.protocol("fd")["resize"] == "none"
    references = {evaluator.protocol(name)["reference_sha256"] for name in real}
    assert len(references) == 1 and len(references.pop()) == 64


def test_its_scores_make_a_table(evaluator: ShapesEvaluator, real: dict[str, float]) -> None:
    common = {
        "subject": "x",
        "role": "student",
        "method": "m",
        "sampler": "ddim",
        "steps": 1,
        "nfe": 1,
        "device": "cpu",
    }
    records = []
    for metric, value in real.items():
        protocol = evaluator.protocol(metric)
        records += records_from_scores(**common, scores_per_seed=[{metric: value}], seeds=[0], **protocol)
    head = brief_table(records).splitlines()[0]
    assert "FD % ↓ | CLIP FD % ↓ |" in head and "| alignment % ↑ | CLIP score ↑ |" in head and "accuracy" not in head


def test_captions_are_encoded_in_order(evaluator: ShapesEvaluator) -> None:
    opened = open_pipeline(sd.pipeline())
    cond = evaluator.cond(opened)
    assert len(cond["prompt"]) == 300
    expected: Tensor = opened.encode([evaluator.texts[0], evaluator.texts[299]])["prompt"]
    torch.testing.assert_close(cond["prompt"][[0, 299]], expected, rtol=0, atol=1e-5)


def test_other_counts_and_images_are_refused(evaluator: ShapesEvaluator) -> None:
    with pytest.raises(ValueError, match="one for each caption; got"):
        evaluator.scores(evaluator.held_out[:299])
    with pytest.raises(ValueError, match=r"of torch\.float32"):
        evaluator.scores(evaluator.held_out.float())
    with pytest.raises(ValueError, match="larger than k"):
        ShapesEvaluator(5)
