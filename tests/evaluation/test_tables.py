"""Tables: directions, digits shown, who is best, and students minus their teacher on the same noise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stepdistill.evaluation import evaluator
from stepdistill.evaluation.columns import heading, metric_info
from stepdistill.evaluation.intervals import Interval
from stepdistill.evaluation.records import Record
from stepdistill.evaluation.tables import (
    best_students,
    brief_table,
    difference,
    difference_table,
    differences,
    format_difference,
    format_value,
    markdown_table,
    quoted_teacher,
    table_rows,
)
from tests.evaluation.test_records import RECORD, scored


@pytest.mark.parametrize(
    ("value", "ci95", "text"),
    [
        (0.19876, 0.0123, "0.20 ± 0.02"),  # rounded up: 0.01 would promise more than was measured
        (0.19876, 0.01, "0.20 ± 0.01"),
        (0.30000001, 0.30000000000000004, "0.3 ± 0.3"),  # but not for a float's last bit
        (7.2749, 0.0951, "7.3 ± 0.1"),
        (93.44, 1.2, "93 ± 2"),
        (93.44, 12.0, "90 ± 20"),
        (2.0, 25.0, "0 ± 30"),
        (-0.001, 0.02, "0.00 ± 0.02"),
        (99.98, 0.05, "99.98 ± 0.05"),
        (1437.0, 3.0, "1437 ± 3"),
        (100.0, 0.0, "100 ± 0"),
        (1200.0, 0.0, "1200 ± 0"),
        (99.46, 1e-14, "99.46 ± 0"),
        (0.2345, None, "0.23"),
        (7.0, None, "7.0"),
        (99.6, None, "99.6"),  # two digits would say 100
        (100.0, None, "100"),
        (0.0, None, "0.0"),
        (0.000123, None, "0.00012"),
    ],
)
def test_no_digit_is_shown_that_the_interval_does_not_support(value, ci95, text):
    assert format_value(value, ci95) == text


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        *((name, "lower") for name in ("fid", "fid_infinity", "frechet", "frechet_infinity", "cmmd", "kid")),
        *((name, "higher") for name in ("vendi", "precision_k3", "coverage_k10", "accuracy_colour2", "clip_score")),
        *((name, "") for name in ("saturation_drift", "contrast_drift", "density", "density_k3", "of_my_own")),
    ],
)
def test_the_best_of_each_metric_is_known(metric, better):
    low, high = (replace(RECORD, metric=metric, subject=s, value=v) for s, v in (("low", 0.1), ("high", 0.9)))
    found = [row.subject for row in best_students(table_rows([low, high]), metric)]
    assert found == {"lower": ["low"], "higher": ["high"], "": []}[better]
    assert heading(metric).endswith({"lower": "↓", "higher": "↑", "": metric_info(metric).unit}[better])


def test_every_metric_of_the_evaluators_has_a_direction_or_is_known_to_have_none():
    assert {m for m in ("frechet", "frechet_infinity", *evaluator.METRICS) if not metric_info(m).better} == {
        "density", "saturation_drift", "contrast_drift",
    }  # fmt: skip
    assert heading("precision_k3") == "precision (k = 3) % ↑" and heading("accuracy_shape") == "accuracy, shape % ↑"


def test_rows_gather_metrics_and_put_teachers_first():
    teacher = scored(subject="teacher", role="teacher", steps=50, nfe=50)
    rows = table_rows([*scored(), *teacher, *scored(steps=4)])
    assert [(row.subject, row.steps) for row in rows] == [("teacher", 50), ("KD", 1), ("KD", 4)]
    assert set(rows[0].cells) == {"fd", "recall"}
    with pytest.raises(ValueError, match="two records give fd of 'KD' at 1 steps"):
        table_rows([*scored(), *scored()])


def test_best_students_include_those_that_cannot_be_told_apart():
    def at(subject: str, value: float, ci95: float | None, role: str = "student", metric: str = "fd") -> Record:
        return replace(RECORD, subject=subject, value=value, ci95=ci95, role=role, metric=metric)

    records = [at("T", 0.1, 0.0, "teacher"), at("A", 0.30, 0.02), at("B", 0.34, 0.03), at("C", 0.36, 0.03)]
    assert [row.subject for row in best_students(table_rows(records), "fd")] == ["A", "B"]
    recalls = [at("A", 90, None, metric="recall"), at("B", 91, None, metric="recall")]
    assert [row.subject for row in best_students(table_rows(recalls), "recall")] == ["B"]
    assert best_students(table_rows([at("A", 90, None, metric="density")]), "density") == []
    assert best_students(table_rows([at("T", 0.1, 0.0, "teacher")]), "fd") == []


def test_markdown_table_by_hand():
    teacher = replace(RECORD, subject="T", role="teacher", method="-", sampler="ddim", steps=50, nfe=99, value=0.234)
    recall = replace(RECORD, metric="recall", value=94.61, ci95=None)
    assert markdown_table([RECORD, recall, teacher], ["fd", "recall"]).splitlines() == [
        "| subject | role | method | sampler | steps | NFE | FD % ↓ | recall % ↑ |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| T | teacher | - | ddim | 50 | 99 | 0.23 ± 0.01 | - |",
        "| KD \\| DMD2 | student | dmd2 | renoise | 1 | 1 | **0.20 ± 0.01** | **95** |",
    ]
    with pytest.raises(ValueError, match=r"no record has metric 'kid'; there are \['fd', 'recall'\]"):
        markdown_table([RECORD, recall], ["fd", "kid"])


# Students minus teacher


def of_seeds(values: list[float], **changes) -> Record:
    """A record of these values, the seeds being 0, 1, 2 and so on."""
    mean = sum(values) / len(values)
    return replace(RECORD, value=mean, values=values, seeds=list(range(len(values))), **changes)


def test_a_difference_is_paired_by_seed():
    """The spread that both share drops out: by hand, differences 0.9, 1.0, 1.1 have 1 ± 4.30265 x 0.1 / sqrt(3)."""
    teacher, student = of_seeds([1.0, 5.0, 9.0], role="teacher"), of_seeds([1.9, 6.0, 10.1])
    gap = difference(student, teacher)
    assert (gap.value, gap.half_width) == (pytest.approx(1.0), pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-5))
    assert gap.decides
    assert difference(replace(student, seeds=[0, 2, 1]), teacher) is None  # other noise
    assert difference(student, replace(teacher, values=[])) is None
    assert difference(of_seeds([2.0]), of_seeds([1.0])) is None


def test_agreement_is_no_certainty():
    """Wilson: nobody of 3 x 500 pairs, or of 500 references, was seen to differ."""
    for metric, pairs in (("accuracy", 1500), ("recall", 500)):
        a = of_seeds([90.0, 92.0, 91.0], metric=metric, items=500)
        gap = difference(a, replace(a, role="teacher"))
        assert gap.value == 0 and not gap.decides
        assert gap.low == -gap.high == pytest.approx(-100 * 3.841459 / (pairs + 3.841459), rel=1e-6)
    a = of_seeds([0.5, 0.7, 0.9])
    assert difference(a, a).half_width == 0  # the same pictures have the same distance


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [(0.83, 0.16, "+0.8 ± 0.2"), (-0.83, 0.16, "-0.8 ± 0.2"), (0.01, 0.3, "0.0 ± 0.3"), (-0.01, 0.3, "0.0 ± 0.3"),
     (0.0, 0.0, "0 ± 0"), (12.0, 30.0, "+10 ± 30")],
)  # fmt: skip
def test_differences_have_signs_and_supported_digits(value, half, text):
    assert format_difference(Interval(value, value - half, value + half, "student-t", 3)) == text


def test_the_long_run_is_whom_students_are_held_against():
    few, long = (of_seeds([3.0, 3.1], role="teacher", subject="T", steps=k) for k in (1, 50))
    student, other = of_seeds([4.0, 4.2]), replace(RECORD, subject="old", seeds=[0, 1])
    rows = table_rows([few, replace(long, values=[1.0, 1.1]), student, other])
    assert quoted_teacher(rows).steps == 50 and quoted_teacher(rows[2:]) is None
    assert {i: gap.value for i, gap in differences(rows, "fd").items()} == {2: pytest.approx(3.05)}
    assert differences(rows[2:], "fd") == {}


def test_a_table_of_differences_by_hand():
    teacher = of_seeds([1.0, 1.2], subject="T", role="teacher", steps=50, sampler="ddim")
    worse, even = of_seeds([2.0, 2.21], subject="A|B"), of_seeds([1.0, 1.21], subject="C", steps=4)
    recall = of_seeds([90.0, 91.0], subject="C", steps=4, metric="recall")
    assert difference_table([teacher, worse, even, recall], ["fd", "recall"]).splitlines() == [
        "Students minus teacher (50 steps, ddim) on the same noise, ± half width of the paired 95 % interval over "
        "sampling seeds; bold: the interval leaves zero out.",
        "",
        "| subject | steps | FD % ↓ |",
        "| --- | ---: | ---: |",
        "| A\\|B | 1 | **+1.00 ± 0.07** |",
        "| C | 4 | 0.00 ± 0.07 |",
    ]
    assert difference_table([worse, even], ["fd"]) == ""
    assert brief_table([teacher, worse]).count("\n\n") == 2 and brief_table([worse]).count("\n\n") == 0
