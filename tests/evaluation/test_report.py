"""The page: whole, self-contained, and true to its records."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stepdistill.evaluation.grids import Grid, image_grid, save_grid
from stepdistill.evaluation.plots import pareto_front, quality_plot, steps_figure, training_figures
from stepdistill.evaluation.records import Record
from stepdistill.evaluation.report import headline, write_report
from stepdistill.evaluation.tables import differences, format_difference, format_value, table_rows

VOID = {"meta", "img", "br"}
SCORES = {
    ("teacher", "T", 50): {"fd": (0.2312, 0.021), "pix": (0.74, 0.05), "precision": (86.6, 0.4), "recall": (92.6, 0.5)},
    ("teacher", "T", 1): {"fd": (7.2741, 0.0912), "pix": (32.4, 0.9), "precision": (90.0, 0.4), "recall": (0.0, 0.0)},
    ("student", "KD <&> DMD2", 1): {"fd": (0.1971, 0.0049), "pix": (0.657, 0.012), "precision": (85.2, 0.3)},
    ("student", "PD", 1): {"fd": (0.4671, None), "recall": (87.8, None), "precision": (84.0, None)},
}
SECONDS = {50: 0.05, 1: 0.001}


def record(role: str, subject: str, steps: int, metric: str, value: float, ci95: float | None) -> Record:
    return Record(
        subject=subject,
        role=role,
        method="dmd2" if role == "student" else "-",
        sampler="ddim",
        steps=steps,
        nfe=steps,
        guidance=1.0,
        metric=metric,
        value=value,
        ci95=ci95,
        n=5000,
        seeds=[11, 12, 13],
        extractor_sha256="a1" * 32,
        reference_sha256="b2" * 32,
        resize="none",
        versions={"torch": "2.6.0", "stepdistill": "0.1.0"},
        device="cpu x86_64",
        date="2025-01-31",
    )


@pytest.fixture(scope="module")
def records() -> list[Record]:
    cells = [record(*who, metric, *number) for who, row in SCORES.items() for metric, number in row.items()]
    return cells + [record(*who, "seconds_per_image", SECONDS[who[2]], None) for who in SCORES]


@pytest.fixture(scope="module")
def digits() -> Tensor:
    pixels = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    lines = [{"step": i, "stage": "kd", "student/mse": 1 / i, "note": "text"} for i in range(1, 90)]
    lines += [{"step": i, "stage": "dmd2", "critic/loss": 0.3, "disc/loss": math.nan} for i in range(1, 5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests look at."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[tuple[str | None, str]]] = []  # (data-value, text) of each table cell
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> repeats an attribute: {names}"
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append((dict(attrs).get("data-value"), ""))

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            value, text = self.rows[-1][-1]
            self.rows[-1][-1] = (value, text + data)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def page(run_dir, records, digits, log) -> str:
    path = write_report(
        run_dir,
        title="Digits & more",
        records=records,
        grids=[Grid("Teacher <50>", digits, 3), Grid("Student", digits, 3)],
        curves=log,
        load_code="pipe = load('a' < 'b')",
        notes="First.\n\nSecond & last.",
    )
    assert path == run_dir / "report" / "index.html"
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in Page(page).attributes if "id" in attributes]
    assert len(ids) > 10 and len(set(ids)) == len(ids)
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert references and all((a or b) in ids for a, b in references)


def test_page_asks_nobody_for_anything(page, run_dir):
    text = re.sub(r'data:image/png;base64,[^"]+', "", page)
    assert not re.search(r"https?:|//[a-z]|@import|\bfile:|xlink|xmlns", text, re.IGNORECASE)
    assert str(run_dir) not in text and not re.search(r"""["'\s(](/[A-Za-z][\w.]*){2,}""", text)
    tags = {tag for tag, _ in Page(page).attributes}
    assert not tags & {"link", "iframe", "object", "embed", "a"}
    for tag, attributes in Page(page).attributes:
        source = attributes.get("src")
        assert source is None or (tag == "img" and source.startswith("data:image/png;base64,"))


def test_pictures_have_words(page):
    parsed = Page(page)
    images = [attributes for tag, attributes in parsed.attributes if tag == "img"]
    plots = [attributes for tag, attributes in parsed.attributes if tag == "svg"]
    assert [image["alt"] for image in images] == [
        "Teacher <50>: 6 images in rows of 3",
        "Student: 6 images in rows of 3",
    ]
    # fd and pix against steps, the rest against one another, and three training curves
    assert [plot["aria-label"].split(";")[0] for plot in plots] == [
        "FD against steps",
        "Pixel FD against steps",
        "Precision against recall",
        "FD against time",
        "FD against recall",
        "kd: student/mse against training step",
        "dmd2: critic/loss against training step",
        "dmd2: disc/loss against training step",
    ]
    assert all(plot["role"] == "img" and "viewbox" in plot for plot in plots)


def test_table_holds_the_records(page, records):
    head, *rows = Page(page).rows
    assert [text.replace("\u00a0", " ") for _, text in head] == [
        "subject", "steps", "NFE", "FD % ↓", "pixel FD % ↓", "precision % ↑", "recall % ↑", "time s / image ↓",
    ]  # fmt: skip
    columns = ["fd", "pix", "precision", "recall", "seconds_per_image"]
    shown = {}
    for (subject, name), (steps, _), _, *cells in rows:
        assert name.startswith(subject)
        for metric, (value, text) in zip(columns, cells, strict=True):
            if value:
                shown[subject, int(steps), metric] = (float(value), text)
    expected = {(r.subject, r.steps, r.metric): (r.value, format_value(r.value, r.ci95)) for r in records}
    assert shown == expected


def test_differences_from_the_teacher_stand_below_the_results(tmp_path, records):
    def with_values(one: Record) -> Record:
        return replace(one, seeds=[0, 1], values=[one.value, one.value + 0.1 * one.steps])

    kept = [with_values(one) for one in records if one.metric == "fd"]
    text = write_report(tmp_path, title="t", records=kept, grids=[], curves=None).read_text()
    rows = table_rows(kept)
    found = differences(rows, "fd")
    assert len(found) == sum(row.role == "student" for row in rows) >= 1
    shown = [[cell for _, cell in row] for row in Page(text).rows]
    for i, gap in found.items():
        assert [rows[i].subject, str(rows[i].steps), format_difference(gap)] in shown
    assert "Students minus teacher (50 steps, ddim) on the same noise" in text
    alone = write_report(tmp_path, title="t", records=records, grids=[], curves=None).read_text()
    assert "Students minus teacher" not in alone


def test_versions_that_differ_are_said(tmp_path, records):
    mixed = [replace(records[0], versions={"torch": "9.9"}), *records[1:]]
    text = write_report(tmp_path, title="t", records=mixed, grids=[], curves=None).read_text()
    assert "Not all values were made with the same versions: torch 9.9 and" in text
    text = write_report(tmp_path, title="t", records=records, grids=[], curves=None).read_text()
    assert "the same versions" not in text


def test_teachers_are_marked_and_best_students_tinted(page):
    rows = [attributes.get("class") for tag, attributes in Page(page).attributes if tag == "tr"]
    assert rows == [None, "teacher", "teacher", "student", "student"]
    best = re.findall(r'class="number best" data-value="([^"]+)"', page)
    assert sorted(map(float, best)) == [0.001, 0.001, 0.1971, 0.657, 85.2, 87.8]  # both students are equally fast


def test_page_tells_result_notes_code_and_protocol(page, records):
    for text in (
        f'<p class="headline">{headline(records)}</p>',
        "<title>Digits &amp; more</title>",
        "<p>First.</p>",
        "<p>Second &amp; last.</p>",
        "<pre><code>pipe = load(&#x27;a&#x27; &lt; &#x27;b&#x27;)</code></pre>",
        "<dd>5000</dd>",
        "<dd>11, 12, 13</dd>",
        "<dd>" + "a1" * 32 + "</dd>",
        "<dd>" + "b2" * 32 + "</dd>",
        "<dd>cpu x86_64</dd>",
        "<dd>2025-01-31</dd>",
        "<dd>stepdistill 0.1.0, torch 2.6.0</dd>",
        "KD &lt;&amp;&gt; DMD2",
    ):
        assert text in page
    assert "KD <&" not in page


def test_headline_quotes_the_best_student_and_its_teacher(records):
    assert headline(records) == (
        "A 1-step student at FD 0.197 ± 0.005 % vs teacher 50 steps 0.23 ± 0.03 and teacher 1 step 7.3 ± 0.1. "
        "An image takes 50 times less time than with 50 steps."
    )
    assert headline([r for r in records if r.role == "student"]) == "A 1-step student at FD 0.197 ± 0.005 %."
    assert headline([r for r in records if r.role == "teacher"]) == "T in 50 steps: FD 0.23 ± 0.03 %"
    with pytest.raises(ValueError, match="no records"):
        headline([])


def test_of_equally_good_students_the_headline_takes_the_fastest():
    four = record("student", "PCM", 4, "fd", 0.30, 0.02)
    assert headline([four, record("student", "KD", 1, "fd", 0.31, 0.02)]).startswith("A 1-step student at FD 0.31")
    assert headline([four, record("student", "KD", 1, "fd", 0.51, 0.02)]).startswith("A 4-step student at FD 0.30")


def test_incomparable_records_write_no_page(tmp_path, records):
    mixed = [*records, replace(records[0], subject="other", n=2000)]
    with pytest.raises(ValueError, match="n differs"):
        write_report(tmp_path, title="t", records=mixed, grids=[], curves=None, load_code="x")
    assert not (tmp_path / "report").exists()


def test_page_without_grids_curves_or_known_metrics(tmp_path):
    only = [record("student", "S", 2, "sharpness", 3.0, None)]
    text = write_report(tmp_path, title="t", records=only, grids=[], curves=None, load_code="x").read_text()
    Page(text)
    assert "Training" not in text and "Samples" not in text and "sharpness" in text


def test_a_missing_training_log_is_an_error(tmp_path, records):
    with pytest.raises(FileNotFoundError, match=r"no training log at .*none\.jsonl"):
        write_report(tmp_path, title="t", records=records, grids=[], curves=tmp_path / "none.jsonl", load_code="x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1, "loss": 1}\n{"step": 2, "lo', "line 2 is not JSON"),
        ('{"loss": 1}\n', "line 1 must be an object with an integer 'step'"),
        ("[1]\n", "line 1 must be an object"),
        ('{"step": 1, "stage": "kd"}\n', "no numbers"),
        ("", "no numbers"),
    ],
)
def test_a_broken_training_log_names_its_line(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        training_figures(path)
    assert "\n" not in str(error.value)


def test_training_curves_show_every_number_by_stage(log):
    figures = dict(training_figures(log))
    assert list(figures) == ["kd: student/mse", "dmd2: critic/loss", "dmd2: disc/loss"]
    raw, smooth = figures["kd: student/mse"].axes[0].lines
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(1, 90))
    np.testing.assert_allclose(raw.get_ydata(), 1 / np.arange(1, 90))
    np.testing.assert_allclose(smooth.get_ydata(), (1 / np.arange(1, 89) + 1 / np.arange(2, 90)) / 2)
    np.testing.assert_array_equal(smooth.get_xdata(), np.arange(2, 90))


# Plots and pictures


def test_steps_plot_draws_the_records(records):
    figure = steps_figure(records, "fd")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    drawn = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines]
    assert drawn[0] == [(1, 7.2741), (50, 0.2312)]  # the teacher, in order of steps
    students = [point for points in drawn[1:] for point in points]
    assert [y for _, y in students] == [0.1971, 0.4671]
    assert [x for x, _ in students] == [pytest.approx(2**-0.08), pytest.approx(2**0.08)]  # side by side around 1
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["T, ddim", "KD <&> DMD2, 1 step", "PD, 1 step"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_quality_plot_stands_alone(tmp_path, records, suffix):
    path = tmp_path / f"quality{suffix}"
    quality_plot(records, path)
    if suffix == ".png":
        with Image.open(path) as image:
            assert image.width > image.height > 300
    else:
        assert path.read_text().lstrip().startswith("<?xml") and "FD (%)" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_quality_plot_needs_a_known_suffix_and_metric(tmp_path, records):
    with pytest.raises(ValueError, match=r"\.png or \.svg, got plot\.gif"):
        quality_plot(records, tmp_path / "plot.gif")
    with pytest.raises(ValueError, match=r"no record has metric 'fd' or 'pix'; there are \['recall'\]"):
        quality_plot([r for r in records if r.metric == "recall"], tmp_path / "plot.png")


def test_image_grid_repeats_pixels_and_leaves_gaps(digits):
    sheet = np.asarray(image_grid(digits[:5], columns=3, scale=4))  # 32-pixel tiles, gaps of 2
    assert sheet.shape == (2 * 32 + 2, 3 * 32 + 4, 4)
    for i, (top, left) in enumerate([(0, 0), (0, 34), (0, 68), (34, 0), (34, 34)]):
        tile = sheet[top : top + 32, left : left + 32]
        assert np.array_equal(tile[..., :3], digits[i].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1))
        assert (tile[..., 3] == 255).all()
    assert (sheet[:, 32:34, 3] == 0).all() and (sheet[34:, 68:, 3] == 0).all()


@pytest.mark.parametrize(
    ("images", "columns", "scale"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 2, 1),
        (torch.zeros(2, 3, 8, 8), 2, 1),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), 2, 1),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 0, 1),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 2, 0),
    ],
)
def test_image_grid_refuses_what_it_cannot_show(images, columns, scale):
    with pytest.raises(ValueError, match="must be"):
        image_grid(images, columns, scale)


def test_saved_grid_enlarges_digits(tmp_path, digits):
    save_grid(tmp_path / "samples" / "grid.png", digits, columns=6)
    with Image.open(tmp_path / "samples" / "grid.png") as image:
        assert image.size == (6 * 40 + 5 * 2, 40)


def test_large_images_are_reduced_on_the_page_only(tmp_path, records):
    records = records[:1]
    image = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    image[..., ::2, :] = 200
    path = write_report(tmp_path, title="t", records=records, grids=[Grid("big", image, 1)], curves=None, load_code="x")
    text = path.read_text()
    data = re.search(r"data:image/png;base64,([^\"]+)", text).group(1)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert shown.shape[:2] == (256, 256) and (shown[..., :3] == 100).all()
    assert "<b>big</b> (shown at 1/2 of their size)" in text


def test_the_front_is_what_nobody_beats_in_both():
    points = {
        "a": (90.0, 1.0),
        "b": (95.0, 1.5),
        "c": (93.0, 2.0),
        "d": (80.0, 0.5),
        "e": (80.0, 0.9),
        "f": (95.0, 1.5),
    }
    cells = [
        record("student", s, 1, m, v, 0.1) for s, p in points.items() for m, v in zip(("recall", "fd"), p, strict=True)
    ]
    front = pareto_front(table_rows(cells), "recall", "fd")  # recall higher, fd lower; equals stand side by side
    assert [row.subject for row in front] == ["d", "a", "b", "f"]
    cells = [replace(cell, metric={"fd": "precision"}.get(cell.metric, cell.metric)) for cell in cells]
    assert [row.subject for row in pareto_front(table_rows(cells), "recall", "precision")] == ["c", "b", "f"]


def test_a_slider_starts_where_most_grids_are(tmp_path, records, digits):
    grids = [
        Grid("teacher", digits, 3, steps=8), Grid("teacher", digits, 3, steps=4), Grid("teacher", digits, 3, steps=1),
        Grid("a", digits, 3, steps=4), Grid("b", digits, 3, steps=1), Grid("c", digits, 3, steps=4),
        Grid("long", digits, 3),
    ]  # fmt: skip
    text = write_report(tmp_path, title="t", records=records, grids=grids, curves=None).read_text()
    assert 'min="0" max="2" value="1" data-steps="1 4 8" aria-valuetext="4 steps"' in text
    assert (
        text.count('data-steps="4">') == 3 and text.count("hidden><img") == 3
    )  # all but those at 4 steps and the long
    assert "<b>b</b> was measured at 1 step." in text
    alone = write_report(tmp_path, title="t", records=records, grids=grids[-2:], curves=None).read_text()
    assert 'id="steps"' not in alone  # one step count leaves nothing to choose
