"""Train every digits recipe with several seeds, measure all of them on one protocol, write the tables and figures.

    python eval/digits.py [--recipes digits_kd ...] [--seeds 0 1 2] [--jobs 2]

Writes ``eval/digits/results.json`` (one record per recipe or stage, seed and metric), ``table.md`` (medians over
training seeds, drawn from the records), ``quality.svg`` and ``samples.png``. Runs lie under ``runs/eval``; those that
are finished are not run again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from common import RUNS, SPREAD, Measured, put_into_readme, run_all, table

from stepdistill.build import guided, open_teacher
from stepdistill.distill import side_by_side
from stepdistill.evaluation.grids import image_grid
from stepdistill.evaluation.plots import quality_plot
from stepdistill.evaluation.records import Record, save_records
from stepdistill.export import load_student
from stepdistill.recipe import Teacher

HERE = Path(__file__).resolve().parent / "digits"
METRICS = ("fd", "pix", "precision", "recall", "coverage", "accuracy")
TEACHER = Teacher("bundled:digits")
TEACHER_STEPS = (1, 2, 4, 8, 16, 50)


@dataclass(frozen=True)
class Arguments:
    """The published figures of the digits benchmark."""

    recipes: tuple[str, ...] = (
        "digits_best@1",
        "digits_best@2",
        "digits_best@4",
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
    runs: Path = RUNS
    """Where the runs lie."""
    out: Path = HERE
    """Where results go."""


def medians(records: list[Record]) -> list[Record]:
    """What the plot shows: of each recipe and step count the run whose FD is the median over seeds.

    Stages of a chain of the same method share its name; variants and warm starts stand in the table only.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        method = r.subject.partition(" #")[0].partition(",")[0].partition("@")[0].removeprefix("digits_")
        warm = ", after" in r.subject and ("quickstart" in method or method == "best")
        if r.metric == "fd" and "/" not in method and not warm:
            groups.setdefault((method, r.steps), []).append(r)
    shown = {}
    for (method, steps), group in groups.items():
        middle = sorted(group, key=lambda r: r.value)[len(group) // 2]
        shown[middle.subject, steps] = method
    return [replace(r, subject=shown[r.subject, r.steps]) for r in records if (r.subject, r.steps) in shown]


def text_of(records: list[Record], n: int) -> str:
    """The table and what it shows."""
    note = (
        f"{SPREAD} n = {n} images, sampling seed 0. fd and pix are Frechet distances in per cent of the real variance, "
        "on classifier features and on pixels; lower is better."
    )
    return f"{table(records, METRICS)}\n{note}\n"


def main(given: Arguments) -> None:
    """Run everything that is not there yet, then write tables and figures."""
    torch.set_num_threads(1)
    how = Measured(given.n, given.runs)
    records = run_all(given.recipes, given.seeds, [TEACHER], TEACHER_STEPS, how, given.jobs)
    save_records(given.out / "results.json", records)
    text = text_of(records, given.n)
    (given.out / "table.md").write_text(text)
    if given.out == HERE:
        put_into_readme("table", text)
    print(text)
    quality_plot([r for r in medians(records) if r.metric in METRICS], given.out / "quality.svg")
    quick = [name for name in given.recipes if "quickstart" in name and "/" not in name]
    students = [(name, load_student(given.runs / name / f"seed{given.seeds[0]}" / "pipeline")) for name in quick]
    if students:
        opened = open_teacher(TEACHER)
        grids = side_by_side(students, opened, guided(opened, TEACHER))
        wanted = [grids[0], *grids[1:]]
        images = torch.cat([torch.cat([g.images[:20], torch.full_like(g.images[:10], 255)]) for g in wanted])
        image_grid(images[:-10], 10, scale=6).save(given.out / "samples.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
