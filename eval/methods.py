"""Every method on the bundled digits teacher under one budget of network evaluations: one table, one page of plots.

    python eval/methods.py [--methods cd pcm ...] [--steps 1 2 4 8] [--seeds 0 1 2] [--jobs 2] [--finished]

A method's row holds its recipe ``digits_METHOD@K`` for each number of steps K that it serves, trained for that K from
the teacher's weights, with its updates scaled to the one budget (``common.BUDGET``; data made by the teacher count
towards it). A student that learns every time, or halves its steps stage by stage, is trained once for all. Writes
``eval/methods/results.json``, ``costs.json``, ``table.md``, and a plot for each family. Runs lie under ``runs/eval``,
and those that are finished are not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import ALL_STEPS, RUNS, SPREAD, Measured, cell, put_into_readme, recipe_of, run_all, teacher_records

import stepdistill.objectives  # noqa: F401 (fills the registry)
from stepdistill.evaluation.plots import quality_plot
from stepdistill.evaluation.records import Record, check_same_protocol, load_records, save_records
from stepdistill.objective import registered
from stepdistill.plan import plan
from stepdistill.recipe import Teacher
from stepdistill.recipes import find

HERE = Path(__file__).resolve().parent / "methods"
TEACHER = Teacher("bundled:digits")
TEACHER_STEPS = (1, 2, 4, 8, 16, 50)
METRICS = ("fd", "pix", "precision", "recall", "coverage", "accuracy")
METHODS = tuple(
    name
    for name, cls in sorted(registered().items(), key=lambda item: (item[1].family, item[0]))
    if cls.__module__.startswith("stepdistill.objectives.") and name != "guided"  # whose students take as many steps
)

LEARN_EVERY_TIME = ("cd", "ct", "ect", "ict", "lcm", "scm", "mdt", "twinflow", "reflow")
"""One student for every number of steps: the few-step grid is no part of what it is trained on."""


@dataclass(frozen=True)
class Arguments:
    """The table of methods."""

    methods: tuple[str, ...] = METHODS
    """Registered names."""
    steps: tuple[int, ...] = (1, 4, 2, 8)
    """Student steps, in the order in which they are run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds. Samples are drawn with seed 0 throughout."""
    jobs: int = 2
    """Processes, one thread each."""
    n: int = 5000
    """Images per evaluation."""
    finished: bool = False
    """Run nothing; write what the finished runs give."""
    runs: Path = RUNS
    """Where the runs lie."""
    out: Path = HERE
    """Where results go."""


def served(methods: Sequence[str], steps: Sequence[int]) -> list[str]:
    """The runs that cover every number of steps that a method accepts, all methods of a number together."""
    names, covered = [], set()
    for k in sorted(steps, key=lambda k: k != 1):  # a chain that ends at one step passes through others
        for method in methods:
            every = method in LEARN_EVERY_TIME
            name = f"digits_{method}@{max(ALL_STEPS) if every else k}"
            try:
                recipe = find(name)
            except ValueError as refused:
                print(f"left out: {refused}")
                continue
            if (method, k) not in covered:
                names.append(f"{name}/budget-all" if every else f"{name}/budget")
                own = [s.sampler.steps for s in recipe.stages() if type(s.objective) is type(recipe.objective)]
                covered |= {(method, j) for j in (ALL_STEPS if every else own)}
    return names


def main(given: Arguments) -> None:
    """Run everything that is not there yet, then write tables and figures."""
    torch.set_num_threads(1)
    how = Measured(given.n, given.runs)
    names = served(given.methods, given.steps)
    if given.finished:
        records = teacher_records(TEACHER, TEACHER_STEPS, how)
        folders = [given.runs / name.replace("/", "-") / f"seed{seed}" for name in names for seed in given.seeds]
        for path in (folder / f"records-{given.n}.json" for folder in folders):
            records += load_records(path) if path.is_file() else []
    else:
        records = run_all(names, given.seeds, [TEACHER], TEACHER_STEPS, how, given.jobs)
    records = [r for r in records if ", after " not in r.subject or r.method == registered_as(r).__name__]
    given.out.mkdir(parents=True, exist_ok=True)
    save_records(given.out / "results.json", records)
    trained = [name for name in names if any(r.subject.startswith(f"{name} #") for r in records)]
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        costs = dict(zip(trained, pool.map(cost_of, trained), strict=True))
    (given.out / "costs.json").write_text(json.dumps(costs, indent=1) + "\n")
    values = gathered(records)
    short, full = overview(values, costs), everything(values, costs)
    (given.out / "table.md").write_text(f"{short}\n{full}")
    if given.out == HERE:
        put_into_readme("methods", short)
    print(short)
    plots(records, given.out)


def registered_as(record: Record) -> type:
    """The objective of a row, which a chain's earlier stages may share or not."""
    if record.role == "teacher":
        return object
    return registered()[record.subject.partition("@")[0].removeprefix("digits_")]


def cost_of(name: str) -> dict[str, Any]:
    """Of a recipe: evaluations in all, those that its data take, and the plans of its stages."""
    torch.set_num_threads(1)
    stages = plan(recipe_of(name), memory=True)
    return {
        "evaluations": sum(s.evaluations for s in stages),
        "data_evaluations": sum(s.data for s in stages),
        "stages": [asdict(s) for s in stages],
    }


def stages_of(method: str, costs: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Plans of all stages that a method's runs have."""
    return [s for name, c in costs.items() if name.startswith(f"digits_{method}@") for s in c["stages"]]


def gathered(records: Sequence[Record]) -> dict[tuple[str, int], dict[str, list[float]]]:
    """(method or teacher, steps) -> metric -> one value per training seed."""
    check_same_protocol([r for r in records if r.metric in METRICS])
    values: dict[tuple[str, int], dict[str, list[float]]] = {}
    for r in records:
        method = r.subject.partition("@")[0].removeprefix("digits_")
        values.setdefault((method, r.steps), {}).setdefault(r.metric, []).append(r.value)
    return values


def overview(values: Mapping[tuple[str, int], Mapping[str, list[float]]], costs: Mapping[str, dict[str, Any]]) -> str:
    """One line per method: what it costs, and FD (pixel FD, recall) at each number of steps."""
    ks = (1, 2, 4, 8)
    head = ["method", "family", "data", "evaluations per sample", *(f"{k} step{'s' * (k > 1)}" for k in ks)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    teacher = [_cell(values.get(("teacher", k))) for k in ks]
    lines.append("| teacher | | | | " + " | ".join(teacher) + " |")
    lines.append(f"| teacher, 50 steps | | | | {_cell(values[('teacher', 50)])} | | | |")
    for method in METHODS:
        cells = [_cell(values.get((method, k))) for k in ks]
        if any(cells):
            cls = registered()[method]
            data = ", ".join(sorted(cls().data)) or "none"
            per_update = sorted({round(s["per_update"], 1) for s in stages_of(method, costs)})
            spread = f"{per_update[0]:g}" if len(per_update) == 1 else f"{per_update[0]:g} - {per_update[-1]:g}"
            lines.append(f"| {method} | {cls.family} | {data} | {spread} | " + " | ".join(cells) + " |")
    runs = [c["evaluations"] for c in costs.values()]
    spent = dict.fromkeys(f"{n / 1e3:.0f}" for n in (min(runs), max(runs)))
    note = (
        f"FD % / pixel FD % / recall %. {SPREAD} Every run starts from the teacher's weights and spends "
        f"{' to '.join(spent)} thousand network evaluations of one sample, making its data included; a backward pass "
        "counts as two."
    )
    return "\n".join([*lines, "", note, "", against_teacher(values)]) + "\n"


def against_teacher(values: Mapping[tuple[str, int], Mapping[str, list[float]]]) -> str:
    """By how much the methods beat the teacher's sampler at equal steps."""
    lines = ["The teacher's FD over a method's at equal steps:"]
    for k in (1, 2, 4, 8):
        ratios = {
            method: values["teacher", k]["fd"][0] / statistics.mean(values[method, k]["fd"])
            for method in METHODS
            if (method, k) in values
        }
        least = sorted(ratios, key=lambda method: ratios[method])[:2]
        worst = ", ".join(f"{method} {ratios[method]:.2g}" for method in least)
        lines.append(
            f"- {k} step{'s' * (k > 1)}: median {statistics.median(ratios.values()):.2g}; 2 or more in "
            f"{sum(r >= 2 for r in ratios.values())} of {len(ratios)} methods; least {worst}."
        )
    return "\n".join([lines[0], "", *lines[1:]])


def _cell(values: Mapping[str, list[float]] | None) -> str:
    if not values:
        return ""
    return " / ".join(cell(values[metric]) for metric in ("fd", "pix", "recall"))


def everything(values: Mapping[tuple[str, int], Mapping[str, list[float]]], costs: Mapping[str, dict[str, Any]]) -> str:
    """All metrics and costs, one line per method and number of steps."""
    head = ["method", "steps", "seeds", *METRICS, "seconds", "evaluations per update", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (method, steps), metrics in values.items():
        cells = [method, str(steps), str(len(metrics["fd"])), *(cell(metrics[metric]) for metric in METRICS)]
        stages = stages_of(method, costs)
        if stages:  # of a student for every number of steps there is one alone
            stage = next((s for s in stages if s["steps"] == steps), stages[0])
            whole = values[method, max(ALL_STEPS)] if method in LEARN_EVERY_TIME else metrics
            seconds = whole.get("training_seconds", [])  # a chain's stand at its last stage
            cells.append(f"{statistics.median(seconds):.0f}" if seconds else "")
            cells += [f"{stage['per_update'] * stage['batch']:.0f}", f"{stage['memory']['peak'] / 1e6:.0f}"]
        lines.append("| " + " | ".join(cells) + " |" * (1 + len(head) - len(cells)))
    return "\n".join(lines) + "\n"


def plots(records: Sequence[Record], out: Path) -> None:
    """FD and pixel FD against steps, the teacher and one family in each picture; medians over training seeds."""
    middle: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        if r.metric == "fd":
            middle.setdefault((r.subject.partition(" #")[0], r.steps), []).append(r)
    medians = (sorted(g, key=lambda r: r.value)[len(g) // 2] for g in middle.values())
    chosen = {(r.subject, r.steps) for r in medians}
    for family in sorted({registered()[m].family for m in METHODS}):
        wanted = {"teacher", *(m for m in METHODS if registered()[m].family == family)}
        shown = [
            replace(r, subject=r.subject.partition("@")[0].removeprefix("digits_"))
            for r in records
            if (r.subject, r.steps) in chosen and r.metric in METRICS
        ]
        shown = [r for r in shown if r.subject in wanted]
        if any(r.role == "student" for r in shown):
            quality_plot(shown, out / f"{family}.svg")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
