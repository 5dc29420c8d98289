"""The page of a bench: grids by step count, failures, and plots beside it as files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.bench.measure import Outcome
from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.columns import metric_info
from stepdistill.evaluation.grids import Panel
from stepdistill.evaluation.records import Record
from stepdistill.evaluation.report import Failures, write_report
from stepdistill.evaluation.tables import Row, format_value, metrics_of, table_rows

WORST = 8
"""Of what is asked, those listed for each student."""


def write_page(
    out: Path,
    outcomes: Sequence[Outcome],
    records: Sequence[Record],
    notes: Sequence[str],
    *,
    title: str,
    plots: Sequence[tuple[str, str]],
) -> list[str]:
    """Write ``report/index.html`` and ``plots/*.svg``, captions and text given; returns their names below ``out``."""
    write_report(
        out,
        title=title,
        records=list(records),
        grids=panels_of(outcomes, records),
        curves=None,
        left_out=notes,
        failures=failures_of(outcomes, records),
        plots=plots,
    )
    made = ["report/index.html"]
    for caption, svg in plots:
        name = f"plots/{'-'.join(''.join(c if c.isalnum() else ' ' for c in caption.lower()).split())}.svg"
        write_atomically(out / name, lambda aside, svg=svg: aside.write_text(svg, encoding="utf-8"))
        made.append(name)
    return made


def panels_of(outcomes: Sequence[Outcome], records: Sequence[Record]) -> list[Panel]:
    """Every row's pictures: the teacher's longest run always to be seen, the others by title and step count."""
    rows, longest, panels = table_rows(records), long_run(outcomes), []
    alike = {(one.row.name, one.row.role) for one in outcomes}
    solvers = {(name, role): set() for name, role in alike}
    for one in outcomes:
        solvers[one.row.name, one.row.role].add(_sampler(one))
    for one in outcomes:
        several = len(solvers[one.row.name, one.row.role]) > 1 and one.row.role == "teacher"
        title = f"{one.row.name}, {_sampler(one)}" if several else one.row.name
        look, note = one.look, _note(one, rows)
        facts = math.prod(look["shape"][:1]), look["columns"], tuple(look["captions"])
        if one is longest:
            panels.insert(0, Panel(f"{one.row.name}, {one.row.steps} steps", look["png"], *facts, None, note))
        else:
            panels.append(Panel(title, look["png"], *facts, one.row.steps, note))
    return panels


def long_run(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The teacher at most steps, under the first solver that has them."""
    teachers = [one for one in outcomes if one.row.role == "teacher"]
    return max(teachers, key=lambda one: one.row.steps, default=None)


def failures_of(outcomes: Sequence[Outcome], records: Sequence[Record]) -> list[Failures]:
    """Where each student fails most, beside the teacher's longest run; none where the evaluator does not say."""
    rows, longest, found = table_rows(records), long_run(outcomes), []
    for one in outcomes:
        if one.row.role == "teacher" or not {"right", "grades"} & set(_first(one)):
            continue
        told = _right(one, longest, rows) if "right" in _first(one) else _graded(one, longest)
        kept, asked = _first(one)["failures"], _first(one)["asked"]
        png = kept["png"] if kept else ""
        captions = tuple(asked[i] for i in kept["items"]) if kept else ()
        found.append(Failures(one.row.name, one.row.steps, png=png, captions=captions, **told))
    return found


def _right(one: Outcome, teacher: Outcome | None, rows: Sequence[Row]) -> dict[str, Any]:
    """Of a judge that says right or wrong: what goes wrong, that which the teacher does better first."""
    own, long = _by_asked(one, "right"), _by_asked(teacher, "right")

    def share(values: Sequence[float] | None) -> float:
        return _mean(values) if values else 1.0

    def text(values: Sequence[float] | None) -> str:
        return f"{int(sum(values))} of {len(values)}" if values else ""

    wrong = [what for what in own if share(own[what]) < 1]
    wrong.sort(key=lambda what: (share(own[what]) - share(long.get(what)), share(own[what])))
    worst = tuple((what, text(own[what]), text(long.get(what))) for what in wrong[:WORST])
    return {"summary": f"{_share(one, rows)} right", "measure": "right", "shown": "Went wrong", "worst": worst}


def _graded(one: Outcome, teacher: Outcome | None) -> dict[str, Any]:
    """Of a judge that grades: what the teacher's pictures of the same noise have better grades for, in the mean."""
    label, _, better, _ = metric_info(_first(one)["grade"])
    sign = -1 if better == "lower" else 1
    own, long = _by_asked(one, "grades"), _by_asked(teacher, "grades")
    behind = {what: sign * (_mean(own[what]) - _mean(long.get(what) or [0.0])) for what in own}
    worst = sorted((what for what in own if behind[what] < 0 or not long), key=behind.get)
    every, every_long = ([v for values in group.values() for v in values] for group in (own, long))
    beside = f", teacher's long run {_mean(every_long):.4g}" if every_long else ""
    return {
        "summary": f"{label} {_mean(every):.4g}{beside}",
        "measure": f"{label}, mean of images",
        "shown": "Worst grades",
        "worst": tuple((what, _grade_text(own[what]), _grade_text(long.get(what))) for what in worst[:WORST]),
    }


def _grade_text(grades: Sequence[float] | None) -> str:
    return f"{_mean(grades):.4g} of {len(grades)}" if grades else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by_asked(one: Outcome | None, kind: str) -> dict[str, list[float]]:
    """What was asked: the verdict ("right": 1 or 0) or the grade ("grades") of each such image, of all seeds."""
    found: dict[str, list[float]] = {}
    for value in one.scores.values() if one is not None else ():
        for what, said in zip(value["asked"], value[kind], strict=True) if kind in value else ():
            found.setdefault(what, []).append(float(said))
    return found


def _first(one: Outcome) -> dict[str, Any]:
    return next(iter(one.scores.values()))


def _sampler(one: Outcome) -> str:
    return _first(one)["sampler"]


def _row(one: Outcome, rows: Sequence[Row]) -> Row:
    key = (one.row.name, one.row.role, one.row.steps, _sampler(one))
    return next(row for row in rows if (row.subject, row.role, row.steps, row.sampler) == key)


def _note(one: Outcome, rows: Sequence[Row]) -> str:
    """The row's first number and its cost."""
    row = _row(one, rows)
    metric = metrics_of([*row.cells.values()])[0]
    label, unit = metric_info(metric)[:2]
    value = format_value(row.cells[metric].value, row.cells[metric].ci95)
    cost = f"{row.nfe} network evaluation{'s' if row.nfe > 1 else ''}"
    return f"{label} {value} {unit}".strip() + f", {cost}"


def _asked(value: dict[str, Any]) -> int:
    return len(value["right"])


def _share(one: Outcome, rows: Sequence[Row]) -> str:
    """How many are right, as the table shows it."""
    cells = _row(one, rows).cells
    metric = next((m for m in ("accuracy", "alignment") if m in cells), None)
    if metric is None:
        return f"{sum(v['right'].count('1') for v in one.scores.values())} of {sum(map(_asked, one.scores.values()))}"
    return f"{format_value(cells[metric].value, cells[metric].ci95)} %"
