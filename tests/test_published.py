"""Numbers in README come from stored records."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from stepdistill.evaluation.records import load_records, mean_and_ci95
from stepdistill.evaluation.tables import format_value

ROOT = Path(__file__).parents[1]


def rows(name: str) -> list[list[str]]:
    """The cells of a generated table in README.md, without head and rule."""
    text = (ROOT / "README.md").read_text()
    block = text.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")][2:]


def test_the_results_table_holds_the_records() -> None:
    values: dict[tuple[str, str, str], list[float]] = {}
    for r in load_records(ROOT / "eval" / "digits" / "results.json"):
        values.setdefault((r.subject.split(" #")[0], str(r.steps), r.metric), []).append(r.value)
    table = rows("table")
    assert len(table) >= 10
    for subject, steps, _, seeds, fd, pix, precision, *_ in table:
        for metric, cell in (("fd", fd), ("pix", pix), ("precision", precision)):
            stored = values[subject, steps, metric]
            assert len(stored) == int(seeds)
            assert cell == format_value(*mean_and_ci95(stored))


def test_students_have_at_least_three_training_seeds() -> None:
    for subject, _, _, seeds, *_ in rows("table"):
        assert subject == "teacher" or int(seeds) >= 3


def test_the_table_of_methods_holds_the_records() -> None:
    values: dict[tuple[str, int, str], list[float]] = {}
    for r in load_records(ROOT / "eval" / "methods" / "results.json"):
        values.setdefault((r.subject.split("@")[0].removeprefix("digits_"), r.steps, r.metric), []).append(r.value)
    table = rows("methods")
    assert len(table) >= 25
    for method, _, _, _, *cells in table:
        for steps, cell in zip((50,) if "50 steps" in method else (1, 2, 4, 8), cells, strict=False):
            stored = [values.get((method.split(",")[0], steps, metric)) for metric in ("fd", "pix", "recall")]
            assert cell == (" / ".join(format_value(*mean_and_ci95(v)) for v in stored if v))
            assert "teacher" in method or all(len(v) >= 3 for v in stored)  # training seeds


def test_what_is_said_of_methods_and_teacher_is_in_the_records() -> None:
    fd: dict[tuple[str, int], list[float]] = {}
    for r in load_records(ROOT / "eval" / "methods" / "results.json"):
        if r.metric == "fd":
            fd.setdefault((r.subject.split("@")[0].removeprefix("digits_"), r.steps), []).append(r.value)
    readme = (ROOT / "README.md").read_text()
    for steps in (1, 2, 4, 8):
        methods = {m: sum(v) / len(v) for (m, k), v in fd.items() if k == steps and m != "teacher"}
        ratios = sorted(fd["teacher", steps][0] / mean for mean in methods.values())
        half = len(ratios) // 2
        middle = ratios[half] if len(ratios) % 2 else (ratios[half - 1] + ratios[half]) / 2
        twice = f"2 or more in {sum(r >= 2 for r in ratios)} of {len(ratios)} methods"
        assert f"median {middle:.2g}; {twice}; least sds {ratios[0]:.2g}" in readme
    costs = json.loads((ROOT / "eval" / "methods" / "costs.json").read_text())
    spent = [cost["evaluations"] / 1e3 for cost in costs.values()]
    assert f"spends {min(spent):.0f} to {max(spent):.0f} thousand network evaluations" in readme
    for method, _, _, evaluations, *_ in rows("methods")[2:]:
        stages = [s for name, cost in costs.items() if name.startswith(f"digits_{method}@") for s in cost["stages"]]
        ends = sorted({f"{round(s['per_update'], 1):g}" for s in stages}, key=float)
        assert evaluations == " - ".join(dict.fromkeys((ends[0], ends[-1])))


@pytest.mark.parametrize("teacher", ["sd", "sd3"])
def test_the_shapes_tables_hold_the_records(teacher: str) -> None:
    values: dict[tuple[str, str, str], list[float]] = {}
    for r in load_records(ROOT / "eval" / "shapes" / f"{teacher}.json"):
        values.setdefault((r.subject.split(" #")[0], str(r.steps), r.metric), []).append(r.value)
    table = rows(f"shapes-{teacher}")
    assert len(table) >= 6
    for subject, steps, _, seeds, alignment, fd, *_ in table:
        for metric, cell in (("alignment", alignment), ("fd", fd)):
            stored = values[subject, steps, metric]
            assert len(stored) == int(seeds)
            assert cell == format_value(*mean_and_ci95(stored))


def test_the_table_of_negative_prompts_holds_the_records() -> None:
    stored = json.loads((ROOT / "eval" / "shapes" / "negatives.json").read_text())
    table = rows("negatives")
    assert len(table) == len(stored) == 4
    for row, cells in zip(stored, table, strict=True):
        assert cells[:3] == [row["subject"], str(row["steps"]), row["colour"]]
        shares = [float(cell.removesuffix(" %")) for cell in cells[3:]]
        assert shares == [round(100 * row["share"], 1), round(100 * row["share_with_negative"], 1)]


def test_the_teachers_table_holds_their_manifests() -> None:
    table = rows("shapes-teachers")
    assert [cells[0] for cells in table] == ["shapes-sd", "shapes-sd3"]
    for name, *cells in table:
        figures = json.loads((ROOT / "assets" / name / "MANIFEST.json").read_text())["figures"]
        for cell, steps in zip(cells, (50, 4, 1), strict=False):
            assert float(cell.removesuffix(" %")) == round(100 * figures[f"steps_{steps}"]["exact"], 1)


def test_the_backbone_table_holds_the_records() -> None:
    stored = json.loads((ROOT / "eval" / "backbone.json").read_text())["rows"]
    table = rows("backbone")
    assert len(table) == len(stored) > 0
    for row, cells in zip(stored, table, strict=True):
        assert cells[0] == row["network"] and float(cells[4]) == round(row["ratio"], 2)


def test_the_overhead_table_holds_the_records() -> None:
    stored = json.loads((ROOT / "eval" / "overhead.json").read_text())["rows"]
    table = rows("overhead")
    assert len(table) == len(stored) > 0
    for row, cells in zip(stored, table, strict=True):
        assert cells[0] == row["recipe"] and float(cells[3]) == round(row["ratio"], 3)


def test_an_update_of_every_method_costs_little_more_than_its_evaluations() -> None:
    stored = json.loads((ROOT / "eval" / "methods" / "overhead.json").read_text())["rows"]
    ratios = [row["ratio"] for row in stored]
    said = f"the ratio is {statistics.median(ratios):.2f} in the median and {max(ratios):.2f} at most"
    assert said in (ROOT / "README.md").read_text() and len({row["recipe"] for row in stored}) >= 28


def test_the_throughput_of_a_bench_is_that_of_its_sampler() -> None:
    rows = json.loads((ROOT / "eval" / "throughput.json").read_text())["rows"]
    assert rows and all(row["ratio"] >= 0.85 for row in rows)


def test_the_latency_table_holds_the_records() -> None:
    stored = json.loads((ROOT / "eval" / "latency.json").read_text())["rows"]
    table = rows("latency")
    assert len(table) == len(stored) > 0
    for row, cells in zip(stored, table, strict=True):
        assert cells[:4] == [row["student"], str(row["steps"]), str(row["batch"]), row["compile"]]
        assert cells[4:6] == [f"{row[k]['p50']:.1f} ({row[k]['p95']:.1f})" for k in ("diffusers", "ours")]
        ratios = [row["speedup"], row["speedup_new_prompts"], row["over_bare"], row["diffusers_over_bare"]]
        assert [float(cell) for cell in cells[6:]] == [round(r, d) for r, d in zip(ratios, (2, 2, 3, 2), strict=True)]


def test_plans_are_within_a_tenth_of_what_was_measured() -> None:
    stored = json.loads((ROOT / "eval" / "memory.json").read_text())
    pairs = [*stored["bundled"], *stored["cut_down"]]
    pairs += [row[how] for row in stored["shared"] for how in ("three_networks", "shared")]
    off = max(abs(row["planned"] / row["measured"] - 1) for row in pairs)
    assert len(pairs) >= 19 and off < 0.1
    assert f"within {100 * off:.1f} % of what torch's CPU allocator" in (ROOT / "README.md").read_text()


def test_the_memory_table_holds_the_records() -> None:
    stored = json.loads((ROOT / "eval" / "memory.json").read_text())
    measured = [row[how]["measured"] / 2**20 for row in stored["shared"] for how in ("three_networks", "shared")]
    planned = [row["peak"] / 2**30 for row in stored["real"]]
    table = rows("memory")
    assert [cells[2] for cells in table] == [f"{n:.0f} MiB" for n in measured] + [f"{n:.1f} GiB" for n in planned]
    assert all(sum(row["parts"].values()) == row["peak"] for row in stored["real"])
    three, shared = (
        next(row["peak"] for row in stored["real"] if (row["teacher"], row["variant"]) == ("sdxl", how))
        for how in ("three full networks", "shared backbone")
    )
    assert ["sdxl, planned", "shared backbone", f"{shared / 2**30:.1f} GiB", f"{shared / three:.2f}"] in table
