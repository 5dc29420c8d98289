"""Records: intervals, digits shown, files that are whole or untouched, and what may share a table."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stepdistill.evaluation import records as module
from stepdistill.evaluation.records import (
    Record,
    check_same_protocol,
    load_records,
    mean_and_ci95,
    records_from_scores,
    save_records,
)
from stepdistill.evaluation.tables import best_students, format_value, markdown_table, table_rows

RECORD = Record(
    subject="KD | DMD2",
    role="student",
    method="dmd2",
    sampler="renoise",
    steps=1,
    nfe=1,
    guidance=1.0,
    metric="fd",
    value=0.2,
    ci95=0.01,
    n=5000,
    seeds=[0, 1, 2],
    extractor_sha256="a" * 64,
    reference_sha256="b" * 64,
    resize="none",
    versions={"torch": "2.6.0"},
    device="cpu",
    date="2025-01-31",
)


def scored(**changes) -> list[Record]:
    fields = {
        "subject": "KD",
        "role": "student",
        "method": "kd",
        "sampler": "renoise",
        "steps": 1,
        "nfe": 1,
        "scores_per_seed": [{"fd": 1.0, "recall": 90.0}, {"fd": 2.0, "recall": 91.0}, {"fd": 3.0, "recall": 92.0}],
        "seeds": (5, 6, 7),
        "n": 5000,
        "extractor_sha256": "a" * 64,
        "reference_sha256": "b" * 64,
        "resize": "none",
        "device": "cpu",
    }
    return records_from_scores(**fields | changes)


# Intervals


def test_interval_is_student_t_by_hand():
    """1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    assert mean_and_ci95([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.484138, abs=1e-6))
    # Two values: t(0.975, 1) = 12.7062, s = sqrt(2) / 2, so 12.7062 / 2.
    assert mean_and_ci95([0.0, 1.0]) == (0.5, pytest.approx(6.3531, abs=1e-4))


def test_one_seed_has_no_interval():
    assert mean_and_ci95([3.5]) == (3.5, None)


def test_scores_become_one_record_per_metric():
    fd, recall = scored()
    assert (fd.metric, fd.value, fd.seeds, fd.n) == ("fd", 2.0, [5, 6, 7], 5000)
    assert fd.ci95 == pytest.approx(2.484138, abs=1e-6)
    assert (recall.metric, recall.value) == ("recall", 91.0)
    assert fd.versions["torch"] and fd.guidance == 1 and len(fd.date) == 10


def test_scores_and_seeds_must_match():
    with pytest.raises(ValueError, match="one entry per seed, got 3 for 2"):
        scored(seeds=(0, 1))
    with pytest.raises(ValueError, match=r"seed 6 has metrics \['fd'\]"):
        scored(scores_per_seed=[{"fd": 1.0, "pix": 1.0}, {"fd": 1.0}, {"fd": 1.0, "pix": 1.0}])
    with pytest.raises(ValueError, match="finite"):
        scored(scores_per_seed=[{"fd": 1.0}, {"fd": math.nan}, {"fd": 1.0}])


# Digits shown


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


# Validation


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subject", ""),
        ("subject", None),
        ("role", "critic"),
        ("role", ["teacher"]),
        ("steps", 0),
        ("steps", 1.0),
        ("nfe", True),
        ("guidance", "1"),
        ("value", math.nan),
        ("value", "0.2"),
        ("ci95", -1.0),
        ("ci95", math.inf),
        ("seeds", []),
        ("seeds", [0, 0]),
        ("seeds", (0, 1)),
        ("seeds", ["0"]),
        ("extractor_sha256", "abc"),
        ("reference_sha256", "B" * 64),
        ("versions", {"torch": 2}),
        ("versions", []),
        ("date", "yesterday"),
        ("date", 20250131),
    ],
)
def test_an_impossible_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*got") as error:
        replace(RECORD, **{field: value})
    assert "\n" not in str(error.value)


# Files


def test_records_survive_the_round_trip(tmp_path):
    timing = replace(RECORD, metric="seconds_per_image", ci95=None, extractor_sha256=None, reference_sha256=None)
    path = tmp_path / "new" / "results.json"
    save_records(path, [RECORD, timing])
    assert load_records(path) == [RECORD, timing]
    assert json.loads(path.read_text())[0] == asdict(RECORD)
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    save_records(path, [])
    assert load_records(path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "results.json"
    save_records(path, [RECORD])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="no space"):
            save_records(path, [RECORD, RECORD])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_the_new_file_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"replace {Path(b).name}"), rename(a, b)))
    save_records(tmp_path / "results.json", [RECORD])
    assert calls[:2] == ["fsync", "replace results.json"]


def without(name: str) -> list[dict]:
    return [{key: value for key, value in asdict(RECORD).items() if key != name}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('[{"subject": ', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("{}", "must hold a list of records, got dict"),
        ("[1]", "record 0 must be an object, got int"),
        (json.dumps([asdict(RECORD), *without("n")]), "record 1 lacks the field 'n'"),
        (json.dumps([asdict(RECORD) | {"fid": 3}]), "record 0 has the unknown field 'fid'"),
        (json.dumps([asdict(RECORD) | {"steps": "4"}]), "record 0: steps must be an integer >= 1, got '4'"),
        (json.dumps([asdict(RECORD) | {"value": math.nan}]), "record 0: value must be a finite number, got nan"),
    ],
)
def test_broken_files_get_one_clear_line(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"results\.json") as error:
        load_records(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results at .*results\.json"):
        load_records(tmp_path / "results.json")


# What may stand in one table


@pytest.mark.parametrize(
    ("field", "other"),
    [("n", 2000), ("extractor_sha256", "c" * 64), ("reference_sha256", None), ("resize", "bicubic")],
)
def test_different_protocols_do_not_share_a_table(field, other):
    """Frechet distances fall with the number of samples: 2000 against 5000 is no comparison."""
    alike, changed = replace(RECORD, subject="PD"), replace(RECORD, subject="CD", **{field: other})
    check_same_protocol([RECORD, alike])
    with pytest.raises(ValueError, match=f"fd of .*KD.* and 'CD' cannot be compared: {field} differs"):
        check_same_protocol([RECORD, alike, changed])
    with pytest.raises(ValueError, match=field):
        markdown_table([RECORD, changed], ["fd"])


def test_protocols_are_compared_metric_by_metric():
    timing = replace(RECORD, metric="seconds_per_image", n=64, extractor_sha256=None)
    check_same_protocol([RECORD, timing])


def test_seconds_of_two_devices_do_not_compare():
    timing = replace(RECORD, metric="seconds_per_image")
    with pytest.raises(ValueError, match=r"device differs \(cpu and cuda\)"):
        check_same_protocol([timing, replace(timing, subject="PD", device="cuda")])
    check_same_protocol([RECORD, replace(RECORD, subject="PD", device="cuda")])


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


def test_device_name_tells_threads_apart(monkeypatch):
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 3)
    assert module.device_name("cpu").startswith("cpu ") and "3 thread" in module.device_name("cpu")
