"""One self-contained page about a run: table, image grids, plots, training curves, how to load it, and the protocol.

Numbers come from records and from nothing else. The page asks the network for nothing, so it can be mailed or archived.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.columns import SECONDS, heading, metric_info
from stepdistill.evaluation.grids import Grid, Panel, panel_of
from stepdistill.evaluation.intervals import Interval
from stepdistill.evaluation.page import CSS, INK, JS, PAGE
from stepdistill.evaluation.records import Record, differing_versions
from stepdistill.evaluation.tables import (
    Row,
    best_students,
    difference_words,
    differences,
    format_difference,
    format_value,
    metrics_of,
    quoted_teacher,
    table_rows,
)


class Failures(NamedTuple):
    """Where a student fails most."""

    subject: str
    steps: int
    summary: str  # how it does over all, in words
    measure: str  # what is told of each thing asked for: "right", or a metric
    shown: str  # what the pictures are: those that went wrong, or have the worst grades
    png: str  # base64, a row of such images; empty where there are none
    captions: tuple[str, ...]  # what these were asked to show
    worst: tuple[tuple[str, str, str], ...]
    """(what was asked, how the student did, how the teacher's long run did), furthest behind the teacher first."""


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
    grids: Sequence[Grid | Panel],
    curves: Path | None,
    load_code: str = "",
    notes: str = "",
    left_out: Sequence[str] = (),
    failures: Sequence[Failures] = (),
    evaluations: Path | None = None,
    plots: Sequence[tuple[str, str]] | None = None,
) -> Path:
    """Writes ``report/index.html`` in the run's directory and returns its path.

    Args:
        run_dir: the run's directory.
        title: the page's title.
        records: results of comparable protocol, at least one.
        grids: images to show side by side.
        curves: the training log, ``metrics.jsonl``; None if nothing was trained.
        load_code: Python that loads the result; none for a comparison of several.
        notes: plain text, paragraphs separated by an empty line.
        left_out: remarks below the table.
        failures: where students fail most.
        evaluations: evaluations within training, ``evaluations.jsonl``.
        plots: captions and SVG, where they are drawn already.

    Raises:
        FileNotFoundError: if ``curves`` names no file.
        ValueError: if there are no records, protocols differ within a metric, or the log is broken.
        OSError: if the disk refuses; an earlier page then stands.
    """
    summary = headline(records)
    training = "" if curves is None else _section("Training", _training(curves, "curve"))  # first: may be missing
    if evaluations is not None:
        training = _section("Quality during training", _training(evaluations, "quality")) + training
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="headline">{escape(summary)}</p>',
        *(f"<p>{escape(paragraph)}</p>" for paragraph in notes.split("\n\n") if paragraph.strip()),
        _section("Results", _table(records) + _table_caption(records) + _list(left_out)),
        _section("Students minus teacher", gaps) if (gaps := _differences(records)) else "",
        _section("Samples", _grids([panel_of(g) if isinstance(g, Grid) else g for g in grids])) if grids else "",
        _section("Where students fail", _failures(failures)) if failures else "",
        _section("Plots", _plots(drawn(records) if plots is None else plots)),
        training,
        _section("Load it", f"<pre><code>{escape(load_code.strip())}</code></pre>") if load_code else "",
        _section("Protocol", _protocol(records)),
    ]
    page = PAGE.format(title=escape(title), css=CSS, body="\n".join(part for part in parts if part), js=JS)
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
        text += (
            " ±: half width of the 95 % interval, rounded up; of shares of images Wilson's, of all else Student's t "
            "over sampling seeds."
        )
    if any(record.ci95 is None for record in records):
        text += " Values without ± come from one seed."
    return f'<p class="small">{text} Click a heading to sort.</p>'


def _differences(records: Sequence[Record]) -> str:
    """Every student's paired differences from the teacher's long run; empty where there are none."""
    rows = table_rows(records)
    gaps = {metric: found for metric in metrics_of(records) if (found := differences(rows, metric))}
    if not gaps:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("subject", "steps", *map(heading, gaps)))
    lines = []
    for i, row in enumerate(rows):
        if any(i in found for found in gaps.values()):
            cells = "".join(_difference_cell(found.get(i)) for found in gaps.values())
            lines.append(f'<tr><th scope="row">{escape(row.subject)}</th>{_number_cell(row.steps)}{cells}</tr>')
    table = f'<table id="differences"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    words = difference_words(quoted_teacher(rows)).replace("bold:", "tinted:")
    return f'<div class="scroll">{table}</div><p class="small">{escape(words)}</p>'


def _difference_cell(gap: Interval | None) -> str:
    if gap is None:
        return '<td class="number"></td>'
    return f'<td class="number{" best" if gap.decides else ""}">{format_difference(gap)}</td>'


def _list(lines: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _grids(panels: Sequence[Panel]) -> str:
    groups: dict[str, list[Panel]] = {}
    for i, panel in enumerate(panels):
        groups.setdefault(panel.title if panel.steps is not None else f"\0{i}", []).append(panel)
    counts = sorted({panel.steps for panel in panels if panel.steps is not None})
    start = _usual_steps(panels)
    figures = [_figure(group, start, choose=len(counts) > 1) for group in groups.values()]
    slider = _slider(counts, start) if len(counts) > 1 else ""
    lists = [
        '<p class="small">Columns, from the left: '
        + "; ".join(f"{i}. {escape(caption)}" for i, caption in enumerate(captions, 1))
        + "</p>"
        for captions in dict.fromkeys(panel.captions for panel in panels if panel.captions)
    ]
    return f'{slider}<div class="grids">{"".join(figures)}</div>{"".join(lists)}'


def _usual_steps(panels: Sequence[Panel]) -> int | None:
    """The step count that most grids have, of equals the least: where the slider starts."""
    counts = [panel.steps for panel in panels if panel.steps is not None]
    return min(counts, key=lambda k: (-counts.count(k), k), default=None)


def _slider(counts: Sequence[int], start: int | None) -> str:
    return (
        '<div class="slider"><label for="steps">Steps</label>'
        f'<input type="range" id="steps" min="0" max="{len(counts) - 1}" value="{counts.index(start)}" '
        f'data-steps="{" ".join(map(str, counts))}" aria-valuetext="{_steps(start)}">'
        f'<output for="steps">{_steps(start)}</output></div>'
    )


def _figure(panels: Sequence[Panel], start: int | None, *, choose: bool) -> str:
    """The grids of one title; with ``choose`` only the one at ``start`` steps is to be seen at first."""
    if not choose or panels[0].steps is None:
        return "".join(f"<figure>{_image(panel)}{_caption(panel)}</figure>" for panel in panels)
    parts = []
    for panel in panels:
        mark = f' data-steps="{panel.steps}"' + ("" if panel.steps == start else " hidden")
        parts.append(f"<div{mark}>{_image(panel)}{_caption(panel)}</div>")
    serves = [panel.steps for panel in panels]
    there = start in serves
    words = ", ".join(map(str, serves)) + (" step" if serves == [1] else " steps")
    missing = f"<b>{escape(panels[0].title)}</b> was measured at {words}."
    return (
        f'<figure data-serves="{" ".join(map(str, serves))}"{"" if there else " class=absent"}>{"".join(parts)}'
        f'<p class="missing"{" hidden" if there else ""}>{missing}</p></figure>'
    )


def _image(panel: Panel) -> str:
    at = "" if panel.steps is None else f", {_steps(panel.steps)}"
    alt = f"{panel.title}{at}: {panel.count} images in rows of {panel.columns}"
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{panel.png}">'


def _caption(panel: Panel) -> str:
    note = f" {escape(panel.note)}" if panel.note else ""
    return f"<figcaption><b>{escape(panel.title)}</b>{note}</figcaption>"


def _failures(failures: Sequence[Failures]) -> str:
    blocks = []
    for one in failures:
        worst = one.worst[0] if one.worst else None
        words = f"worst {worst[0]!r}, {worst[1]}" if worst else "nothing went wrong"
        picture = ""
        if one.png:
            picture = (
                f'<img class="strip" alt="{escape(f"{one.subject}, {one.shown}: {len(one.captions)} images")}" '
                f'src="data:image/png;base64,{one.png}"><p class="small">{escape(one.shown)}, from the left; '
                f"asked for: {escape('; '.join(one.captions))}.</p>"
            )
        rows = "".join(
            f'<tr><td>{escape(what)}</td><td class="number">{own}</td><td class="number">{teacher}</td></tr>'
            for what, own, teacher in one.worst
        )
        head = "".join(f'<th scope="col">{name}</th>' for name in ("asked for", escape(one.measure), "teacher"))
        table = (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
            if rows
            else ""
        )
        title = f"{escape(one.subject)}, {_steps(one.steps)}: {escape(one.summary)}"
        blocks.append(f"<details><summary>{title} <span>{escape(words)}</span></summary>{picture}{table}</details>")
    note = '<p class="small">Furthest behind the teacher\'s long run first; all sampling seeds together.</p>'
    return note + "".join(blocks)


def drawn(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Captions and SVG of all figures that records have numbers for."""
    from stepdistill.evaluation.plots import figures_of, svg_of  # matplotlib takes its time

    return [(caption, svg_of(figure)) for caption, figure in figures_of(records)]


def _plots(plots: Sequence[tuple[str, str]]) -> str:
    if not plots:
        return "<p>No metric here is plotted.</p>"
    figures = []
    for i, (caption, picture) in enumerate(plots):
        svg = inline_svg(picture, f"plot{i}", f"{caption}; the values are in the table of results")
        figures.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
    note = (
        "Dark lines: the teacher, one for each solver. Points: students; those with equally many steps stand side by "
        "side. Numbers beside points: steps. Bars: 95 % intervals. Broad pale line: what nobody beats in both."
    )
    return f'<div class="plots">{"".join(figures)}</div><p class="small">{note}</p>'


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """``svg_of`` as an element of a page: scalable, in its text colour, without links, named for screen readers.

    Args:
        svg: the file's text.
        prefix: put before every id, since ids must be unique on a page.
        label: what the picture shows.
    """
    svg = svg[svg.index("<svg") :].replace(' style="background: white"', "", 1)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=").replace(INK, "currentColor")
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _training(curves: Path, prefix: str) -> str:
    from stepdistill.evaluation.plots import svg_of, training_figures  # matplotlib takes its time

    figures = []
    for i, (name, figure) in enumerate(training_figures(curves)):
        svg = inline_svg(svg_of(figure), f"{prefix}{i}", f"{name} against training step")
        figures.append(f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>")
    return f'<div class="curves">{"".join(figures)}</div>'


def _protocol(records: Sequence[Record]) -> str:
    """One line per way of measuring, with the metrics it holds for, then the versions."""
    ways: dict[tuple, list[str]] = {}
    for r in records:
        seeds = ", ".join(map(str, r.seeds))
        way = (
            str(r.n),
            seeds,
            r.extractor_sha256 or "none",
            r.reference_sha256 or "none",
            r.resize,
            r.dtype,
            r.device,
            r.date,
        )
        ways.setdefault(way, []).append(r.metric)
    names = ("images per seed", "seeds", "extractor sha256", "reference sha256", "resize", "dtype", "device", "date")
    lists = []
    for way, metrics in ways.items():
        items = [("metrics", ", ".join(dict.fromkeys(metrics))), *zip(names, way, strict=True)]
        lists.append("<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in items) + "</dl>")
    versions = sorted({f"{name} {number}" for record in records for name, number in record.versions.items()})
    differ = differing_versions(records)
    warning = f"<p>Not all values were made with the same versions: {escape('; '.join(differ))}.</p>" if differ else ""
    return warning + "\n".join(lists) + f"<dl><dt>versions</dt><dd>{escape(', '.join(versions))}</dd></dl>"


def _steps(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def _value(row: Row, metric: str) -> str:
    return format_value(row.cells[metric].value, row.cells[metric].ci95)


def _quantity(row: Row, metric: str) -> str:
    label, unit = metric_info(metric)[:2]
    return f"{label} {_value(row, metric)} {unit}".strip()
