"""The shapes benchmark: pictures of captioned shapes, judged by what their captions name and against real scenes.

Frechet distances are percentages of the real features' total variance, as those of digits; they fall with the number
of images, so records keep ``n``. Captions are those of held-out scenes, whose images give every metric's ceiling.
"""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.evaluation.metrics import MeanCov, density_coverage, percent_of_variance, precision_recall
from stepdistill.evaluation.shapes import load_judges
from stepdistill.models.denoiser import Cond
from stepdistill.models.families import Opened
from stepdistill.paths import project_dir
from stepdistill.shapes import HEADS, SIZE, align, captions, draw

ASKED_SEED, REFERENCE_SEED = 1_000_003, 1_000_033
"""Of scenes that neither the teachers nor the judges have seen."""
REFERENCE = 4000
"""Real scenes of the Frechet distances."""
NEARBY = 2000
"""Images of either kind in the metrics of neighbours, whose cost is the product."""
DROPOUT = 0.15
"""Chance of each attribute to be left out of its caption; half the captions name all there is."""
BATCH = 500


class ShapesEvaluator:
    """Scores one generated image for each of ``n`` captions.

    Args:
        n: images of one evaluation.
        k: which neighbour bounds the balls of precision, recall, density and coverage.
        folder: the judges' folder; None for the bundled ``assets/shapes-judges``.

    Raises:
        FileNotFoundError: if a judge is missing.
        ValueError: if n is too small for k.
    """

    def __init__(self, n: int = 2000, k: int = 5, folder: str | PathLike[str] | None = None):
        if k < 1 or n <= k:
            raise ValueError(f"n must be larger than k >= 1, got n={n}, k={k}")
        self.n, self.k = n, k
        folder = project_dir("assets") / "shapes-judges" if folder is None else Path(folder)
        self.judges = load_judges(folder)
        scenes, real = draw(n, ASKED_SEED), draw(REFERENCE, REFERENCE_SEED)
        told = captions(scenes.attributes, ASKED_SEED, DROPOUT)
        self.texts, self.named, self.attributes = told.texts, told.named, scenes.attributes
        self.held_out = scenes.images
        """The captions' own scenes, uint8 (n, 3, 32, 32): their scores are the ceiling."""
        self.real = self._seen(real.images)
        self.moments = {space: MeanCov.of(features) for space, features in self.real.items()}
        words = "\n".join(self.texts).encode()
        self.reference_sha256 = hashlib.sha256(real.images.numpy().tobytes() + words).hexdigest()
        classifier, clip = [folder / "classifier.safetensors"], sorted((folder / "clip").iterdir())
        self.extractor_sha256 = {"classifier": _hash(classifier), "clip": _hash(clip)}

    def cond(self, opened: Opened) -> Cond:
        """The captions, encoded, each (n, ...)."""
        parts = [opened.encode(self.texts[start : start + BATCH]) for start in range(0, self.n, BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def scores(self, images: Tensor) -> dict[str, float]:
        """Every metric of one set of generated images.

        Args:
            images: uint8 (n, 3, 32, 32), in the order of ``texts``.

        Returns:
            ``alignment``, the share of images in which everything that the caption names is right, and
            ``accuracy_NAME`` the same of each attribute, in percent, by the classifier; ``fd`` and ``fd_clip``, Frechet
            distance over the real total variance, in percent, on classifier and on normalised open_clip features;
            ``precision``, ``recall``, ``density`` and ``coverage`` on classifier features, in percent, of the first
            2000 images of either kind; ``clip_score``, 100 times the mean cosine of image and caption.

        Raises:
            ValueError: if the count or the image contract is broken.
        """
        if images.dtype != torch.uint8 or images.shape != (self.n, 3, SIZE, SIZE):
            raise ValueError(
                f"images must be uint8 {(self.n, 3, SIZE, SIZE)}, one for each caption; got {tuple(images.shape)} of "
                f"{images.dtype}"
            )
        seen = self._seen(images)
        logits = self.judges.classifier.read(seen["classifier"])
        predicted = torch.stack([values.argmax(1) for values in logits.values()], 1)
        right = (predicted == self.attributes) & self.named
        each = right.sum(0) / self.named.sum(0).clamp_min(1)
        spoken = torch.cat([self._spoken(self.texts[i : i + BATCH]) for i in range(0, self.n, BATCH)])
        near, real = seen["classifier"][:NEARBY], self.real["classifier"][:NEARBY]
        precision, recall = precision_recall(real, near, self.k)
        density, coverage = density_coverage(real, near, self.k)
        scores = {
            "fd": percent_of_variance(self.moments["classifier"], MeanCov.of(seen["classifier"])),
            "fd_clip": percent_of_variance(self.moments["clip"], MeanCov.of(seen["clip"])),
            "precision": 100 * precision,
            "recall": 100 * recall,
            "density": 100 * density,
            "coverage": 100 * coverage,
            "alignment": 100 * float(align(predicted, self.attributes, self.named).double().mean()),
            "clip_score": 100 * float((seen["clip"] * spoken).sum(1).double().mean()),
        }
        return scores | {f"accuracy_{name}": 100 * float(share) for name, share in zip(HEADS, each, strict=True)}

    def asked(self) -> list[str]:
        """The captions."""
        return self.texts

    def right(self, images: Tensor) -> Tensor:
        """Whether everything that the caption names is right, bool (n,), of images uint8 (n, 3, 32, 32)."""
        seen = torch.cat([self.judges.classifier.attributes(part.float() / 127.5 - 1) for part in images.split(BATCH)])
        return align(seen, self.attributes, self.named)

    def ceiling(self) -> dict[str, float]:
        """What ``held_out`` scores: the captions' own scenes."""
        return self.scores(self.held_out)

    def protocol(self, metric: str) -> dict[str, int | str | None]:
        """What two numbers of a metric must share to be compared; the keywords that ``records_from_scores`` asks for.

        The reference stands for the captions as well as for the real scenes.
        """
        judge = "clip" if metric in ("fd_clip", "clip_score") else "classifier"
        counts = {"alignment": self.n, "precision": min(self.n, NEARBY), "recall": NEARBY, "coverage": NEARBY}
        counts |= {f"accuracy_{name}": int(count) for name, count in zip(HEADS, self.named.sum(0), strict=True)}
        return {
            "items": counts.get(metric) or None,  # no caption may name an attribute
            "n": self.n,
            "extractor_sha256": self.extractor_sha256[judge],
            "reference_sha256": self.reference_sha256,
            "resize": "none",
        }

    @torch.no_grad()
    def _seen(self, images: Tensor) -> dict[str, Tensor]:
        """Features (N, D) of images uint8 (N, 3, 32, 32), by judge."""
        parts = [part.float() / 127.5 - 1 for part in images.split(BATCH)]
        return {
            "classifier": torch.cat([self.judges.classifier.features(part) for part in parts]),
            "clip": torch.cat([F.normalize(self.judges.clip.encode_image(part), dim=1) for part in parts]),
        }

    @torch.no_grad()
    def _spoken(self, texts: list[str]) -> Tensor:
        """Normalised open_clip features (N, D) of captions."""
        return F.normalize(self.judges.clip.encode_text(self.judges.tokenize(texts)), dim=1)


def _hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
