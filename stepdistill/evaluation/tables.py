"""Tables of records: rows, who is best, which digits are shown, and students minus their teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal

from stepdistill.evaluation.columns import BRIEF, METRICS, heading, metric_info
from stepdistill.evaluation.intervals import Interval, t_difference
from stepdistill.evaluation.records import ROLES, Record, check_same_protocol, resolution


def metrics_of(records: Sequence[Record]) -> list[str]:
    """The metrics that the records hold, in the order of ``METRICS``, then the others as they appear."""
    present = list(dict.fromkeys(record.metric for record in records))
    return [m for m in METRICS if m in present] + [m for m in present if m not in METRICS]


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
    return _markdown(lines)


def brief_table(records: Sequence[Record]) -> str:
    """``markdown_table`` of the metrics in ``BRIEF`` that the records hold, then their ``difference_table``."""
    metrics = [metric for metric in BRIEF if metric in metrics_of(records)]
    gaps = difference_table(records, metrics)
    return markdown_table(records, metrics) + (f"\n{gaps}" if gaps else "")


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def quoted_teacher(rows: Sequence[Row]) -> Row | None:
    """The teacher at most steps, of equals the first: whom students are held against; None without a teacher."""
    return max((row for row in rows if row.role == "teacher"), key=lambda row: row.steps, default=None)


def difference(student: Record, teacher: Record) -> Interval | None:
    """Student minus teacher with the paired interval of ``intervals.t_difference``, seed by seed on the same noise.

    Percentages that count never get a narrower interval than ``records.resolution``: it bounds the share of images on
    which two that were never seen to disagree do so, hence their difference.

    Returns:
        None where the seeds are not the same two or more, or the values of each seed were not kept.
    """
    if student.seeds != teacher.seeds or min(len(student.values), len(teacher.values)) < 2:
        return None
    found = t_difference(student.values, teacher.values)
    least = _least_gap(student)
    if found.half_width >= least:
        return found
    return replace(found, low=found.value - least, high=found.value + least)


def differences(rows: Sequence[Row], metric: str) -> dict[int, Interval]:
    """``difference`` of each student's row from ``quoted_teacher``, by the row's place; where there is one."""
    teacher = quoted_teacher(rows)
    if teacher is None or metric not in teacher.cells:
        return {}
    found = {
        i: difference(row.cells[metric], teacher.cells[metric])
        for i, row in enumerate(rows)
        if row.role == "student" and metric in row.cells
    }
    return {i: gap for i, gap in found.items() if gap is not None}


def format_difference(gap: Interval) -> str:
    """A difference with its sign and no digit that its interval does not support, such as ``+0.8 ± 0.2``."""
    text = format_value(gap.value, gap.half_width)
    return text if text.startswith("-") or float(text.partition(" ")[0]) == 0 else f"+{text}"


def difference_table(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """A GitHub table of students minus ``quoted_teacher`` on the same noise, decided differences bold.

    Empty where there is no difference to show: one seed, no teacher, or records that kept no values.

    Raises:
        ValueError: if a cell is claimed twice, or protocols differ within a metric.
    """
    rows = table_rows([record for record in records if record.metric in metrics])
    gaps = {metric: found for metric in metrics if (found := differences(rows, metric))}
    if not gaps:
        return ""
    lines = [["subject", "steps", *map(heading, gaps)], ["---"] + ["---:"] * (1 + len(gaps))]
    for i, row in enumerate(rows):
        if any(i in found for found in gaps.values()):
            lines.append([row.subject, str(row.steps), *(_difference_cell(found.get(i)) for found in gaps.values())])
    return f"{difference_words(quoted_teacher(rows))}\n\n{_markdown(lines)}"


def difference_words(teacher: Row) -> str:
    """What a table of differences shows."""
    steps = f"{teacher.steps} step{'s' if teacher.steps > 1 else ''}"
    return (
        f"Students minus teacher ({steps}, {teacher.sampler}) on the same noise, ± half width of the paired 95 % "
        "interval over sampling seeds; bold: the interval leaves zero out."
    )


def _difference_cell(gap: Interval | None) -> str:
    if gap is None:
        return "-"
    return f"**{format_difference(gap)}**" if gap.decides else format_difference(gap)


def _least_gap(record: Record) -> float:
    """Half width, in percent, that so many pairs support of a percentage that counts; 0 of any other metric."""
    of = metric_info(record.metric).share_of
    if record.items is None or not of:
        return 0.0
    return resolution(record.items * (len(record.values) if of == "images" else 1))  # references are shared by seeds


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


def _overlap(one: Record, other: Record) -> bool:
    return abs(one.value - other.value) <= (one.ci95 or 0.0) + (other.ci95 or 0.0)


def _rounded(number: Decimal, place: int) -> Decimal:
    """The number rounded to 10^place; zero comes without a sign."""
    rounded = number.quantize(Decimal(1).scaleb(place), rounding=ROUND_HALF_EVEN)
    return rounded if rounded else rounded.copy_abs()
