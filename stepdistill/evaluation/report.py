"""One self-contained page about a run: table, image grids, plots, training curves, how to load it, and the protocol.

Numbers come from records and from nothing else. The page asks the network for nothing, so it can be mailed or archived.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.plots import (
    QUALITY,
    inline_svg,
    pair_figure,
    quality_plot,
    steps_figure,
    training_figures,
)
from stepdistill.evaluation.records import (
    SECONDS,
    Record,
    Row,
    best_students,
    format_value,
    heading,
    metric_info,
    metrics_of,
    table_rows,
)

LARGEST_TILE = 256
"""Pixels; larger images are reduced for the page, which would otherwise weigh tens of megabytes."""

__all__ = ["Grid", "headline", "image_grid", "quality_plot", "save_grid", "write_report"]


class Grid(NamedTuple):
    """Images to show together; give teacher and student the same noise and the same classes."""

    title: str
    images: Tensor  # uint8 (R * C, 3, H, W), row by row
    columns: int
    captions: tuple[str, ...] = ()  # of the columns, from the left


def image_grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Images side by side on a transparent ground, every pixel repeated ``scale`` times.

    Args:
        images: uint8 (B, 3, H, W), row by row; the last row may be short.
        columns: images per row.
        scale: side of one pixel, >= 1.

    Raises:
        ValueError: if the images break the contract, there are none, or a number is below 1.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(f"images must be uint8 (B, 3, H, W), B >= 1, got {tuple(images.shape)} of {images.dtype}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    height, width = images.shape[2] * scale, images.shape[3] * scale
    gap = 1 + min(height, width) // 24
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + gap) - gap))
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Writes an image grid as PNG, small images enlarged to about 40 pixels; whole or not at all.

    Raises:
        ValueError: see ``image_grid``.
        OSError: if the disk refuses.
    """
    png = _png(images, columns)
    write_atomically(Path(path), lambda aside: aside.write_bytes(png))


def headline(records: Sequence[Record]) -> str:
    """The result in a sentence: the best student, of equals the one with fewest steps, and its teacher.

    The teacher is quoted at most steps and, if it was measured there, at the student's own number of steps.

    Raises:
        ValueError: if there are no records, or protocols differ within a metric.
    """
    rows = table_rows(records)
    if not rows:
        raise ValueError("there are no records to report")
    metric = metrics_of(records)[0]
    measured = [row for row in rows if metric in row.cells]
    students = best_students(measured, metric)
    teachers = sorted((row for row in measured if row.role == "teacher"), key=lambda row: row.steps)
    if not students:
        row = max(measured, key=lambda row: row.steps)
        return f"{row.subject} in {_steps(row.steps)}: {_quantity(row, metric)}"
    student = min(students, key=lambda row: row.steps)
    text = f"A {student.steps}-step student at {_quantity(student, metric)}"
    if not teachers:
        return text + "."
    teacher = teachers[-1]
    text += f" vs teacher {_steps(teacher.steps)} {_value(teacher, metric)}"
    equal = [row for row in teachers[:-1] if row.steps == student.steps]
    if equal:
        text += f" and teacher {_steps(student.steps)} {_value(equal[0], metric)}"
    if SECONDS in student.cells and SECONDS in teacher.cells and metric != SECONDS:
        ratio = teacher.cells[SECONDS].value / student.cells[SECONDS].value
        text += f". An image takes {ratio:.2g} times less time than with {_steps(teacher.steps)}" if ratio > 1 else ""
    return text + "."


def write_report(
    run_dir: Path,
    *,
    title: str,
    records: list[Record],
    grids: list[Grid],
    curves: Path | None,
    load_code: str,
    notes: str = "",
) -> Path:
    """Writes ``report/index.html`` in the run's directory and returns its path.

    Args:
        run_dir: the run's directory.
        title: the page's title.
        records: results of comparable protocol, at least one.
        grids: images to show side by side.
        curves: the training log, ``metrics.jsonl``; None if nothing was trained.
        load_code: Python that loads the result.
        notes: plain text, paragraphs separated by an empty line.

    Raises:
        FileNotFoundError: if ``curves`` names no file.
        ValueError: if there are no records, protocols differ within a metric, or the log is broken.
        OSError: if the disk refuses; an earlier page then stands.
    """
    summary = headline(records)
    training = "" if curves is None else _section("Training", _training(curves))  # first, as it may be missing
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="headline">{escape(summary)}</p>',
        *(f"<p>{escape(paragraph)}</p>" for paragraph in notes.split("\n\n") if paragraph.strip()),
        _section("Results", _table(records) + _table_caption(records)),
        _section("Samples", _grids(grids)) if grids else "",
        _section("Plots", _plots(records)),
        training,
        _section("Load it", f"<pre><code>{escape(load_code.strip())}</code></pre>"),
        _section("Protocol", _protocol(records)),
    ]
    page = PAGE.format(title=escape(title), css=CSS, body="\n".join(part for part in parts if part), js=SORT_JS)
    path = Path(run_dir) / "report" / "index.html"
    write_atomically(path, lambda aside: aside.write_text(page, encoding="utf-8"))
    return path


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _table(records: Sequence[Record]) -> str:
    rows, metrics = table_rows(records), metrics_of(records)
    best = {metric: best_students(rows, metric) for metric in metrics}
    guided = any(row.guidance != 1 for row in rows)
    names = ["subject", "steps", "NFE", *(["guidance"] if guided else []), *map(heading, metrics)]
    names = [name.replace(" ↓", "\u00a0↓").replace(" ↑", "\u00a0↑") for name in names]  # an arrow does not stand alone
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in names)
    lines = []
    for row in rows:
        how = escape(", ".join(part for part in (row.role, row.method, row.sampler) if part != "-"))
        name = f'{escape(row.subject)}<span class="how">{how}</span>'
        cells = [f'<th scope="row" data-value="{escape(row.subject)}">{name}</th>']
        cells += [_number_cell(value) for value in (row.steps, row.nfe, *([row.guidance] if guided else []))]
        cells += [_metric_cell(row, metric, row in best[metric]) for metric in metrics]
        lines.append(f'<tr class="{row.role}">{"".join(cells)}</tr>')
    body = "\n".join(lines)
    table = f'<table id="results">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    return f'<div class="scroll">{table}</div>'


def _number_cell(value: float) -> str:
    return f'<td class="number" data-value="{value!r}">{value:g}</td>'


def _metric_cell(row: Row, metric: str, best: bool) -> str:
    if metric not in row.cells:
        return '<td class="number" data-value=""></td>'
    css = "number best" if best else "number"
    return f'<td class="{css}" data-value="{row.cells[metric].value!r}">{_value(row, metric)}</td>'


def _table_caption(records: Sequence[Record]) -> str:
    text = "Tinted: the best student of each column, and students whose 95 % intervals reach into its own."
    if any(record.ci95 is not None for record in records):
        text += " ±: half width of the Student-t interval over sampling seeds, rounded up."
    if any(record.ci95 is None for record in records):
        text += " Values without ± come from one seed."
    return f'<p class="small">{text} Click a heading to sort.</p>'


def _grids(grids: Sequence[Grid]) -> str:
    figures = []
    for grid in grids:
        factor = math.ceil(grid.images.shape[-1] / LARGEST_TILE)
        images = grid.images if factor == 1 else avg_pool2d(grid.images.float(), factor).round().to(torch.uint8)
        caption = grid.title if factor == 1 else f"{grid.title} (shown at 1/{factor} of their size)"
        data = base64.b64encode(_png(images, grid.columns)).decode()
        alt = f"{grid.title}: {len(images)} images in rows of {grid.columns}"
        image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        figures.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    lists = [
        '<p class="small">Columns, from the left: '
        + "; ".join(f"{i}. {escape(caption)}" for i, caption in enumerate(captions, 1))
        + "</p>"
        for captions in dict.fromkeys(grid.captions for grid in grids if grid.captions)
    ]
    return f'<div class="grids">{"".join(figures)}</div>{"".join(lists)}'


def _plots(records: Sequence[Record]) -> str:
    metrics, rows = metrics_of(records), table_rows(records)
    quality = [metric for metric in QUALITY if metric in metrics]
    pairs = [("recall", "precision"), *((SECONDS, metric) for metric in quality[:1])]
    plots = [(f"{metric_info(metric).label} against steps", steps_figure(records, metric)) for metric in quality]
    for x, y in pairs:
        if any(x in row.cells and y in row.cells for row in rows):
            plots.append((f"{metric_info(y).label} against {metric_info(x).label}", pair_figure(records, x, y)))
    if not plots:
        return "<p>No metric here is plotted.</p>"
    figures = []
    for i, (caption, figure) in enumerate(plots):
        caption = caption[0].upper() + caption[1:]
        svg = inline_svg(figure, f"plot{i}", f"{caption}; the values are in the table of results")
        figures.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
    note = (
        "Lines: the teacher. Points: students; those with equally many steps stand side by side. "
        "Numbers beside points: steps. Bars: 95 % intervals."
    )
    return f'<div class="plots">{"".join(figures)}</div><p class="small">{note}</p>'


def _training(curves: Path) -> str:
    figures = []
    for i, (name, figure) in enumerate(training_figures(curves)):
        svg = inline_svg(figure, f"curve{i}", f"{name} against training step")
        figures.append(f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>")
    return f'<div class="curves">{"".join(figures)}</div>'


def _protocol(records: Sequence[Record]) -> str:
    """One line per way of measuring, with the metrics it holds for, then the versions."""
    ways: dict[tuple, list[str]] = {}
    for r in records:
        seeds = ", ".join(map(str, r.seeds))
        way = (str(r.n), seeds, r.extractor_sha256 or "none", r.reference_sha256 or "none", r.resize, r.device, r.date)
        ways.setdefault(way, []).append(r.metric)
    names = ("images per seed", "seeds", "extractor sha256", "reference sha256", "resize", "device", "date")
    lists = []
    for way, metrics in ways.items():
        items = [("metrics", ", ".join(dict.fromkeys(metrics))), *zip(names, way, strict=True)]
        lists.append("<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in items) + "</dl>")
    versions = sorted({f"{name} {number}" for record in records for name, number in record.versions.items()})
    return "\n".join(lists) + f"<dl><dt>versions</dt><dd>{escape(', '.join(versions))}</dd></dl>"


def _png(images: Tensor, columns: int) -> bytes:
    scale = max(1, round(40 / images.shape[-1]))  # digits are 8 pixels wide
    buffer = io.BytesIO()
    image_grid(images, columns, scale).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _steps(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def _value(row: Row, metric: str) -> str:
    return format_value(row.cells[metric].value, row.cells[metric].ci95)


def _quantity(row: Row, metric: str) -> str:
    label, unit, _ = metric_info(metric)
    return f"{label} {_value(row, metric)} {unit}".strip()


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
<script>{js}</script>
</body>
</html>
"""

CSS = """
:root { --text: #1c2733; --soft: #5b6875; --ground: #fff; --line: #dde3e8; --panel: #f5f7f9; --tint: #d8efe4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ec; --soft: #9aa6b1; --ground: #14181c; --line: #313a43; --panel: #1c2228; --tint: #1d4536; }
}
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 2.75rem 0 0.75rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
p { max-width: 44rem; }
.headline { font-size: 1.2rem; }
.small { color: var(--soft); font-size: 0.85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; min-width: 100%; }
th, td { padding: 0.35rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
thead th:not(:first-child) { text-align: right; }
tbody th { font-weight: 600; }
table th:first-child { position: sticky; left: 0; background: inherit; min-width: 8rem; white-space: normal; }
thead tr, tbody tr { background: var(--ground); }
tr.teacher { background: var(--panel); }
tr.teacher th { font-weight: 400; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.best { background: var(--tint); font-weight: 600; }
thead button { all: unset; cursor: pointer; color: var(--soft); font-weight: 600; }
thead button:focus-visible { outline: 2px solid; }
th[aria-sort="ascending"] button::after { content: " \\25B4"; }
th[aria-sort="descending"] button::after { content: " \\25BE"; }
.how { display: block; color: var(--soft); font-size: 0.8em; font-weight: 400; line-height: 1.3; }
@media (min-width: 50rem) { table th:first-child { min-width: 11.5rem; } }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: 0.85rem; margin: 0.25rem 0; }
.grids, .plots, .curves { display: grid; gap: 1.5rem; align-items: start; }
.grids { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.grids img { max-width: 100%; image-rendering: pixelated; }
svg { width: 100%; height: auto; }
svg text { font-family: inherit !important; }
pre { background: var(--panel); padding: 0.9rem; overflow-x: auto; font-size: 0.85rem; line-height: 1.45; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; font-size: 0.85rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""

SORT_JS = """
const table = document.getElementById("results");
table.querySelectorAll("thead th").forEach((head, column) => head.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const value = row => row.children[column].dataset.value;
  const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "")
    : sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b))));
}));
"""
