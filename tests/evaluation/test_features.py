"""The uint8 contract, the extractors, and the digits evaluator on images whose scores are known."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from stepdistill.data import load_digits
from stepdistill.evaluation.digits import DIGIT_CLASSIFIER, DigitsEvaluator
from stepdistill.evaluation.features import DigitFeatures, Extractor, Pixels, to_uint8
from stepdistill.evaluation.metrics import MeanCov, frechet_distance, precision_recall


@pytest.fixture(scope="module")
def evaluator() -> DigitsEvaluator:
    return DigitsEvaluator(n=500)


@pytest.fixture(scope="module")
def good(evaluator, drawn) -> dict[str, float]:
    return evaluator.scores(drawn, evaluator.labels)


@pytest.fixture(scope="module")
def drawn(evaluator) -> Tensor:
    """Real training digits drawn with replacement, class by class, as a perfect generator would give them."""
    real = load_digits("train")
    rng = torch.Generator().manual_seed(0)
    rows = [(real.labels == label).nonzero()[:, 0] for label in range(10)]
    pick = [rows[int(label)][torch.randint(len(rows[int(label)]), (1,), generator=rng)] for label in evaluator.labels]
    return to_uint8(real.images[torch.cat(pick)])


# to_uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_every_level_survives_the_round_trip(channels):
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, channels, 1, 1)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels.expand(256, 3, 1, 1))


def test_rounds_to_the_nearest_level_and_clips():
    """Truncation would give 127 for 127.9: half a level darker on average."""
    x = torch.tensor([127.9, 128.4, 0.4, 0.6, 254.6, 300.0, -40.0]).view(-1, 1, 1, 1) / 127.5 - 1
    assert to_uint8(x)[:, 0, 0, 0].tolist() == [128, 128, 0, 1, 255, 255, 0]


def test_half_precision_is_widened_first():
    """Above 128, bfloat16 numbers are whole levels apart, and the sum x + 1 has been rounded before."""
    x = torch.linspace(-1, 1, 101, dtype=torch.bfloat16)
    assert to_uint8(x.view(101, 1, 1, 1))[:, 0, 0, 0].tolist() == [round((v + 1) * 127.5) for v in x.tolist()]


def test_grey_is_repeated_and_colour_kept():
    x = torch.rand(2, 3, 4, 5) * 2 - 1
    assert to_uint8(x).shape == (2, 3, 4, 5) and to_uint8(x).dtype == torch.uint8
    assert torch.equal(to_uint8(x)[:, 1:2].expand(-1, 3, -1, -1), to_uint8(x[:, 1:2]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, 8, 8), "1 or 3"),
        (torch.zeros(3, 8, 8), "1 or 3"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "float"),
        (torch.tensor([0.0, math.nan]).view(2, 1, 1, 1), "NaN or infinity in 1 of 2 images"),
    ],
)
def test_bad_floats_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(x)


# Extractors


def test_pixels_are_the_grey_values():
    images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2).expand(2, 3, 2, 2) * 30
    features = Pixels(2, 2)(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, torch.arange(8).view(2, 4) * 30 / 127.5 - 1)


def test_digit_features_are_the_classifiers_own_in_any_batch_size():
    digits = load_digits("heldout")
    images = to_uint8(digits.images)
    extractor = DigitFeatures(DIGIT_CLASSIFIER, batch_size=7)
    features = extractor(images)
    assert features.shape == (360, extractor.dim) and features.dtype == torch.float32
    grey = images[:, :1].float() / 127.5 - 1
    torch.testing.assert_close(features, extractor.model.features(grey))
    assert torch.equal(extractor.predict(images), extractor.model(grey).argmax(1))
    assert (extractor.predict(images) == digits.labels).double().mean() > 0.97
    assert extractor.sha256 == hashlib.sha256(DIGIT_CLASSIFIER.read_bytes()).hexdigest()


def test_extractors_follow_the_protocol(drawn):
    extractors: list[Extractor] = [Pixels(8, 8), DigitFeatures(DIGIT_CLASSIFIER)]
    assert len({e.name for e in extractors}) == len({e.sha256 for e in extractors}) == 2
    assert all(e(drawn[:3]).shape == (3, e.dim) and len(e.sha256) == 64 for e in extractors)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8), "uint8"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"\(B, 3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 9, dtype=torch.uint8), r"\(B, 3, 8, 8\)"),
        (torch.arange(3, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8), "grey"),
    ],
)
def test_images_off_the_contract_are_refused(images, message):
    for extractor in (Pixels(8, 8), DigitFeatures(DIGIT_CLASSIFIER)):
        with pytest.raises(ValueError, match=message):
            extractor(images)


def test_a_missing_classifier_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        DigitFeatures(tmp_path / "none.safetensors")


# The evaluator


def test_a_perfect_generator_scores_near_perfection(good):
    assert list(good) == ["fd", "pix", "precision", "recall", "density", "coverage", "accuracy"]
    assert 0 < good["fd"] < 1 and 0 < good["pix"] < 3
    assert good["precision"] == 100 and good["accuracy"] > 99
    assert good["recall"] > 70 and good["coverage"] > 70 and good["density"] == pytest.approx(100, abs=10)


def test_scores_are_the_metrics_over_the_reference(evaluator, drawn, good):
    """FD% is 100 FD / trace of the real covariance."""
    real = evaluator.classifier(to_uint8(load_digits("train").images))
    features = evaluator.classifier(drawn)
    expected = frechet_distance(MeanCov.of(real), MeanCov.of(features)) / float(torch.cov(real.double().T).trace())
    assert good["fd"] == pytest.approx(100 * expected)
    assert good["recall"] == pytest.approx(100 * precision_recall(real, features, 5).recall)


def test_neighbour_metrics_see_as_many_generated_as_real_images():
    """With 400 real images, what comes after the first 400 generated ones moves fd and nothing else."""
    evaluator = DigitsEvaluator(n=410)
    evaluator.real_features = evaluator.real_features[:400]
    images = to_uint8(load_digits("train").images[:410])
    noisy = images.clone()
    noisy[400:] = torch.randint(0, 256, (10, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before, after = (evaluator.scores(x, evaluator.labels) for x in (images, noisy))
    for metric in ("precision", "recall", "coverage", "density"):
        assert before[metric] == after[metric] == 100
    assert after["fd"] > before["fd"]


def test_one_repeated_point_at_the_mean_would_be_100_percent(evaluator):
    """FD of a point mass is the squared gap of means plus the whole real variance, so never below 100 %."""
    grey = torch.full((500, 3, 8, 8), 100, dtype=torch.uint8)
    scores = evaluator.scores(grey, evaluator.labels)
    gap = evaluator.real_pixels.mean - (100 / 127.5 - 1)
    assert scores["pix"] == pytest.approx(100 + 100 * float(gap @ gap / evaluator.real_pixels.cov.trace()), rel=1e-5)
    assert scores["fd"] > 100 and scores["accuracy"] == pytest.approx(10) and scores["coverage"] < 2


def test_noise_and_wrong_labels_are_seen(evaluator, drawn, good):
    noise = torch.randint(0, 256, (500, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    bad = evaluator.scores(noise.expand(-1, 3, -1, -1), evaluator.labels)
    assert bad["fd"] > 50 * good["fd"] and bad["pix"] > 50 * good["pix"] and bad["coverage"] < 20
    assert evaluator.scores(drawn.roll(1, 0), evaluator.labels)["accuracy"] < 5


def test_protocol_names_count_judge_and_reference(evaluator):
    protocol = evaluator.protocol()
    reference = to_uint8(load_digits("train").images)
    assert protocol == {
        "n": 500,
        "extractor_sha256": hashlib.sha256(DIGIT_CLASSIFIER.read_bytes()).hexdigest(),
        "reference_sha256": hashlib.sha256(reference.numpy().tobytes()).hexdigest(),
        "resize": "none",
        "items": None,
    }
    assert DigitsEvaluator(n=40).protocol()["reference_sha256"] == protocol["reference_sha256"]


def test_another_k_carries_its_name(drawn):
    scores = DigitsEvaluator(n=500, k=3).scores(drawn, torch.arange(500) % 10)
    assert "recall_k3" in scores and "recall" not in scores


def test_wrong_counts_and_labels_are_refused(evaluator, drawn):
    with pytest.raises(ValueError, match="n=500, got 499"):
        evaluator.scores(drawn[:499], evaluator.labels[:499])
    with pytest.raises(ValueError, match="arange"):
        evaluator.scores(drawn, torch.zeros(500, dtype=torch.long))
    with pytest.raises(ValueError, match="larger than k"):
        DigitsEvaluator(n=5)
