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
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from scipy.special import stdtrit

from stepdistill.checkpoint import write_atomically

ROLES = ("teacher", "student")
PACKAGES = ("stepdistill", "torch", "diffusers", "numpy", "scikit-learn")
PROTOCOL_FIELDS = ("n", "extractor_sha256", "reference_sha256", "resize")
SECONDS = "seconds_per_image"


class MetricInfo(NamedTuple):
    """How a metric is shown."""

    label: str
    unit: str
    better: Literal["lower", "higher", ""]  # "": no direction, never highlighted


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
    "precision": MetricInfo("precision", "%", "higher"),
    "recall": MetricInfo("recall", "%", "higher"),
    "density": MetricInfo("density", "%", ""),
    "coverage": MetricInfo("coverage", "%", "higher"),
    "accuracy": MetricInfo("accuracy", "%", "higher"),
    "alignment": MetricInfo("alignment", "%", "higher"),
    "clip_score": MetricInfo("CLIP score", "", "higher"),
    "vendi": MetricInfo("Vendi score", "", "higher"),
    "saturation_drift": MetricInfo("saturation drift", "points", ""),
    "contrast_drift": MetricInfo("contrast drift", "points", ""),
    SECONDS: MetricInfo("time", "s / image", "lower"),
}
"""In the order in which tables show them, the first being the one that sums a result up."""

BRIEF = ("fd", "pix", "fd_clip", "fid", "frechet", "kid", "precision", "recall", "coverage", "alignment", "clip_score")
"""What a short table shows, of what was measured."""


def metric_info(metric: str) -> MetricInfo:
    """Label, unit and direction of a metric; one that is not in ``METRICS`` is shown under its own name."""
    return METRICS.get(metric, MetricInfo(metric, "", ""))


def metrics_of(records: Sequence[Record]) -> list[str]:
    """The metrics that the records hold, in the order of ``METRICS``, then the others as they appear."""
    present = list(dict.fromkeys(record.metric for record in records))
    return [m for m in METRICS if m in present] + [m for m in present if m not in METRICS]


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
    """Half width of the 95 % interval over seeds; None where one seed gives no interval."""
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

    def __post_init__(self) -> None:
        for name in ("subject", "method", "sampler", "metric", "resize", "device"):
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
) -> list[Record]:
    """One record per metric: the mean over seeds with its Student-t interval. It has a record's fields for arguments.

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
        value, ci95 = mean_and_ci95([scores[metric] for scores in scores_per_seed])
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


def brief_table(records: Sequence[Record]) -> str:
    """``markdown_table`` of the metrics in ``BRIEF`` that the records hold."""
    present = metrics_of(records)
    return markdown_table(records, [metric for metric in BRIEF if metric in present])


def check_same_protocol(records: Sequence[Record]) -> None:
    """Lets records stand in one table only if, metric by metric, they were made alike.

    Alike means the same n, extractor, reference and resize; for ``seconds_per_image`` also the same device.

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


@dataclass(frozen=True)
class Row:
    """One line of a table: everything measured for one subject, sampled in one way."""

    subject: str
    role: str
    method: str
    sampler: str
    steps: int
    nfe: int
    guidance: float
    cells: dict[str, Record] = field(default_factory=dict)
    """By metric."""


def table_rows(records: Sequence[Record]) -> list[Row]:
    """Records of comparable protocol, gathered into rows: teachers first, otherwise in order of appearance.

    Raises:
        ValueError: if two records claim the same cell, or ``check_same_protocol`` objects.
    """
    check_same_protocol(records)
    rows: dict[tuple, Row] = {}
    for r in records:
        key = (r.subject, r.role, r.method, r.sampler, r.steps, r.nfe, r.guidance)
        row = rows.setdefault(key, Row(*key))
        if r.metric in row.cells:
            raise ValueError(f"two records give {r.metric} of {r.subject!r} at {r.steps} steps; keep one")
        row.cells[r.metric] = r
    return sorted(rows.values(), key=lambda row: ROLES.index(row.role))


def best_students(rows: Sequence[Row], metric: str) -> list[Row]:
    """The student rows with the best value of a metric, and those whose intervals reach into the best one's.

    Empty for a metric that has no direction.
    """
    better = metric_info(metric).better
    students = [row for row in rows if row.role == "student" and metric in row.cells]
    if not better or not students:
        return []
    best = (min if better == "lower" else max)((row.cells[metric] for row in students), key=lambda r: r.value)
    return [row for row in students if _overlap(row.cells[metric], best)]


def markdown_table(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """A GitHub table, one row per subject and way of sampling; the best students of each column are bold.

    Raises:
        ValueError: if a metric was never measured, a cell is claimed twice, or protocols differ within a metric.
    """
    rows = table_rows([record for record in records if record.metric in metrics])
    for metric in metrics:
        if not any(metric in row.cells for row in rows):
            raise ValueError(f"no record has metric {metric!r}; there are {sorted({r.metric for r in records})}")
    best = {metric: best_students(rows, metric) for metric in metrics}
    head = ["subject", "role", "method", "sampler", "steps", "NFE", *(heading(metric) for metric in metrics)]
    lines = [head, ["---"] * 4 + ["---:"] * (2 + len(metrics))]
    for row in rows:
        line = [row.subject, row.role, row.method, row.sampler, str(row.steps), str(row.nfe)]
        for metric in metrics:
            text = format_value(row.cells[metric].value, row.cells[metric].ci95) if metric in row.cells else "-"
            line.append(f"**{text}**" if row in best[metric] else text)
        lines.append(line)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def heading(metric: str) -> str:
    """A column's heading: the metric's label and unit, with an arrow towards better."""
    label, unit, better = metric_info(metric)
    return " ".join(part for part in (label, unit, {"lower": "↓", "higher": "↑", "": ""}[better]) if part)


def format_value(value: float, ci95: float | None) -> str:
    """A value with no digit that its interval does not support, such as ``0.20 ± 0.02``.

    The half width is rounded up to one digit and the value to the place of that digit. A single seed supports nothing
    in particular: it gets two digits and no ±, more where two would carry (99.6 is not 100). Seeds that agree exactly
    get up to four.
    """
    number = Decimal(f"{value:.12g}")
    if ci95 is None:
        place = number.adjusted() - 1
        while _rounded(number, place).adjusted() > number.adjusted():
            place -= 1
        return f"{_rounded(number, place):f}"
    if ci95 <= 1e-6 * abs(value):
        text = f"{_rounded(number, number.adjusted() - 3):f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text) + " ± 0"
    half = Decimal(f"{ci95:.6g}")
    half = half.quantize(Decimal(1).scaleb(half.adjusted()), rounding=ROUND_CEILING)
    return f"{_rounded(number, half.adjusted()):f} ± {_rounded(half, half.adjusted()):f}"


def installed_versions() -> dict[str, str]:
    """Versions of the packages a result depends on."""
    return {name: version(name) for name in PACKAGES}


def device_name(device: torch.device | str) -> str:
    """What a record's ``device`` says: the accelerator's name, or the CPU's architecture with the threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()}, {torch.get_num_threads()} thread(s)"
    return str(device)


def _record_of(row: object, where: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {type(row).__name__}")
    names = [f.name for f in fields(Record)]
    for name in row:
        if name not in names:
            raise ValueError(f"{where} has the unknown field {name!r}; a record has {', '.join(names)}")
    for name in names:
        if name not in row:
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


def _overlap(one: Record, other: Record) -> bool:
    return abs(one.value - other.value) <= (one.ci95 or 0.0) + (other.ci95 or 0.0)


def _rounded(number: Decimal, place: int) -> Decimal:
    """The number rounded to 10^place; zero comes without a sign."""
    rounded = number.quantize(Decimal(1).scaleb(place), rounding=ROUND_HALF_EVEN)
    return rounded if rounded else rounded.copy_abs()
