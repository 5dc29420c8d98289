"""Train every digits recipe with several seeds, measure all of them on one protocol, write the tables and figures.

    python eval/digits.py [--recipes digits_kd ...] [--seeds 0 1 2] [--jobs 2]

Writes ``eval/digits/results.json`` (one record per recipe or stage, seed and metric), ``table.md`` (medians over
training seeds, drawn from the records), ``quality.svg`` and ``samples.png``. Runs lie under ``runs/eval``; those that
are finished are not run again.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from common import put_into_readme, recipe_of

from stepdistill.build import open_teacher
from stepdistill.distill import distill, side_by_side
from stepdistill.evaluation.benchmark import bench_student, bench_teacher
from stepdistill.evaluation.digits import DigitsEvaluator
from stepdistill.evaluation.records import Record, check_same_protocol, load_records, save_records
from stepdistill.evaluation.report import image_grid, quality_plot
from stepdistill.export import load_student
from stepdistill.models.denoiser import Guided
from stepdistill.recipe import Teacher

HERE = Path(__file__).resolve().parent / "digits"
METRICS = ("fd", "pix", "precision", "recall", "coverage", "accuracy")
TEACHER_STEPS = (1, 2, 4, 8, 16, 50)


@dataclass(frozen=True)
class Arguments:
    """The published figures of the digits benchmark."""

    recipes: tuple[str, ...] = (
        "digits_quickstart_1step",
        "digits_quickstart_1step/no-gan",
        "digits_quickstart_4step",
        "digits_dmd2",
        "digits_dmd2/no-gan",
        "digits_dmd2/no-gan-equal-cost",
        "digits_dmd2_4step",
        "digits_cd",
        "digits_tscd",
        "digits_ladd",
    )
    """Recipes under train/; see ``common.recipe_of`` for variants."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds. Samples are drawn with seed 0 throughout."""
    jobs: int = 2
    """Processes, one thread each."""
    n: int = 5000
    """Images per evaluation."""
    runs: Path = field(default_factory=lambda: HERE.parents[1] / "runs" / "eval")
    """Where the runs lie."""
    out: Path = HERE
    """Where results go."""


def run_one(name: str, seed: int, given: Arguments) -> list[Record]:
    """Train one recipe with one seed and measure its student, and those of its stages; records are kept."""
    torch.set_num_threads(1)
    out = given.runs / name.replace("/", "-") / f"seed{seed}"
    stored = out / f"records-{given.n}.json"
    if stored.is_file():
        return load_records(stored)
    recipe = recipe_of(name, seed)
    anew, start = not out.exists(), time.monotonic()
    done = distill(recipe, out, resume=out.exists())
    seconds = time.monotonic() - start
    evaluator = DigitsEvaluator(n=given.n)
    students = {name: (recipe, done.student)}
    for stage, folder in zip(recipe.stages(), sorted((out / "stages").glob("*")), strict=False):
        student = load_student(folder / "pipeline")  # each stage is a student of its own
        label = f"{type(stage.objective).__name__}, {student.sampler.steps} step{'s' * (student.sampler.steps > 1)}"
        students[f"{name}, after {label}"] = (stage, student)
    records = []
    for title, (stage, student) in students.items():
        method = type(stage.objective).__name__
        records += bench_student(student, done.opened, evaluator, [0], subject=f"{title} #{seed}", method=method)
    if anew:  # otherwise part of the time was spent in an earlier call
        none = {"extractor_sha256": None, "reference_sha256": None}
        records.append(dataclasses.replace(records[0], metric="training_seconds", value=seconds, **none))
    save_records(stored, records)
    return records


def table(records: list[Record]) -> str:
    """Medians over training seeds, lowest and highest beside them; the teacher's rows have one value."""
    check_same_protocol([r for r in records if r.metric in METRICS])
    rows: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for r in records:
        key = (r.subject.split(" #")[0], r.steps, r.sampler)
        rows.setdefault(key, {}).setdefault(r.metric, []).append(r.value)
    head = ["subject", "steps", "sampler", "seeds", *METRICS]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (subject, steps, sampler), values in rows.items():
        cells = [subject, str(steps), sampler, str(len(values["fd"]))]
        for metric in METRICS:
            digits = 3 if metric in ("fd", "pix") else 1
            v = values[metric]
            spread = f" ({min(v):.{digits}f} - {max(v):.{digits}f})" if len(v) > 1 else ""
            cells.append(f"{statistics.median(v):.{digits}f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    n = next(r.n for r in records if r.metric == "fd")
    note = (
        f"Median over training seeds (lowest - highest), n = {n} images, sampling seed 0. fd and pix are Frechet "
        "distances in per cent of the real variance, on classifier features and on pixels; lower is better."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def medians(records: list[Record]) -> list[Record]:
    """What the plot shows: of each recipe and step count the run whose FD is the median over seeds.

    Stages of a chain of the same method share its name; variants and warm starts stand in the table only.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        method = r.subject.partition(" #")[0].partition(",")[0].removeprefix("digits_")
        if r.metric == "fd" and "/" not in method and not ("quickstart" in method and ", after" in r.subject):
            groups.setdefault((method, r.steps), []).append(r)
    shown = {}
    for (method, steps), group in groups.items():
        middle = sorted(group, key=lambda r: r.value)[len(group) // 2]
        shown[middle.subject, steps] = method
    return [replace(r, subject=shown[r.subject, r.steps]) for r in records if (r.subject, r.steps) in shown]


def main(given: Arguments) -> None:
    """Run everything that is not there yet, then write tables and figures."""
    torch.set_num_threads(1)
    opened = open_teacher(Teacher("bundled:digits"))
    teacher = Guided(opened.denoiser)
    teacher_rows = given.runs / f"teacher-{given.n}.json"
    jobs = [(name, seed) for seed in given.seeds for name in given.recipes]
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(run_one, name, seed, given) for name, seed in jobs]
        if not teacher_rows.is_file():
            save_records(teacher_rows, bench_teacher(teacher, opened, DigitsEvaluator(given.n), TEACHER_STEPS, [0]))
        found = {job: future.result() for job, future in zip(jobs, pending, strict=True)}
    records = load_records(teacher_rows)
    for name in given.recipes:
        for seed in given.seeds:
            records += found[name, seed]
    save_records(given.out / "results.json", records)
    (given.out / "table.md").write_text(table(records))
    if given.out == HERE:
        put_into_readme("table", table(records))
    print(table(records))
    quality_plot([r for r in medians(records) if r.metric in METRICS], given.out / "quality.svg")
    quick = [name for name in given.recipes if "quickstart" in name and "/" not in name]
    students = [(name, load_student(given.runs / name / f"seed{given.seeds[0]}" / "pipeline")) for name in quick]
    if students:
        grids = side_by_side(students, opened, teacher)
        wanted = [grids[0], *grids[1:]]
        images = torch.cat([torch.cat([g.images[:20], torch.full_like(g.images[:10], 255)]) for g in wanted])
        image_grid(images[:-10], 10, scale=6).save(given.out / "samples.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
