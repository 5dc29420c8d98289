"""An evaluator for any pipeline: your extractor, your reference, your prompts or classes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.evaluation.clip import Clip, agreement
from stepdistill.evaluation.columns import metric_info
from stepdistill.evaluation.comparison import contrast, saturation
from stepdistill.evaluation.diversity import vendi
from stepdistill.evaluation.features import Extractor, check_images
from stepdistill.evaluation.infinity import frechet_infinity
from stepdistill.evaluation.metrics import MeanCov, density_coverage, frechet_distance, precision_recall
from stepdistill.evaluation.mmd import cmmd, kid
from stepdistill.evaluation.reference import Reference
from stepdistill.models.denoiser import Cond
from stepdistill.models.families import Opened

BATCH = 256
FRECHET = ("frechet", "frechet_infinity")
NEIGHBOURS = {precision_recall: ("precision", "recall"), density_coverage: ("density", "coverage")}
BANKS = ("kid", "cmmd", "precision", "recall", "density", "coverage", "vendi")
COLOUR = ("saturation_drift", "contrast_drift")
TEXT = ("clip_score",)
METRICS = FRECHET + BANKS + COLOUR + TEXT
UNASKED = ("frechet_infinity", "cmmd", "vendi")
"""Left out unless asked for: they cost a multiple of the others, or want features of a kind."""


class FeatureEvaluator:
    """Scores n generated images against a reference; an ``Evaluator`` of ``benchmark`` for a teacher of your own.

    Args:
        extractor: from images to features, such as ``extractors.dinov2()``.
        reference: statistics of real images under the same extractor.
        prompts: what to ask for, one for each image; None of a teacher that takes none.
        labels: the classes to ask for, int64 (n,), instead of prompts; None of an unconditional teacher.
        n: images of one evaluation; needed where there are neither prompts nor labels.
        clip: for the CLIP score, with prompts.
        metrics: names of ``METRICS``; None: all that the reference allows, but ``UNASKED``.
        k: which neighbour bounds the balls of precision, recall, density and coverage.
        held_out: uint8 (n, 3, H, W), real images that are not in the reference: their scores are the ceiling.
        device: where distances are computed.

    Raises:
        ValueError: in one line, if counts do not match, a metric is unknown, or the reference does not allow it.
    """

    def __init__(
        self,
        extractor: Extractor,
        reference: Reference,
        *,
        prompts: Sequence[str] | None = None,
        labels: Tensor | None = None,
        n: int | None = None,
        clip: Clip | None = None,
        metrics: Sequence[str] | None = None,
        k: int = 5,
        held_out: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        self.prompts, self.labels = None if prompts is None else list(prompts), labels
        self.n = _count(n, self.prompts, labels)
        self.extractor, self.reference, self.clip = extractor, reference, clip
        self.k, self.held_out, self.device = k, held_out, device
        dim = len(reference.moments.mean)
        if dim != extractor.dim:
            raise ValueError(
                f"the reference has {dim} features, {extractor.name} gives {extractor.dim}; they must agree"
            )
        self.metrics = self._allowed(metrics)
        self.frechet = "fid" if extractor.name.startswith("inception") else "frechet"
        """What the Frechet distance is called: FID is Inception's alone."""
        fewest = min(self.n, self.n if reference.features is None else len(reference.features))
        if not 1 <= k < fewest:
            raise ValueError(f"k must be at least 1 and below {fewest}, the images of either kind; got {k}")
        if held_out is not None and len(held_out) != self.n:
            raise ValueError(f"held_out must number n={self.n}, got {len(held_out)}")
        if self.n <= dim and "frechet" in self.metrics:
            warnings.warn(
                f"{self.n} images for {dim} features: the Frechet distance is mostly bias; take more than {dim}, "
                "or metrics 'kid' (unbiased) and 'frechet_infinity' (extrapolated)",
                stacklevel=2,
            )
        self.grade = self._grade()
        """What ``scores_and_grades`` grades single images by: the CLIP score, or else ``nearest``, the distance of
        features to the nearest of the reference's; empty where nothing is asked for, or neither can be had.
        """
        asked = "\n".join(self.prompts or []) + ("" if labels is None else repr(labels.tolist()))
        self.reference_sha256 = hashlib.sha256(f"{reference.sha256}{asked}".encode()).hexdigest()

    def cond(self, opened: Opened) -> Cond:
        """Conditions of the prompts or labels, each (n, ...)."""
        if self.prompts is None:
            labels = {} if self.labels is None else {"labels": self.labels}
            if opened.family.cond is None:
                raise ValueError(f"{type(opened.pipeline).__name__} takes prompts; give the evaluator one an image")
            return opened.family.cond(opened.denoiser.net, labels)
        parts = [opened.encode(self.prompts[start : start + BATCH]) for start in range(0, self.n, BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def scores(self, images: Tensor) -> dict[str, float]:
        """Every metric of one set of generated images.

        Args:
            images: uint8 (n, 3, H, W), in the order of the prompts or labels.

        Returns:
            ``fid`` or ``frechet`` and its ``_infinity``, in squared units of the features; ``kid``, ``cmmd``;
            ``precision``, ``recall``, ``density``, ``coverage`` in percent, of as many generated as reference features
            are kept, with ``_kK`` for k other than 5; ``vendi``, 1 to n; ``saturation_drift`` and ``contrast_drift``,
            mean over images minus the reference's, in points of the range; ``clip_score``, 100 times the mean cosine.

        Raises:
            ValueError: if the count or the image contract is broken.
        """
        return self.scores_and_grades(images)[0]

    def asked(self) -> list[str]:
        """The prompts, or the classes in words; none of an unconditional teacher."""
        return self.prompts or [f"class {label}" for label in ([] if self.labels is None else self.labels.tolist())]

    def scores_and_grades(self, images: Tensor) -> tuple[dict[str, float], Tensor]:
        """``scores`` and each image's ``grade``, float32 (n,) on the CPU; empty without one.

        Raises:
            ValueError: as ``scores``.
        """
        check_images(images)
        if len(images) != self.n:
            raise ValueError(f"images must number n={self.n}, got {len(images)}; scores of other counts do not compare")
        moments, bank, grades = MeanCov(self.extractor.dim, self.device), [], torch.empty(0)
        near = []
        keeps = bool({*BANKS, "frechet_infinity"} & set(self.metrics))
        for batch in images.split(BATCH):
            features = self.extractor(batch).to(self.device)
            moments.update(features)
            if keeps:
                bank.append(features)
            if self.grade == "nearest":
                near.append(torch.cdist(features, self.reference.features.to(self.device)).amin(1).cpu())
        scores = {}
        if "frechet" in self.metrics:
            scores[self.frechet] = frechet_distance(self.reference.moments, moments)
        if keeps:
            scores |= self._of_bank(torch.cat(bank))
        for name, of in (("saturation", saturation), ("contrast", contrast)):
            if f"{name}_drift" in self.metrics:
                mean = sum(float(of(batch).sum()) for batch in images.split(BATCH)) / self.n
                scores[f"{name}_drift"] = mean - self.reference.colour[name]
        if "clip_score" in self.metrics:
            seen = torch.cat([self.clip.images(batch) for batch in images.split(BATCH)])
            grades = agreement(seen, self.clip.texts(self.prompts)).cpu()
            scores["clip_score"] = float(grades.double().mean())
        return scores, torch.cat(near) if near else grades

    def ceiling(self) -> dict[str, float]:
        """What ``held_out`` scores; nothing without."""
        return {} if self.held_out is None else self.scores(self.held_out)

    def protocol(self, metric: str) -> dict[str, int | str | None]:
        """What two numbers of a metric must share to be compared; the keywords that ``records_from_scores`` asks for.

        The reference stands for prompts and labels as well.
        """
        judge = self.clip.images if metric == "clip_score" else None if metric in COLOUR else self.extractor
        kept = 0 if self.reference.features is None else len(self.reference.features)
        counts = {"images": min(self.n, kept), "references": kept}
        return {
            "items": counts.get(metric_info(metric).share_of) or None,
            "n": self.n,
            "extractor_sha256": None if judge is None else judge.sha256,
            "reference_sha256": self.reference_sha256,
            "resize": "none" if judge is None else judge.resize,
        }

    def _of_bank(self, bank: Tensor) -> dict[str, float]:
        scores, wants = {}, set(self.metrics)
        if "frechet_infinity" in wants:
            scores[f"{self.frechet}_infinity"] = frechet_infinity(self.reference.moments, bank).value
        if "vendi" in wants:
            scores["vendi"] = vendi(bank)
        if self.reference.features is None:
            return scores
        real = self.reference.features.to(self.device)
        scores |= {name: of(real, bank) for name, of in (("kid", kid), ("cmmd", cmmd)) if name in wants}
        near, suffix = bank[: len(real)], "" if self.k == 5 else f"_k{self.k}"
        for of in (precision_recall, density_coverage):
            if wants & set(NEIGHBOURS[of]):
                found = of(real, near, self.k)._asdict()
                scores |= {f"{name}{suffix}": 100 * value for name, value in found.items() if name in wants}
        return scores

    def _grade(self) -> str:
        if "clip_score" in self.metrics:
            return "clip_score"
        asks = self.prompts is not None or self.labels is not None
        return "nearest" if asks and self.reference.features is not None else ""

    def _allowed(self, metrics: Sequence[str] | None) -> tuple[str, ...]:
        """The metrics to compute, in the order of ``METRICS``."""
        without: dict[str, str] = {}
        if self.reference.features is None:
            without |= dict.fromkeys(("kid", "cmmd", *(n for names in NEIGHBOURS.values() for n in names)), "features")
        if not self.reference.colour:
            without |= dict.fromkeys(COLOUR, "colours")
        if self.clip is None or self.prompts is None:
            without["clip_score"] = "clip and prompts"
        if metrics is None:
            return tuple(name for name in METRICS if name not in without and name not in UNASKED)
        for name in metrics:
            if name not in METRICS:
                raise ValueError(f"no metric {name!r}; there are {', '.join(METRICS)}")
            if name in without:
                whose = "the evaluator was given no" if name == "clip_score" else "a statistics file holds no"
                raise ValueError(f"metric {name!r} cannot be had: {whose} {without[name]}")
        return tuple(name for name in METRICS if name in metrics)


def _count(n: int | None, prompts: Sequence[str] | None, labels: Tensor | None) -> int:
    counts = {
        "n": n,
        "prompts": prompts if prompts is None else len(prompts),
        "labels": labels if labels is None else len(labels),
    }
    given = {name: count for name, count in counts.items() if count is not None}
    if "prompts" in given and "labels" in given:
        raise ValueError("give prompts or labels, not both")
    if len(set(given.values())) != 1 or min(given.values()) < 2:
        told = ", ".join(f"{name}: {count}" for name, count in given.items()) or "nothing"
        raise ValueError(f"say how many images to judge, two or more, by n, prompts or labels; got {told}")
    return next(iter(given.values()))
