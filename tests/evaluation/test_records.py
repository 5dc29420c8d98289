"""Records: intervals, digits shown, files that are whole or untouched, and what may share a table."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from stepdistill.evaluation import records as module
from stepdistill.evaluation.intervals import wilson_interval
from stepdistill.evaluation.records import (
    Record,
    check_same_protocol,
    differing_versions,
    interval_of,
    load_records,
    mean_and_ci95,
    records_from_scores,
    save_records,
)
from stepdistill.evaluation.tables import markdown_table

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
        ("values", [1.0]),
        ("values", [1.0, 2.0, math.nan]),
        ("items", 0),
        ("dtype", ""),
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
    [
        ("n", 2000),
        ("extractor_sha256", "c" * 64),
        ("reference_sha256", None),
        ("resize", "bicubic"),
        ("dtype", "bfloat16"),
    ],
)
def test_different_protocols_do_not_share_a_table(field, other):
    """Frechet distances fall with the number of samples: 2000 against 5000 is no comparison."""
    alike, changed = replace(RECORD, subject="PD"), replace(RECORD, subject="CD", **{field: other})
    check_same_protocol([RECORD, alike])
    with pytest.raises(ValueError, match=f"fd of .*KD.* and 'CD' cannot be compared: {field} differs"):
        check_same_protocol([RECORD, alike, changed])
    with pytest.raises(ValueError, match=field):
        markdown_table([RECORD, changed], ["fd"])


@pytest.mark.parametrize(
    ("metric", "percent", "items", "half"),
    [
        # n of n right: Wilson's lower end is n / (n + z^2), z = 1.95996
        ("accuracy", 100.0, 1000, 100 * 3.841459 / (3000 + 3.841459)),
        ("precision_k3", 0.0, 200, 100 * 3.841459 / (600 + 3.841459)),
        ("accuracy_shape", 100.0, 50, 100 * 3.841459 / (150 + 3.841459)),
        # the same references in every seed: those of one are all there are
        ("recall", 100.0, 1000, 100 * 3.841459 / (1000 + 3.841459)),
        ("coverage", 50.0, 1000, 100 * 3.841459 / (1000 + 3.841459)),
        # no percentage that counts, or nobody says what
        ("density", 100.0, 1000, 0.0),
        ("accuracy", 100.0, None, 0.0),
    ],
)
def test_seeds_that_agree_leave_what_their_counts_leave(metric, percent, items, half):
    assert interval_of(metric, [percent] * 3, items) == (percent, pytest.approx(half, rel=1e-6))


def test_percentages_that_count_have_the_intervals_of_their_kind():
    half = interval_of("accuracy", [80.0, 90.0, 100.0], 50)[1]
    wilson = wilson_interval(135, 150)
    assert half == pytest.approx(100 * max(wilson.high - 0.9, 0.9 - wilson.low))
    assert interval_of("alignment", [90.0], 150)[1] == pytest.approx(half)  # one seed will do: images are draws
    assert interval_of("recall", [80.0, 90.0, 100.0], 50) == mean_and_ci95([80.0, 90.0, 100.0])
    assert interval_of("recall", [90.0], 150) == (90.0, None)
    with pytest.raises(ValueError, match=r"accuracy must be percentages from 0 to 100, got \[101\]"):
        interval_of("accuracy", [101], 50)


def test_records_keep_what_paired_comparisons_need(tmp_path):
    fd, recall = scored(items=1437, dtype="bfloat16")
    assert (fd.values, fd.items, recall.values, recall.items) == ([1, 2, 3], None, [90, 91, 92], 1437)
    assert fd.dtype == "bfloat16"
    old = asdict(RECORD)
    for name in ("values", "items", "dtype"):
        del old[name]
    (tmp_path / "results.json").write_text(json.dumps([old]))
    assert load_records(tmp_path / "results.json") == [RECORD]


def test_versions_may_differ_and_are_named():
    other = replace(RECORD, subject="PD", versions={"torch": "2.7.0", "numpy": "2"})
    check_same_protocol([RECORD, other])
    assert differing_versions([RECORD, other, other]) == ["torch 2.6.0 and 2.7.0"]
    assert differing_versions([other, other]) == []
    named = module.installed_versions()
    assert {"open_clip_torch", "transformers", "scipy", "pillow", "torch", "diffusers"} <= set(named)
    assert named["torch"] == torch.__version__.partition("+")[0] or named["torch"] == torch.__version__


def test_protocols_are_compared_metric_by_metric():
    timing = replace(RECORD, metric="seconds_per_image", n=64, extractor_sha256=None)
    check_same_protocol([RECORD, timing])


def test_seconds_of_two_devices_do_not_compare():
    timing = replace(RECORD, metric="seconds_per_image")
    with pytest.raises(ValueError, match=r"device differs \(cpu and cuda\)"):
        check_same_protocol([timing, replace(timing, subject="PD", device="cuda")])
    check_same_protocol([RECORD, replace(RECORD, subject="PD", device="cuda")])


def test_device_name_tells_threads_apart(monkeypatch):
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 3)
    assert module.device_name("cpu").startswith("cpu ") and "3 thread" in module.device_name("cpu")
