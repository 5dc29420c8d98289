"""The columns of tables: what each metric is called, its unit, which way is better, what a percentage counts."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

SECONDS = "seconds_per_image"


class MetricInfo(NamedTuple):
    """How a metric is shown."""

    label: str
    unit: str
    better: Literal["lower", "higher", ""]  # "": no direction, never highlighted
    share_of: Literal["", "images", "references"] = ""
    """Of a percentage that counts: which things it counts. Density is none, as it may pass 100."""


METRICS: dict[str, MetricInfo] = {
    "fd": MetricInfo("FD", "%", "lower"),
    "pix": MetricInfo("pixel FD", "%", "lower"),
    "fd_clip": MetricInfo("CLIP FD", "%", "lower"),
    "fid": MetricInfo("FID", "", "lower"),
    "fid_infinity": MetricInfo("FID∞", "", "lower"),
    "frechet": MetricInfo("Fréchet distance", "", "lower"),
    "frechet_infinity": MetricInfo("Fréchet distance∞", "", "lower"),
    "kid": MetricInfo("KID", "", "lower"),
    "cmmd": MetricInfo("CMMD", "", "lower"),
    "precision": MetricInfo("precision", "%", "higher", "images"),
    "recall": MetricInfo("recall", "%", "higher", "references"),
    "density": MetricInfo("density", "%", ""),
    "coverage": MetricInfo("coverage", "%", "higher", "references"),
    "accuracy": MetricInfo("accuracy", "%", "higher", "images"),
    "alignment": MetricInfo("alignment", "%", "higher", "images"),
    "clip_score": MetricInfo("CLIP score", "", "higher"),
    "vendi": MetricInfo("Vendi score", "", "higher"),
    "nearest": MetricInfo("distance to the nearest reference", "", "lower"),
    "saturation_drift": MetricInfo("saturation drift", "points", ""),
    "contrast_drift": MetricInfo("contrast drift", "points", ""),
    SECONDS: MetricInfo("time", "s / image", "lower"),
}
"""In the order in which tables show them, the first being the one that sums a result up."""

BRIEF = ("fd", "pix", "fd_clip", "fid", "frechet", "kid", "precision", "recall", "coverage", "alignment", "clip_score")
"""What a short table shows, of what was measured."""


def metric_info(metric: str) -> MetricInfo:
    """Label, unit and direction of a metric.

    ``precision_k3`` is precision with another k, and ``accuracy_shape`` the accuracy of one attribute; any other metric
    that is not in ``METRICS`` is shown under its own name, without a direction.
    """
    if metric in METRICS:
        return METRICS[metric]
    name, k = re.fullmatch(r"(.+?)(?:_k(\d+))?", metric).groups()
    if k and name in METRICS:
        return METRICS[name]._replace(label=f"{METRICS[name].label} (k = {k})")
    if metric.startswith("accuracy_"):
        return METRICS["accuracy"]._replace(label=f"accuracy, {metric.removeprefix('accuracy_')}")
    return MetricInfo(metric, "", "")


def heading(metric: str) -> str:
    """A column's heading: the metric's label and unit, with an arrow towards better."""
    label, unit, better = metric_info(metric)[:3]
    return " ".join(part for part in (label, unit, {"lower": "↓", "higher": "↑", "": ""}[better]) if part)
