"""Plots drawn from records and training logs, as figures and as SVG to stand inside a page.

Figures are built without pyplot, so no window, backend or style outside this file is touched.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.columns import SECONDS, metric_info
from stepdistill.evaluation.page import INK
from stepdistill.evaluation.records import Record
from stepdistill.evaluation.tables import Row, metrics_of, table_rows

COLOURS = ("#2f81c7", "#d9662b", "#2a9d78", "#b65fa3", "#c2931c", "#7b7fd6", "#c4475b", "#4aa3b5")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
FRONT = "#2a9d78"
DASHES = ("-", "--", "-.", ":")
QUALITY = ("fd", "pix", "fd_clip", "fid", "frechet", "kid", "alignment", "clip_score")
"""What is worth plotting against steps."""
DIVERSITY = ("recall", "coverage", "vendi")
"""What quality is held against, the first of these that was measured."""
Cost = Literal["steps", "nfe"]
COSTS: dict[Cost, str] = {"steps": "steps", "nfe": "network evaluations"}


class Series(NamedTuple):
    """One legend entry: rows that share a look."""

    label: str
    rows: list[Row]
    style: dict[str, object]


def quality_plot(records: Sequence[Record], path: Path) -> None:
    """Writes quality against steps, one panel for each of fd and pix that was measured, as a picture of its own.

    Args:
        records: of comparable protocol.
        path: ends in .png or .svg.

    Raises:
        ValueError: if there is neither fd nor pix, the suffix is another, or protocols differ within a metric.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"path must end in .png or .svg, got {path.name}")
    metrics = [metric for metric in ("fd", "pix") if any(record.metric == metric for record in records)]
    if not metrics:
        raise ValueError(f"no record has metric 'fd' or 'pix'; there are {sorted({r.metric for r in records})}")
    series = _series(table_rows(records))
    with _style():
        figure = _figure(series, 4.4 * len(metrics))
        for ax, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            _draw_against_steps(ax, series, metric)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:], dpi=200, facecolor="white")
    write_atomically(path, lambda aside: aside.write_bytes(buffer.getvalue()))


def figures_of(records: Sequence[Record]) -> list[tuple[str, Figure]]:
    """All figures that records have numbers for, with their captions: quality against steps, network evaluations and
    seconds, precision against recall, and quality against diversity with the front that nobody beats in both.
    """
    metrics, rows = metrics_of(records), table_rows(records)
    quality = [metric for metric in QUALITY if metric in metrics]
    figures = [(f"{metric_info(m).label} against steps", steps_figure(records, m)) for m in quality]
    if quality and any(row.nfe != row.steps for row in rows):
        label = f"{metric_info(quality[0]).label} against network evaluations"
        figures.append((label, steps_figure(records, quality[0], "nfe")))
    diversity = [metric for metric in DIVERSITY if metric in metrics][:1]
    pairs = [("recall", "precision", False), *((SECONDS, m, False) for m in quality[:1])]
    pairs += [(d, m, True) for d in diversity for m in quality[:1]]
    for x, y, front in pairs:
        if any(x in row.cells and y in row.cells for row in rows):
            title = f"{metric_info(y).label} against {metric_info(x).label}"
            figures.append((title, pair_figure(records, x, y, front=front)))
    return [(title[0].upper() + title[1:], figure) for title, figure in figures]


def steps_figure(records: Sequence[Record], metric: str, against: Cost = "steps") -> Figure:
    """A metric against steps or network evaluations (log2): the teacher as dark lines, students as points, joined where
    one has several; intervals where there are seeds.
    """
    series = _series([row for row in table_rows(records) if metric in row.cells])
    with _style():
        figure, ax = _single(series)
        _draw_against_steps(ax, series, metric, against)
    return figure


def pareto_front(rows: Sequence[Row], x: str, y: str) -> list[Row]:
    """The rows that no other row beats in one metric without losing in the other, in order of ``x``.

    Of metrics without a direction, more counts as better for ``x`` and less for ``y``.
    """
    signs = [1 if metric_info(x).better != "lower" else -1, -1 if metric_info(y).better != "higher" else 1]
    points = [(signs[0] * row.cells[x].value, signs[1] * row.cells[y].value) for row in rows]
    front = [
        row
        for row, point in zip(rows, points, strict=True)
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
    ]
    return sorted(front, key=lambda row: row.cells[x].value)


def pair_figure(records: Sequence[Record], x: str, y: str, *, front: bool = False) -> Figure:
    """One metric against another, steps beside the points of whoever has several; seconds on a log axis.

    With ``front`` the ``pareto_front`` is joined by a broad faint line.
    """
    series = _series([row for row in table_rows(records) if x in row.cells and y in row.cells])
    with _style():
        figure, ax = _single(series)
        for _, rows, style in series:
            xs, ys = [row.cells[x].value for row in rows], [row.cells[y].value for row in rows]
            ax.errorbar(xs, ys, xerr=_half_widths(rows, x), yerr=_half_widths(rows, y), elinewidth=0.6, **style)
            if len(rows) > 1:
                for row, *point in zip(rows, xs, ys, strict=True):
                    ax.annotate(str(row.steps), point, (5, 4), textcoords="offset points", fontsize=7.5)
        if front:
            best = pareto_front([row for _, rows, _ in series for row in rows], x, y)
            xs, ys = [row.cells[x].value for row in best], [row.cells[y].value for row in best]
            ax.plot(xs, ys, color=FRONT, alpha=0.3, linewidth=5, solid_capstyle="round", zorder=1, gid="front")
        if x == SECONDS:
            ax.set_xscale("log")
            _plain_log_ticks(ax.xaxis)
        _scale_y(ax, series, y)
        ax.set_xlabel(_axis_label(x))
        ax.set_ylabel(_axis_label(y))
    return figure


def training_figures(metrics_jsonl: Path) -> list[tuple[str, Figure]]:
    """One small figure per stage and logged number, with its title: the log against step, faint, and its running mean.

    Args:
        metrics_jsonl: one JSON object a line, ``{"step": int, "stage": str (optional), name: number, ...}``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the line that is not such an object, or if nothing was logged.
    """
    figures = []
    for (stage, name), points in _read_curves(metrics_jsonl).items():
        steps, values = np.array(points, dtype=float).T
        with _style():
            figure = Figure(figsize=(3.1, 1.9), layout="constrained")
            ax = figure.subplots()
            window = max(1, len(values) // 40)
            ax.plot(steps, values, color=COLOURS[0], alpha=0.35 if window > 1 else 1.0, linewidth=1, marker="")
            if window > 1:
                mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
                ax.plot(steps[window - 1 :], mean, color=COLOURS[0], linewidth=1.6)
            finite = values[np.isfinite(values)]
            if len(finite) and finite.min() > 0 and finite.max() > 30 * finite.min():
                ax.set_yscale("log")
                _plain_log_ticks(ax.yaxis)
            ax.set_xlabel("step")
        figures.append((f"{stage}: {name}" if stage else name, figure))
    return figures


def svg_of(figure: Figure) -> str:
    """The figure as an SVG file's text, to be seen on white."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", transparent=True)
    return buffer.getvalue().replace("<svg ", '<svg style="background: white" ', 1)


def _series(rows: Sequence[Row]) -> list[Series]:
    """Teachers by subject, sampler and guidance, joined along steps; students by subject, as points."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (row.role, row.subject, row.sampler, row.guidance) if row.role == "teacher" else (row.role, row.subject)
        groups.setdefault(key, []).append(row)
    teachers = [key for key in groups if key[0] == "teacher"]
    guided = len({key[3] for key in teachers}) > 1
    series = []
    for i, key in enumerate(teachers):
        label = f"{key[1]}, {key[2]}" + (f", guidance {key[3]:g}" if guided else "")
        look = {"color": INK, "marker": "o", "markersize": 3.5, "linewidth": 1.2, "zorder": 2}
        rows_of = sorted(groups[key], key=lambda row: row.steps)
        series.append(Series(label, rows_of, look | {"linestyle": DASHES[i % len(DASHES)]}))
    students = [key for key in groups if key[0] == "student"]
    for i, key in enumerate(students):
        label, steps = key[1], [row.steps for row in groups[key]]
        if len(steps) == 1:  # otherwise each point says its own
            label += f", {steps[0]} step{'s' if steps[0] > 1 else ''}"
        look = {"linestyle": "none", "markersize": 7, "markeredgewidth": 0, "zorder": 3}
        if len(steps) > 1:
            look |= {"linestyle": "-", "linewidth": 0.8}
        look |= {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        series.append(Series(label, sorted(groups[key], key=lambda row: row.steps), look))
    return series


def _draw_against_steps(ax: Axes, series: Sequence[Series], metric: str, against: Cost = "steps") -> None:
    measured = [[row for row in rows if metric in row.cells] for _, rows, _ in series]
    costs = [getattr(row, against) for rows in measured for row in rows]
    crowd = Counter(getattr(row, against) for rows in measured for row in rows if row.role == "student")
    placed: Counter[int] = Counter()
    for (_, _, style), rows in zip(series, measured, strict=True):
        xs = []
        for row in rows:
            aside, cost = 0.0, getattr(row, against)
            if row.role == "student":  # side by side, or equally good students would hide each other
                aside = min(0.16, 0.9 / crowd[cost]) * (placed[cost] - (crowd[cost] - 1) / 2)
                placed[cost] += 1
            xs.append(cost * 2**aside)
        ys = [row.cells[metric].value for row in rows]
        ax.errorbar(xs, ys, yerr=_half_widths(rows, metric), **style)
    ax.set_xscale("log", base=2)
    ax.set_xticks([2**i for i in range(math.floor(math.log2(min(costs))), math.ceil(math.log2(max(costs))) + 1)])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(COSTS[against])
    ax.set_ylabel(_axis_label(metric))
    _scale_y(ax, series, metric)


def _scale_y(ax: Axes, series: Sequence[Series], metric: str) -> None:
    """A log axis where values are positive and span most of a decade; teachers at one step dwarf all else."""
    values = [row.cells[metric].value for _, rows, _ in series for row in rows if metric in row.cells]
    if min(values) > 0 and max(values) > 6 * min(values):
        ax.set_yscale("log")
        _plain_log_ticks(ax.yaxis)


def _plain_log_ticks(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 60 * low else (1, 3) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _half_widths(rows: Sequence[Row], metric: str) -> list[float]:
    """Of the intervals; NaN draws no bar where one seed gives none."""
    return [math.nan if row.cells[metric].ci95 is None else row.cells[metric].ci95 for row in rows]


def _axis_label(metric: str) -> str:
    info = metric_info(metric)
    named = f"{info.label} ({info.unit})" if info.unit else info.label
    return f"{named}, {info.better} is better" if info.better else named


def _single(series: Sequence[Series]) -> tuple[Figure, Axes]:
    figure = _figure(series, 4.6)
    return figure, figure.subplots()


def _figure(series: Sequence[Series], width: float) -> Figure:
    """An empty figure, ``width`` inches wide, with its legend below, in as many columns as the longest name allows."""
    longest = max(len(label) for label, _, _ in series)
    columns = min(len(series), max(1, int(width * 17 / (longest + 7))))  # 17 characters an inch at this size
    figure = Figure(figsize=(width, 3.1 + 0.2 * math.ceil(len(series) / columns)), layout="constrained")
    handles = [Line2D([], [], label=label, **style) for label, _, style in series]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    settings = {
        "font.size": 9,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "stepdistill",
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": INK,
        "grid.alpha": 0.12,
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        yield


def _read_curves(path: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(stage, name) -> (step, value) pairs, in order of appearance."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no training log at {path}; a run writes metrics.jsonl, pass curves=None without one")
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f"{path}, line {number} must be an object with an integer 'step', got {line[:80]}")
        for name, value in entry.items():
            if name not in ("step", "stage") and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault((str(entry.get("stage", "")), name), []).append((entry["step"], value))
    if not curves:
        raise ValueError(f"{path} holds no numbers to plot")
    return curves
