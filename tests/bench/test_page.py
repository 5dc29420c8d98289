"""The page in a real browser: it loads, the slider changes the pictures, columns sort, nothing complains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from stepdistill.bench.measure import Outcome
from stepdistill.bench.output import records_from
from stepdistill.bench.page import failures_of, write_page
from stepdistill.bench.rows import Row
from stepdistill.evaluation.grids import png_of
from stepdistill.evaluation.report import drawn
from stepdistill.sampling import Ddim
from tests.browser import Page, browser, find_browser

BINARY = find_browser()
pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium, chrome or msedge on this machine to look with")

ROWS = {
    ("teacher", "teacher", 50): (0.5, 0.6), ("teacher", "teacher", 1): (13.0, 13.5),
    ("teacher", "teacher", 4): (3.0, 3.3),
    ("one step", "student", 1): (0.7, 0.8), ("both", "student", 1): (2.0, 2.1), ("both", "student", 4): (1.0, 1.2),
}  # fmt: skip
ASKED = ["digit 0", "digit <1>"] * 5


def outcome(name: str, role: str, steps: int, fd: tuple[float, float]) -> Outcome:
    """As measured; every row has a picture of its own."""
    row = Row(name, role, "teacher", "x", "", 1.0, steps, Ddim(), 1.0, "KD" if role == "student" else "-", "0" * 64)
    protocol = {"n": 10, "extractor_sha256": "a" * 64, "reference_sha256": "b" * 64, "resize": "none"}
    shade = torch.full((4, 3, 8, 8), 4 * steps + len(name), dtype=torch.uint8)
    common = {
        "sampler": "ddim", "nfe": steps, "guidance": 1.0, "dtype": "float32",
        "versions": {"torch": "2"}, "date": "2026-01-01",
        "protocols": dict.fromkeys(("fd", "recall", "accuracy", "seconds_per_image"), protocol), "asked": ASKED,
    }  # fmt: skip
    right = "1111111110" if role == "student" else "1" * 10
    kept = {"png": png_of(shade[:1], 1), "items": [9], "shape": [1, 3, 8, 8]} if role == "student" else None
    scores = {
        seed: common | {"scores": {"fd": v, "recall": 90 + v, "accuracy": 90.0}, "right": right, "failures": kept}
        for seed, v in enumerate(fd)
    }
    look = {"png": png_of(shade, 2), "shape": [4, 3, 8, 8], "columns": 2, "captions": ["a", "b"]}
    return Outcome(row, scores, look, [0.01 * steps, 0.011 * steps, 0.012 * steps], "cpu")


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [outcome(*who, fd) for who, fd in ROWS.items()]


@pytest.fixture(scope="module")
def page(outcomes: list[Outcome], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of a bench, open."""
    folder = tmp_path_factory.mktemp("page")
    records = records_from(outcomes)
    write_page(folder, outcomes, records, ["left out: <nobody>"], title="A & B", plots=drawn(records))
    with browser(BINARY, tmp_path_factory.mktemp("profile")) as page:
        page.size(1200, 900)
        page.open(folder / "report" / "index.html")
        yield page


SEEN = "[...document.querySelectorAll('.grids img')].filter(i => i.offsetParent && i.naturalWidth).map(i => i.alt)"
PIXELS = "[...document.querySelectorAll('.grids img')].filter(i => i.offsetParent).map(i => i.src)"


def test_it_loads_and_shows_what_there_is(page: Page) -> None:
    assert page.js("document.title") == "A & B"
    assert page.js("document.querySelectorAll('#results tbody tr').length") == 6
    assert page.js(SEEN) == [
        "teacher, 50 steps: 4 images in rows of 2",
        *(f"{name}, 1 step: 4 images in rows of 2" for name in ("teacher", "one step", "both")),
    ]
    assert "<nobody>" in page.js("document.querySelector('.notes').textContent")
    assert page.problems == []


def test_the_slider_changes_the_pictures_by_keyboard_and_pointer(page: Page) -> None:
    before = page.js(PIXELS)
    page.js("document.getElementById('steps').focus()")
    page.press("ArrowRight")
    assert page.js("document.querySelector('.slider output').value") == "4 steps"
    assert page.js("document.getElementById('steps').getAttribute('aria-valuetext')") == "4 steps"
    after = page.js(PIXELS)
    assert page.js(SEEN) == [
        "teacher, 50 steps: 4 images in rows of 2",
        *(f"{name}, 4 steps: 4 images in rows of 2" for name in ("teacher", "both")),
    ]
    assert after[0] == before[0] and not set(after[1:]) & set(before)
    missing = "[...document.querySelectorAll('.missing')].filter(p => p.offsetParent).map(p => p.textContent)"
    assert page.js(missing) == ["one step was measured at 1 step."]
    page.press("Home")
    assert page.js(PIXELS) == before and page.js(missing) == []
    box = page.js("(() => { const b = document.getElementById('steps').getBoundingClientRect();"
                  " return [b.right - 4, b.top + b.height / 2]; })()")  # fmt: skip
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
    assert page.js(PIXELS) == after
    assert page.problems == []


def test_columns_sort_by_keyboard_and_pointer(page: Page) -> None:
    column = "[...document.querySelectorAll('#results tbody tr')].map(row => +row.children[3].dataset.value)"
    page.js("document.querySelectorAll('#results thead button')[3].click()")
    rising = page.js(column)
    assert rising == sorted(rising) and len(set(rising)) == 6
    assert page.js("document.querySelectorAll('#results thead th')[3].getAttribute('aria-sort')") == "ascending"
    page.js("document.querySelectorAll('#results thead button')[3].focus()")
    page.press("Enter")
    assert page.js(column) == rising[::-1]
    assert page.js("document.querySelectorAll('#results [aria-sort]').length") == 1
    assert page.problems == []


def test_failures_open_and_name_what_went_wrong(page: Page) -> None:
    details = "document.querySelector('details')"
    assert page.js(f"{details}.textContent").count("digit <1>") >= 2
    assert page.js(f"[...{details}.querySelectorAll('td')].map(c => c.textContent)") == [
        "digit <1>",
        "8 of 10",
        "10 of 10",
    ]
    page.js(f"{details}.querySelector('summary').click()")
    assert page.js(f"{details}.open && {details}.querySelector('img').naturalWidth > 0")
    assert page.problems == []


@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_phones_and_desks(page: Page, width: int) -> None:
    page.size(width, 844)
    assert page.js("document.documentElement.scrollWidth") <= width
    page.size(1200, 900)


def test_a_bug_in_the_page_would_be_seen(page: Page) -> None:
    """The test's own eyes: an error on the console, and a request, are noticed."""
    page.js("console.error('seen')")
    page.js("fetch('https://example.invalid/x').catch(() => 0)")
    page.js("1")
    assert any("seen" in problem for problem in page.problems)
    assert any("example.invalid" in problem for problem in page.problems)
    page.problems.clear()


def test_worst_is_what_is_furthest_behind_the_teacher(outcomes: list[Outcome]) -> None:
    one = next(f for f in failures_of(outcomes, records_from(outcomes)) if (f.subject, f.steps) == ("both", 4))
    assert one.worst == (("digit <1>", "8 of 10", "10 of 10"),) and one.captions == ("digit <1>",)
    assert one.summary == "90 ± 0 % right"


def test_what_the_teacher_fails_at_as_well_is_not_the_students_worst(outcomes: list[Outcome]) -> None:
    def with_right(one: Outcome, right: str) -> Outcome:
        return replace(one, scores={seed: value | {"right": right} for seed, value in one.scores.items()})

    # of "digit 0" (even places) both get 2 of 5 right, of "digit <1>" the student 4 and the teacher 5
    student, long_run = with_right(outcomes[-1], "0101011110"), with_right(outcomes[0], "0101011111")
    (found,) = failures_of([long_run, student], records_from([long_run, student]))
    assert found.worst == (("digit <1>", "8 of 10", "10 of 10"), ("digit 0", "4 of 10", "4 of 10"))
