"""The page of a bench: grids by step count, failures, and plots beside it as files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.bench.measure import Outcome
from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.columns import metric_info
from stepdistill.evaluation.records import Record
from stepdistill.evaluation.report import Failures, Panel, drawn, write_report
from stepdistill.evaluation.tables import Row, format_value, metrics_of, table_rows

WORST = 8
"""Of what is asked, those listed for each student."""


def write_page(
    out: Path, outcomes: Sequence[Outcome], records: Sequence[Record], notes: Sequence[str], *, title: str
) -> list[str]:
    """Write ``report/index.html`` and ``plots/*.svg``; returns their names below ``out``."""
    plots = drawn(records)
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
    """Where each student fails most, against the teacher's longest run; none where the evaluator does not say."""
    rows, longest, found = table_rows(records), long_run(outcomes), []
    teacher = _tally(longest) if longest else {}
    for one in outcomes:
        if one.row.role == "teacher" or "right" not in _first(one):
            continue
        own = _tally(one)
        worst = [(what, *own[what], *teacher.get(what, (0, 0))) for what in own if own[what][0] < own[what][1]]
        worst.sort(key=lambda w: (w[1] / w[2] - (w[3] / w[4] if w[4] else 1.0), w[1] / w[2]))
        kept, asked = _first(one)["failures"], _first(one)["asked"]
        png = kept["png"] if kept else ""
        captions = tuple(asked[i] for i in kept["items"]) if kept else ()
        found.append(Failures(one.row.name, one.row.steps, _share(one, rows), png, captions, tuple(worst[:WORST])))
    return found


def _tally(one: Outcome) -> dict[str, tuple[int, int]]:
    """{what was asked: (right, asked)}, over all seeds."""
    tally: dict[str, tuple[int, int]] = {}
    for value in one.scores.values():
        if "right" not in value:
            return {}
        for what, right in zip(value["asked"], value["right"], strict=True):
            hits, of = tally.get(what, (0, 0))
            tally[what] = hits + (right == "1"), of + 1
    return tally


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
