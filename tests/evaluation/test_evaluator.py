"""Any extractor, any reference, any pipeline: the evaluator's numbers, its protocol, and what it refuses."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stepdistill.evaluation.benchmark import bench_teacher
from stepdistill.evaluation.clip import open_clip_model
from stepdistill.evaluation.columns import SECONDS
from stepdistill.evaluation.evaluator import METRICS, FeatureEvaluator
from stepdistill.evaluation.extractors import shapes_classifier
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.infinity import frechet_infinity
from stepdistill.evaluation.metrics import (
    MeanCov,
    density_coverage,
    frechet_distance,
    precision_recall,
)
from stepdistill.evaluation.mmd import cmmd, kid
from stepdistill.evaluation.reference import Reference, read_images
from stepdistill.evaluation.shapes import load_judges
from stepdistill.evaluation.statistics_files import save_statistics
from stepdistill.evaluation.tables import markdown_table
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import open_pipeline
from stepdistill.paths import project_dir
from stepdistill.shapes import captions, draw
from tests.tiny import dit, sd, unet2d


class Mean4:
    """Channel means of the four quarters: 12 features."""

    name, sha256, dim, resize = "mean4", "d" * 64, 12, "none"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, 2).flatten(1)


def scenes(n: int, seed: int) -> Tensor:
    return draw(n, seed).images


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of_images(scenes(300, 0), Mean4())


# References


def test_reference_of_batches_is_that_of_all_images(reference, tmp_path):
    images = scenes(300, 0)
    parts = Reference.of_images(iter(images.split(77)), Mean4(), keep=100)
    assert frechet_distance(parts.moments, reference.moments) == pytest.approx(0, abs=1e-10)
    assert parts.sha256 == reference.sha256 == hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert parts.features.equal(Mean4()(images[:100])) and reference.features.equal(Mean4()(images))
    assert parts.colour == pytest.approx(reference.colour) and set(parts.colour) == {"saturation", "contrast"}


def save(image: Tensor, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def test_reference_of_a_folder(tmp_path):
    images = scenes(5, 1)
    for i, image in enumerate(images):
        save(image, tmp_path / f"{i % 2}" / f"{i}.png")
    order = [0, 2, 4, 1, 3]
    assert torch.cat(list(read_images(tmp_path, batch_size=2))).equal(images[order])
    assert Reference.of_folder(tmp_path, Mean4()).sha256 == Reference.of_images(images[order], Mean4()).sha256


def test_bad_folders_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        list(read_images(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"none in .*expected .png"):
        list(read_images(tmp_path))
    save(scenes(1, 0)[0], tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        Reference.of_folder(tmp_path, Mean4())
    save(torch.zeros(3, 8, 16, dtype=torch.uint8), tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"one size: .*a.png is 32x32, .*b.png is 16x8; bring them to one size"):
        list(read_images(tmp_path))
    (tmp_path / "b.png").write_bytes(b"\x89PNG and then nothing")
    with pytest.raises(ValueError, match=r"image .*b.png cannot be read"):
        list(read_images(tmp_path))
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 images"):
        to_uint8(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)]))


# Scores


def test_scores_are_the_metrics_of_the_features(reference):
    images, real = scenes(400, 9), Mean4()(scenes(300, 0))
    got = FeatureEvaluator(Mean4(), reference, n=400, metrics=[m for m in METRICS if m != "clip_score"]).scores(images)
    fake = Mean4()(images)
    precision, recall = precision_recall(real, fake[:300], 5)
    density, coverage = density_coverage(real, fake[:300], 5)
    assert got["frechet"] == pytest.approx(frechet_distance(MeanCov.of(real), MeanCov.of(fake)))
    assert got["frechet_infinity"] == pytest.approx(frechet_infinity(MeanCov.of(real), fake).value)
    assert got["kid"] == pytest.approx(kid(real, fake)) and got["cmmd"] == pytest.approx(cmmd(real, fake))
    assert [got[m] for m in ("precision", "recall")] == pytest.approx([100 * precision, 100 * recall])
    assert [got[m] for m in ("density", "coverage")] == pytest.approx([100 * density, 100 * coverage])
    assert abs(got["saturation_drift"]) < 3 and abs(got["contrast_drift"]) < 3 and 1 < got["vendi"] < 12
    assert list(got) == [m for m in METRICS if m in got] or set(got) == set(METRICS) - {"clip_score"}


def test_drift_is_signed(reference):
    evaluator = FeatureEvaluator(Mean4(), reference, n=50, metrics=["saturation_drift", "contrast_drift"])
    images = scenes(50, 9)
    grey = images.float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, 3, -1, -1)
    assert evaluator.scores(grey)["saturation_drift"] == pytest.approx(-reference.colour["saturation"])
    flat = torch.full_like(images, 128)
    assert evaluator.scores(flat)["contrast_drift"] == pytest.approx(-reference.colour["contrast"])


def test_clip_score_and_ceiling_and_protocol(reference):
    drawn = draw(60, 5)
    texts = captions(drawn.attributes, 5, 0.0).texts
    clip = open_clip_model(project_dir("assets") / "shapes-judges" / "clip")
    evaluator = FeatureEvaluator(Mean4(), reference, prompts=texts, clip=clip, held_out=drawn.images, k=3)
    ceiling = evaluator.ceiling()
    assert ceiling["clip_score"] == pytest.approx(float(clip.scores(drawn.images, texts).mean()), rel=1e-5)
    assert {"precision_k3", "recall_k3", "kid", "frechet", "saturation_drift"} < set(ceiling)
    assert not {"frechet_infinity", "cmmd", "vendi", "precision"} & set(ceiling)
    judged = {metric: evaluator.protocol(metric) for metric in ceiling}
    assert judged["clip_score"]["extractor_sha256"] == clip.images.sha256
    assert judged["frechet"] == judged["frechet"] | {"extractor_sha256": "d" * 64, "n": 60, "items": None}
    assert judged["recall_k3"] == judged["frechet"] | {"items": 300}  # references
    assert judged["precision_k3"] == judged["frechet"] | {"items": 60}  # images
    assert judged["contrast_drift"]["extractor_sha256"] is None
    other = FeatureEvaluator(Mean4(), reference, prompts=[*texts[1:], texts[0]])
    assert other.protocol("kid")["reference_sha256"] != evaluator.protocol("kid")["reference_sha256"]


def test_statistics_file_gives_frechet_distances_alone(reference, tmp_path):
    save_statistics(tmp_path / "real.npz", reference.moments)
    stored = Reference.of_file(tmp_path / "real.npz")
    images = scenes(100, 3)
    got = FeatureEvaluator(Mean4(), stored, n=100).scores(images)
    assert set(got) == {"frechet"}
    assert got["frechet"] == pytest.approx(FeatureEvaluator(Mean4(), reference, n=100).scores(images)["frechet"])
    with pytest.raises(ValueError, match="'recall' cannot be had: a statistics file holds no features"):
        FeatureEvaluator(Mean4(), stored, n=100, metrics=["recall"])


def test_bundled_classifier_is_the_judge_of_the_bundled_benchmark():
    """Features as ``ShapesEvaluator`` takes them, from levels scaled to [-1, 1], under the same hash."""
    extractor, images = shapes_classifier(), scenes(20, 3)
    expected = load_judges().classifier.features(images.float() / 127.5 - 1)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    file = project_dir("assets") / "shapes-judges" / "classifier.safetensors"
    assert extractor.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert extractor.dim == expected.shape[1] and extractor.name == "shapes-classifier/none32"


def test_inceptions_distance_is_called_fid(reference):
    class Named(Mean4):
        name = "inception-2015/clean299"

    got = FeatureEvaluator(Named(), reference, n=50, metrics=["frechet", "frechet_infinity"]).scores(scenes(50, 3))
    assert set(got) == {"fid", "fid_infinity"}


def test_fewer_samples_than_features_warns_and_names_what_helps(reference):
    with pytest.warns(UserWarning, match=r"12 images for 12 features: .*'kid' .* 'frechet_infinity'"):
        FeatureEvaluator(Mean4(), reference, n=12)


def test_memory_does_not_grow_with_what_only_moments_need(reference):
    """Frechet distances alone keep no features."""
    evaluator = FeatureEvaluator(Mean4(), reference, n=600, metrics=["frechet"])
    evaluator._of_bank = lambda bank: pytest.fail("features were kept")
    assert evaluator.scores(scenes(600, 4))["frechet"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got nothing"),
        ({"n": 5, "prompts": ["a", "b"]}, "got n: 5, prompts: 2"),
        ({"n": 1}, "two or more"),
        ({"prompts": []}, "prompts: 0"),
        ({"prompts": ["a", "b"], "labels": torch.zeros(2, dtype=torch.long)}, "not both"),
        ({"n": 50, "metrics": ["fid"]}, "no metric 'fid'; there are frechet"),
        ({"n": 50, "metrics": ["clip_score"]}, "given no clip and prompts"),
        ({"n": 50, "k": 0}, "k must be at least 1"),
        ({"n": 50, "k": 50}, "below 50, the images of either kind; got 50"),
        ({"n": 50, "held_out": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}, "held_out must number n=50, got 3"),
    ],
)
def test_bad_settings_are_named(reference, given, message):
    with pytest.raises(ValueError, match=message):
        FeatureEvaluator(Mean4(), reference, **given)


def test_bad_images_are_named(reference):
    evaluator = FeatureEvaluator(Mean4(), reference, n=50)
    with pytest.raises(ValueError, match="n=50, got 49"):
        evaluator.scores(scenes(49, 0))
    with pytest.raises(ValueError, match="uint8"):
        evaluator.scores(scenes(50, 0).float())
    with pytest.raises(ValueError, match="the reference has 12 features, half gives 6"):
        half = Mean4()
        half.dim, half.name = 6, "half"
        FeatureEvaluator(half, reference, n=50)


# In the benchmark


@pytest.mark.filterwarnings("ignore:6 images for 12 features")
def test_a_teacher_of_your_own_is_benched():
    """A text-to-image pipeline and a class-conditional one, from records to a table."""
    opened = open_pipeline(sd.pipeline())
    reference = Reference.of_images(
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), np.uint8)), Mean4()
    )
    evaluator = FeatureEvaluator(Mean4(), reference, prompts=list("abcdef"), k=2)
    records = bench_teacher(Guided(opened.denoiser, 2.0, opened.null), opened, evaluator, (1, 2), (0, 1))
    assert {r.metric for r in records} >= {"frechet", "kid", "recall_k2", "saturation_drift", SECONDS}
    assert all(r.n == 6 and r.reference_sha256 == evaluator.reference_sha256 for r in records if r.metric != SECONDS)
    assert "±" in markdown_table(records, ["frechet", "kid", "saturation_drift"])

    opened = open_pipeline(unet2d.pipeline())
    with pytest.raises(ValueError, match="takes no prompts"):
        evaluator.cond(opened)
    assert FeatureEvaluator(Mean4(), reference, n=6, k=2).cond(opened) == {}
    labels = torch.tensor([1, 0, 2, 2])
    classes = FeatureEvaluator(Mean4(), reference, labels=labels, k=2, metrics=["kid"]).cond(
        open_pipeline(dit.pipeline())
    )
    assert any(value.equal(labels) for value in classes.values())
    with pytest.raises(ValueError, match="takes prompts; give the evaluator one an image"):
        FeatureEvaluator(Mean4(), reference, n=6, k=2).cond(open_pipeline(sd.pipeline()))
