"""The digits benchmark: generated 8x8 digits against the 1437 real ones that the teacher was trained on.

Frechet distances are given as a percentage of the real features' total variance: 100 is one point repeated, at the mean
of the real features. They fall with the number of samples, which is why records keep ``n`` and refuse to share a table
when it differs.
"""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.data import load_digits
from stepdistill.evaluation.columns import metric_info
from stepdistill.evaluation.features import DigitFeatures, Pixels, to_uint8
from stepdistill.evaluation.metrics import MeanCov, density_coverage, percent_of_variance, precision_recall
from stepdistill.models.denoiser import Cond
from stepdistill.models.families import Opened

DIGIT_CLASSIFIER = Path(__file__).parents[2] / "assets" / "digits" / "classifier.safetensors"
"""The bundled judge of a source checkout."""

CLASSES = 10
STANDARD_K = 5


class DigitsEvaluator:
    """Scores ``n`` generated digits, equally many of each class, against the training split.

    Args:
        n: generated images per evaluation; 5000 for published numbers.
        k: which neighbour bounds the balls of precision, recall, density and coverage.
        classifier: the judge's safetensors file.

    Raises:
        FileNotFoundError: if the classifier is missing.
        ValueError: if n is too small for k.
    """

    def __init__(self, n: int = 5000, k: int = STANDARD_K, classifier: str | PathLike[str] = DIGIT_CLASSIFIER):
        if k < 1 or n <= k:
            raise ValueError(f"n must be larger than k >= 1, got n={n}, k={k}; published numbers have n=5000, k=5")
        self.n, self.k = n, k
        self.classifier = DigitFeatures(classifier)
        self.pixels = Pixels(8, 8)
        real = load_digits("train")
        images = to_uint8(real.images)
        self.real_features = self.classifier(images)  # (1437, 64)
        self.real = MeanCov.of(self.real_features)
        self.real_pixels = MeanCov.of(self.pixels(images))
        self.extractor_sha256 = self.classifier.sha256
        self.reference_sha256 = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        self.labels = torch.arange(n) % CLASSES
        """The classes to generate, (n,) int64."""

    def cond(self, opened: Opened) -> Cond:
        """Conditions of ``labels``; none for an unconditional teacher."""
        known = opened.family.examples(opened.pipeline, 1)
        return opened.family.cond(opened.denoiser.net, {"labels": self.labels} if known else {})

    def scores(self, images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """Every metric of one set of generated digits, all in percent.

        Args:
            images: uint8 (n, 3, 8, 8), grey.
            labels: the class each image was asked to be, int64 (n,), if that is to be checked against ``self.labels``.

        Returns:
            ``fd`` (classifier features) and ``pix`` (raw pixels), Frechet distance over the real total variance;
            ``precision``, ``recall``, ``density``, ``coverage`` on classifier features, the first 1437 generated
            against all real digits; ``accuracy``, how often the classifier sees the class that was asked for.
            Neighbour metrics with k other than 5 carry it in their name, as in ``precision_k3``.

        Raises:
            ValueError: if the count, the labels, or the image contract is broken.
        """
        if len(images) != self.n:
            raise ValueError(f"images must number n={self.n}, got {len(images)}; scores of other counts do not compare")
        if labels is not None and not torch.equal(labels.cpu(), self.labels):
            raise ValueError(f"labels must be arange({self.n}) % {CLASSES}; uneven classes swamp the Frechet distance")
        features = self.classifier(images)
        nearby = features[: len(self.real_features)]
        precision, recall = precision_recall(self.real_features, nearby, self.k)
        density, coverage = density_coverage(self.real_features, nearby, self.k)
        suffix = "" if self.k == STANDARD_K else f"_k{self.k}"
        return {
            "fd": percent_of_variance(self.real, MeanCov.of(features)),
            "pix": percent_of_variance(self.real_pixels, MeanCov.of(self.pixels(images))),
            f"precision{suffix}": 100 * precision,
            f"recall{suffix}": 100 * recall,
            f"density{suffix}": 100 * density,
            f"coverage{suffix}": 100 * coverage,
            "accuracy": 100 * float(self.right(images).double().mean()),
        }

    def asked(self) -> list[str]:
        """The class of each image, in words."""
        return [f"digit {label}" for label in self.labels.tolist()]

    def right(self, images: Tensor) -> Tensor:
        """Whether the classifier sees the class that was asked for, bool (n,), of images uint8 (n, 3, 8, 8)."""
        return self.classifier.predict(images) == self.labels

    def ceiling(self) -> dict[str, float]:
        """Nothing: there are too few real digits to be judged as ``n`` generated ones are."""
        return {}

    def protocol(self, metric: str = "fd") -> dict[str, int | str | None]:
        """What two numbers must share to be compared; the keywords that ``records_from_scores`` asks for.

        One judge and one reference serve all metrics.
        """
        of = metric_info(metric).share_of
        near = min(self.n, len(self.real_features))
        counts = {"images": self.n if metric == "accuracy" else near, "references": len(self.real_features)}
        return {
            "items": counts.get(of),
            "n": self.n,
            "extractor_sha256": self.extractor_sha256,
            "reference_sha256": self.reference_sha256,
            "resize": "none",
        }
