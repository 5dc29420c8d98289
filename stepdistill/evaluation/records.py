"""Results as plain records: the one thing that tables and plots are drawn from.

A record is one number with everything needed to know what it may stand beside. ``results.json`` is a list of them.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.special import stdtrit

from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.columns import SECONDS, metric_info
from stepdistill.evaluation.intervals import wilson_interval

ROLES = ("teacher", "student")
PACKAGES = (
    "stepdistill", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "torchmetrics", "numpy", "scipy",
    "scikit-learn", "pillow",
)  # fmt: skip
"""Whose versions may move a number."""
PROTOCOL_FIELDS = ("n", "extractor_sha256", "reference_sha256", "resize", "dtype")


@dataclass(frozen=True)
class Record:
    """One number, its uncertainty and its protocol.

    Raises:
        ValueError: if a field has the wrong type or an impossible value; the message names the field.
    """

    subject: str
    """What was evaluated, as tables show it: a run or a pipeline."""
    role: str
    """"teacher" or "student"."""
    method: str
    """The objective that made it, or how the teacher came about; free text."""
    sampler: str
    steps: int
    nfe: int
    """Network evaluations per image; guidance in two passes counts twice."""
    guidance: float
    """Guidance scale; 1 is none."""
    metric: str
    value: float
    """Mean over seeds, finite."""
    ci95: float | None
    """Half width of the 95 % interval, see ``interval_of``; None where one seed gives none."""
    n: int
    """Images per seed."""
    seeds: list[int]
    extractor_sha256: str | None
    """Which network judged; None where none did, as for seconds."""
    reference_sha256: str | None
    """Which real data it was held against; None where there are none."""
    resize: str
    """How images reached the extractor's size; "none" if they had it."""
    versions: dict[str, str]
    device: str
    date: str
    """ISO 8601, UTC."""
    values: list[float] = field(default_factory=list)
    """Of each seed, in their order, for comparisons on the same noise; empty of times, and where they were not kept."""
    items: int | None = None
    """Of a percentage that counts, how many images or references one seed has; None of any other metric."""
    dtype: str = "float32"
    """In which networks computed. (Records that do not say are from before there was another.)"""

    def __post_init__(self) -> None:
        for name in ("subject", "method", "sampler", "metric", "resize", "device", "dtype"):
            _expect(name, vars(self)[name], "a non-empty string", lambda v: isinstance(v, str) and v.strip() != "")
        _expect("role", self.role, "'teacher' or 'student'", lambda v: v in ROLES)
        for name in ("steps", "nfe", "n"):
            _expect(name, vars(self)[name], "an integer >= 1", lambda v: _is_int(v) and v >= 1)
        for name in ("guidance", "value"):
            _expect(name, vars(self)[name], "a finite number", _is_finite)
        _expect("ci95", self.ci95, "a number >= 0 or null", lambda v: v is None or (_is_finite(v) and v >= 0))
        _expect(
            "seeds",
            self.seeds,
            "a list of different integers",
            lambda v: isinstance(v, list) and v and all(map(_is_int, v)) and len(set(v)) == len(v),
        )
        for name in ("extractor_sha256", "reference_sha256"):
            _expect(name, vars(self)[name], "64 hexadecimal digits or null", lambda v: v is None or _is_sha256(v))
        _expect(
            "versions",
            self.versions,
            "an object of package: version",
            lambda v: isinstance(v, dict) and all(isinstance(x, str) for pair in v.items() for x in pair),
        )
        _expect(
            "values",
            self.values,
            "a list of one finite number for each seed, or of none",
            lambda v: isinstance(v, list) and all(map(_is_finite, v)) and len(v) in (0, len(self.seeds)),
        )
        _expect("items", self.items, "an integer >= 1 or null", lambda v: v is None or (_is_int(v) and v >= 1))
        _expect("date", self.date, "an ISO date such as '2025-01-31'", _is_date)


def save_records(path: Path, records: Sequence[Record]) -> None:
    """Writes ``results.json``; a failure at any moment leaves the old file as it was.

    Raises:
        OSError: if the disk refuses.
    """
    text = json.dumps([asdict(record) for record in records], indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(Path(path), lambda aside: aside.write_text(text + "\n", encoding="utf-8"))


def load_records(path: Path) -> list[Record]:
    """Reads what ``save_records`` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: one line that names the file, the record and the field that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no results at {path}; an evaluation writes them")
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of records, got {type(rows).__name__}")
    return [_record_of(row, f"{path}, record {i}") for i, row in enumerate(rows)]


def records_from_scores(
    *,
    subject: str,
    role: Literal["teacher", "student"],
    method: str,
    sampler: str,
    steps: int,
    nfe: int,
    scores_per_seed: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
    n: int,
    extractor_sha256: str | None,
    reference_sha256: str | None,
    resize: str,
    device: str,
    guidance: float = 1.0,
    versions: Mapping[str, str] | None = None,
    date: str | None = None,
    items: int | None = None,
    dtype: str = "float32",
) -> list[Record]:
    """One record per metric: the mean over seeds with ``interval_of`` it. It has a record's fields for arguments.

    The interval speaks of the seeds it was given: sampling seeds say nothing about training again.

    Args:
        subject: see ``Record``, as for all arguments not listed here.
        role: "teacher" or "student".
        method: free text.
        sampler: free text.
        steps: steps per image.
        nfe: network evaluations per image.
        scores_per_seed: one {metric: value} per seed, all with the same metrics.
        seeds: as many as there are scores.
        n: images per seed.
        extractor_sha256: who judged, or None.
        reference_sha256: against what, or None.
        resize: "none" or how.
        device: see ``device_name``.
        guidance: 1 is none.
        versions: default: those of the installed packages that matter.
        date: default: today.
        items: see ``Record``.
        dtype: see ``Record``.

    Raises:
        ValueError: if seeds and scores do not match, the metrics differ between seeds, or a field is impossible.
    """
    if len(scores_per_seed) != len(seeds) or not seeds:
        raise ValueError(f"scores_per_seed must hold one entry per seed, got {len(scores_per_seed)} for {len(seeds)}")
    metrics = list(scores_per_seed[0])
    for seed, scores in zip(seeds, scores_per_seed, strict=True):
        if set(scores) != set(metrics):
            raise ValueError(f"seed {seed} has metrics {sorted(scores)}, the first seed has {sorted(metrics)}")
    records = []
    for metric in metrics:
        values = [float(scores[metric]) for scores in scores_per_seed]
        value, ci95 = interval_of(metric, values, items)
        record = Record(
            subject=subject,
            role=role,
            method=method,
            sampler=sampler,
            steps=steps,
            nfe=nfe,
            guidance=guidance,
            metric=metric,
            value=value,
            ci95=ci95,
            n=n,
            seeds=list(seeds),
            extractor_sha256=extractor_sha256,
            reference_sha256=reference_sha256,
            resize=resize,
            versions=dict(installed_versions() if versions is None else versions),
            device=device,
            date=datetime.now(timezone.utc).date().isoformat() if date is None else date,
            values=values,
            items=items if metric_info(metric).share_of else None,
            dtype=dtype,
        )
        records.append(record)
    return records


def mean_and_ci95(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width ``t(0.975, m - 1) s / sqrt(m)`` of its Student-t interval; None for a single value.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite, got {list(values)}")
    if len(values) == 1:
        return float(values[0]), None
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def interval_of(metric: str, values: Sequence[float], items: int | None) -> tuple[float, float | None]:
    """Mean over seeds and half width of its 95 % interval, by the metric's own rule; None where one seed gives none.

    ===================================================  =========================================================
    percentages of generated images (accuracy,           Wilson's, of all images of all seeds: each is a draw of its
    alignment, precision)                                own, so that one seed will do and agreement is no certainty
    percentages of references (recall, coverage)         Student's t over seeds, as references share neighbours; no
                                                         narrower than ``resolution``: seeds may agree by chance
    all others, and percentages of unknown ``items``     Student's t over seeds
    ===================================================  =========================================================

    Args:
        metric: its name.
        values: of each seed, percentages in percent.
        items: how many images or references one seed's percentage counts.

    Raises:
        ValueError: if a value is NaN or infinite, or no percentage where it must be one.
    """
    mean, half = mean_and_ci95(values)
    of = metric_info(metric).share_of
    if items is None or not of:
        return mean, half
    if not all(0 <= value <= 100 for value in values):
        raise ValueError(f"{metric} must be percentages from 0 to 100, got {list(values)}")
    if of == "images":
        count = items * len(values)
        return mean, 100 * wilson_interval(round(mean / 100 * count), count).half_width
    return mean, None if half is None else max(half, resolution(items))


def resolution(count: int) -> float:
    """The least half width, in percent, that ``count`` cases support: Wilson's upper end of 0 exceptions among them."""
    return 100 * wilson_interval(0, count).high


def check_same_protocol(records: Sequence[Record]) -> None:
    """Lets records stand in one table only if, metric by metric, they were made alike.

    Alike means the same n, extractor, reference, resize and dtype; for ``seconds_per_image`` also the same device.
    Seeds and versions may differ: both are shown (``differing_versions``), and only students and teachers of the same
    seeds are subtracted. Within one bench neither can differ, being part of what its outcomes are kept under.

    Raises:
        ValueError: naming the metric, the two subjects, the field and both values.
    """
    firsts: dict[str, Record] = {}
    for record in records:
        first = firsts.setdefault(record.metric, record)
        names = PROTOCOL_FIELDS + (("device",) if record.metric == SECONDS else ())
        for name in names:
            one, other = vars(first)[name], vars(record)[name]
            if one != other:
                raise ValueError(
                    f"{record.metric} of {first.subject!r} and {record.subject!r} cannot be compared: "
                    f"{name} differs ({one} and {other})"
                )


def differing_versions(records: Sequence[Record]) -> list[str]:
    """Packages of which records name several versions: ``torch 2.6.0 and 2.7.0``."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for name, number in record.versions.items():
            found.setdefault(name, {})[number] = None
    return [f"{name} {' and '.join(numbers)}" for name, numbers in found.items() if len(numbers) > 1]


@lru_cache(maxsize=1)
def _installed_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def installed_versions() -> dict[str, str]:
    """Versions of the packages a result depends on; all are requirements of this one."""
    return dict(_installed_versions())


def device_name(device: torch.device | str) -> str:
    """What a record's ``device`` says: the accelerator's name, or the CPU's architecture with the threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()}, {torch.get_num_threads()} thread(s)"
    return str(device)


LATER_FIELDS = ("values", "items", "dtype")
"""That records of older versions lack."""


def _record_of(row: object, where: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {type(row).__name__}")
    names = [f.name for f in fields(Record)]
    for name in row:
        if name not in names:
            raise ValueError(f"{where} has the unknown field {name!r}; a record has {', '.join(names)}")
    for name in names:
        if name not in row and name not in LATER_FIELDS:
            raise ValueError(f"{where} lacks the field {name!r}")
    try:
        return Record(**row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _expect(name: str, value: object, expected: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_date(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True
