"""Train the recipes on the bundled text-to-image teachers, measure them beside their teachers, write the tables.

    python eval/shapes.py [--teacher sd] [--seeds 0] [--jobs 2]

Writes ``eval/shapes/TEACHER.json`` (one record per recipe, seed and metric), ``TEACHER.md`` and ``TEACHER.png``: the
same captions and noise through the teacher at 50 steps, the teacher at the students' steps, and the students. Runs lie
under ``runs/eval``; those that are finished are not run again. ``negatives.json`` says what negative prompts do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from common import RUNS, SPREAD, Measured, cell, put_into_readme, run_all, table
from torch import Tensor

from stepdistill.build import guided, open_teacher
from stepdistill.distill import side_by_side, to_show
from stepdistill.evaluation.benchmark import evaluator_for
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.grids import image_grid
from stepdistill.evaluation.records import Record, save_records
from stepdistill.evaluation.shapes import load_judges
from stepdistill.export import load_student
from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.paths import project_dir
from stepdistill.recipe import Teacher
from stepdistill.recipes import find
from stepdistill.sampling import Ddim, Sampler, sample, trailing
from stepdistill.shapes import COLOURS, HEADS, SHAPES

HERE = Path(__file__).resolve().parent / "shapes"
METRICS = ("alignment", "fd", "fd_clip", "clip_score", "precision", "recall", "coverage")
TEACHER_STEPS = (1, 2, 4, 8, 50)
RECIPES = {
    "sd": (
        "shapes_sd_dmd2",
        "shapes_sd_dmd2_4step",
        "shapes_sd_lora",
        "shapes_sd_shared",
        "shapes_sd_shared/apart",
    ),
    "sd3": ("shapes_sd3_dmd2", "shapes_sd3_dmd2_4step"),
}
GUIDED = "shapes_sd_keeps_guidance"
"""The recipe whose student keeps guidance and negative prompts."""


@dataclass(frozen=True)
class Arguments:
    """The published figures of the shapes benchmark."""

    teacher: Literal["sd", "sd3", "manifests", "negatives"] = "sd"
    """Whose students; or the teachers' own figures, from their manifests; or what negative prompts do to the SD teacher
    and to a student that keeps guidance."""
    recipes: tuple[str, ...] = ()
    """Recipes under train/; empty takes the published ones."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds. Samples are drawn with seed 0 throughout."""
    jobs: int = 2
    """Processes, one thread each."""
    n: int = 1000
    """Images per evaluation."""
    runs: Path = RUNS
    """Where the runs lie."""
    out: Path = HERE
    """Where results go."""


def main(given: Arguments) -> None:
    """Run everything that is not there yet, then write tables and figures."""
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.teacher == "manifests":
        put_into_readme("shapes-teachers", manifests())
        return
    if given.teacher == "negatives":
        negatives(given)
        return
    recipes = given.recipes or RECIPES[given.teacher]
    teacher = find(recipes[0]).teacher
    records = run_all(recipes, given.seeds, [teacher], TEACHER_STEPS, Measured(given.n, given.runs), given.jobs)
    save_records(given.out / f"{given.teacher}.json", records)
    text = text_of(records, teacher, given.n)
    (given.out / f"{given.teacher}.md").write_text(text)
    if given.out == HERE:
        put_into_readme(f"shapes-{given.teacher}", text)
    print(text)
    pictures(given, teacher, recipes)


def text_of(records: list[Record], teacher: Teacher, n: int) -> str:
    """The table and what it shows."""
    note = (
        f"Teacher with guidance {teacher.guidance:g}, students without. {n} captions of held-out scenes, sampling seed "
        f"0. {SPREAD} alignment: everything that the caption names is right, by the attribute classifier, in per cent; "
        "fd and fd_clip: Frechet distances in per cent of the real variance on classifier and open_clip features. "
        f"Real scenes: {_ceiling(records)}."
    )
    return f"{table(records, METRICS)}\n{note}\n"


def manifests() -> str:
    """The teachers' figures as their manifests have them, as Markdown."""
    lines = [
        "| teacher | 50 steps | 4 steps | 1 step | Frechet distance, 50 steps | of real images |",
        "|" + " --- |" * 6,
    ]
    for name in ("shapes-sd", "shapes-sd3"):
        figures = json.loads((project_dir("assets") / name / "MANIFEST.json").read_text())["figures"]
        exact = [f"{100 * figures[f'steps_{k}']['exact']:.1f} %" for k in (50, 4, 1)]
        distances = [f"{figures[k]['frechet']:.1f}" for k in ("steps_50", "real")]
        lines.append(f"| {name} | {' | '.join(exact + distances)} |")
    return "\n".join(lines) + "\n"


def _ceiling(records: Sequence[Record]) -> str:
    """What the captions' own scenes score."""
    opened = open_teacher(Teacher("bundled:shapes-sd"))
    real = evaluator_for(opened, next(r.n for r in records if r.metric == "fd")).ceiling()
    return ", ".join(f"{metric} {cell([real[metric]])}" for metric in METRICS)


def pictures(given: Arguments, teacher: Teacher, recipes: Sequence[str]) -> None:
    """Teacher and students on the same noise, a row each."""
    opened = open_teacher(teacher)
    students = []
    for name in recipes[:2]:
        folder = given.runs / name.replace("/", "-") / f"seed{given.seeds[0]}" / "pipeline"
        students.append((name, load_student(folder, opened=opened)))
    shown = to_show(opened, find(recipes[0]).data, teacher)
    grids = side_by_side(students, opened, guided(opened, teacher), shown)
    images = torch.cat([g.images[: shown.columns] for g in grids])
    image_grid(images, shown.columns, scale=3).save(given.out / f"{given.teacher}.png")


# Negative prompts


def negatives(given: Arguments) -> None:
    """Objects of a colour, with that colour as the negative prompt and without: shares by the classifier."""
    name, n = GUIDED, 300
    how = Measured(given.n, given.runs)
    run_all([name], given.seeds, [], (), how, given.jobs)
    teacher = find("shapes_sd_dmd2").teacher
    opened = open_teacher(teacher)
    student = load_student(given.runs / name / f"seed{given.seeds[0]}" / "pipeline", opened=opened)
    rows = []
    for subject, denoiser, sampler in (
        ("teacher", opened.denoiser, Sampler(trailing(20), Ddim())),
        (name, student, student.sampler),
    ):
        for colour in ("red", "blue"):
            shares = {
                negative: share_of(colour, denoiser, sampler, opened, negative, teacher.guidance, n)
                for negative in ("", colour)
            }
            rows.append(
                {"subject": subject, "steps": sampler.steps, "guidance": teacher.guidance, "n": n, "colour": colour}
                | {"share": round(shares[""], 4), "share_with_negative": round(shares[colour], 4)}
            )
    (given.out / "negatives.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["| subject | steps | colour | objects of it | with it as the negative prompt |", "|" + " --- |" * 5]
    for r in rows:
        lines.append(
            f"| {r['subject']} | {r['steps']} | {r['colour']} | {100 * r['share']:.1f} % "
            f"| {100 * r['share_with_negative']:.1f} % |"
        )
    note = f"\nPrompts that name no colour of the object, {n} images a row, guidance {teacher.guidance:g}."
    text = "\n".join([*lines, note]) + "\n"
    put_into_readme("negatives", text)
    print(text)


def share_of(
    colour: str, denoiser: Denoiser, sampler: Sampler, opened: Opened, negative: str, guidance: float, n: int
) -> float:
    """How many of ``n`` objects that may have any colour come out in ``colour``."""
    named = open_pipeline(opened.pipeline, negative=negative)
    cond = named.encode([f"a {SHAPES[i % len(SHAPES)]} on a white background" for i in range(n)])
    predict = Guided(denoiser, guidance, named.null)
    latents = sample(predict, (n, *named.sample_shape), cond, sampler, seed=0)
    seen = load_judges().classifier.attributes(_scaled(to_uint8(named.decode(latents))))
    column = list(HEADS).index("colour")
    return float((seen[:, column] == list(COLOURS).index(colour)).double().mean())


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


if __name__ == "__main__":
    main(tyro.cli(Arguments))
