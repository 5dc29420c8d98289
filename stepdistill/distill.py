"""One run from a recipe to a directory with a pipeline, results and a report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill.build import Built, build, new_discriminator, open_teacher
from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.benchmark import bench_student, bench_teacher
from stepdistill.evaluation.digits import DigitsEvaluator
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.records import Record, save_records
from stepdistill.evaluation.report import Grid, save_grid, write_report
from stepdistill.export import check_exportable, load_lines, load_student, save_pipeline
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import Opened
from stepdistill.models.nets import Nets
from stepdistill.recipe import Recipe
from stepdistill.sampling import Ddim, Sampler, sample, trailing
from stepdistill.student import Student

PREVIEW_SEED = 1_000_003
"""Away from the seeds of evaluations."""

DIGIT_SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Distilled:
    """What a run leaves in memory."""

    student: Student
    """The averaged student, as exported."""
    opened: Opened
    pipeline: Path
    """Folder that stock diffusers loads."""


def distill(recipe: Recipe, out: Path, *, resume: bool = False) -> Distilled:
    """Run a recipe, its warm starts first, into ``out``.

    ``out`` gets recipe.json, metrics.jsonl, checkpoints/, samples/ and pipeline/; warm starts get the same under
    ``out/stages/``, oldest first. A finished stage is not run again when a run is resumed.

    Args:
        recipe: what to do.
        out: the run directory, new or empty unless ``resume``.
        resume: go on with what ``out`` holds.

    Returns:
        The student and where its pipeline is.

    Raises:
        ValueError: if ``out`` is in use and ``resume`` is off, or ``resume`` is on and the recipe is another one.
        KeyboardInterrupt: after ^C, with a checkpoint written.
    """
    claim(out, recipe, resume)
    stages = recipe.stages()
    opened = open_teacher(recipe.teacher)
    for stage in stages:
        check(stage, opened)
    student: Student | None = None
    for i, stage in enumerate(stages):
        last = i == len(stages) - 1
        folder = out if last else out / "stages" / f"{i + 1}-{type(stage.objective).__name__.lower()}"
        if (folder / "pipeline").is_dir():
            student = load_student(folder / "pipeline", opened=opened)
            continue
        if stage.run.threads:
            torch.set_num_threads(stage.run.threads)
        built = build(stage, opened=opened, start=student, out=folder, cache=out / "cache")
        write_recipe(out, recipe)  # not before: what cannot be built leaves nothing behind
        write_recipe(folder, stage)
        student = _train(built, stage, folder)
    opened.denoiser.to(recipe.run.device)
    return Distilled(student.to(recipe.run.device), opened, out / "pipeline")


def check(recipe: Recipe, opened: Opened) -> None:
    """Find what a recipe asks of its teacher and of this machine in vain, before anything is trained or written.

    Args:
        recipe: one stage.
        opened: its teacher.

    Raises:
        ValueError: naming the field.
    """
    try:
        torch.zeros(1, device=recipe.run.device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device
        reason = str(error).splitlines()[0]
        raise ValueError(f"run.device {recipe.run.device!r}: cannot be used on this machine ({reason})") from error
    teacher = Guided(opened.denoiser, recipe.teacher.guidance, opened.null)
    if "disc" in recipe.players:
        new_discriminator(opened, recipe.heads, Nets({"teacher": teacher, "critic": opened.denoiser}))
    if recipe.evaluation is not None and opened.sample_shape != DIGIT_SHAPE:
        raise ValueError(
            f"evaluation judges digits of shape {DIGIT_SHAPE}, this teacher makes {opened.sample_shape}; leave it out"
        )
    d = opened.denoiser
    check_exportable(Student(recipe.sampler, d.net, d.schedule, d.kind, d.call), opened)


def claim(out: Path, recipe: Recipe, resume: bool) -> None:
    """Make sure that writing to ``out`` loses nothing.

    Raises:
        ValueError: see ``distill``.
    """
    above = next((folder for folder in out.absolute().parents if folder.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out}: {above} is no folder that can be written to")
    if not out.exists() or (out.is_dir() and all(path.name == "cache" for path in out.iterdir())):
        return  # a cache alone is left by a run that was stopped while its data were made
    if not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    if not resume:
        raise ValueError(f"--out {out}: a run is there already; add --resume to go on with it, or name another folder")
    stored = out / "recipe.json"
    if not stored.is_file():
        raise ValueError(f"--resume {out}: no recipe.json there, so there is nothing to go on with")
    if stored.read_text() != recipe.to_json():
        raise ValueError(
            f"--resume {out}: its recipe.json is another recipe ({_first_difference(stored.read_text(), recipe)}); "
            f"resume with: stepdistill distill {stored} --out {out} --resume"
        )


def _first_difference(stored: str, recipe: Recipe) -> str:
    pairs = zip(stored.splitlines(), recipe.to_json().splitlines(), strict=False)
    return next((f"{a.strip()} there, {b.strip()} here" for a, b in pairs if a != b), "one is longer")


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """``recipe.json``, resolved and reloadable."""
    write_atomically(folder / "recipe.json", lambda p: p.write_text(recipe.to_json()))


def _train(built: Built, recipe: Recipe, folder: Path) -> Student:
    """Train one stage in ``folder``, from its newest checkpoint if there is one, and export its average."""
    trainer, opened = built.trainer, built.opened
    trainer.preview = lambda net, index: preview(net, opened, folder / "samples" / f"{index:06d}.png")
    trainer.resume()
    trainer.fit()
    method = type(recipe.objective).__name__
    save_pipeline(trainer.nets.ema, opened, folder / "pipeline", teacher=recipe.teacher.source, method=method)
    return trainer.nets.ema


def preview(student: Student, opened: Opened, path: Path, n: int = 40) -> None:
    """A picture of the same ``n`` samples every time."""
    device = next(student.parameters()).device
    cond, shape = opened.family.examples(opened.pipeline, n), (n, *opened.sample_shape)
    samples = sample(student, shape, cond, student.sampler, seed=PREVIEW_SEED, device=device)
    save_grid(path, to_uint8(samples.cpu()), columns=10)


def side_by_side(students: Sequence[tuple[str, Student]], opened: Opened, teacher: Guided) -> list[Grid]:
    """Teacher at 50 steps, teacher at each student's steps, and the students, all from the same noise."""
    labels = torch.arange(10).repeat(4)
    cond = opened.family.cond(opened.denoiser.net, {"labels": labels})
    shape = (len(labels), *opened.sample_shape)
    shown = [("teacher, 50 steps", teacher, Sampler(trailing(50), Ddim()))]
    for title, student in students:
        k = student.sampler.steps
        shown.append((f"teacher, {k} step{'s' if k > 1 else ''}", teacher, Sampler(trailing(k), Ddim())))
        shown.append((title, student, student.sampler))
    device = next(teacher.parameters()).device
    return [
        Grid(title, to_uint8(sample(predict, shape, cond, sampler, seed=PREVIEW_SEED, device=device).cpu()), 10)
        for title, predict, sampler in shown
    ]


def evaluate_and_report(runs: Sequence[tuple[str, Recipe, Distilled]], out: Path, *, title: str) -> list[Record]:
    """Measure the teacher and the students of one or more runs that share it; write results.json and the report.

    Args:
        runs: (name in tables, recipe, result) each; the first recipe's ``evaluation`` is the protocol.
        out: gets results.json and report/index.html; its metrics.jsonl gives the curves.
        title: of the page.

    Returns:
        The records.
    """
    _, recipe, first = runs[0]
    plan = recipe.evaluation
    evaluator = DigitsEvaluator(n=plan.n)
    opened = first.opened
    teacher = Guided(opened.denoiser, recipe.teacher.guidance, opened.null, interval=recipe.teacher.interval)
    records = bench_teacher(teacher, opened, evaluator, plan.teacher_steps, plan.seeds)
    for name, run_recipe, done in runs:
        method = type(run_recipe.objective).__name__
        records += bench_student(done.student, opened, evaluator, plan.seeds, subject=name, method=method)
    save_records(out / "results.json", records)
    write_report(
        out,
        title=title,
        records=records,
        grids=side_by_side([(name, done.student) for name, _, done in runs], opened, teacher),
        curves=out / "metrics.jsonl",
        load_code=load_lines(first.pipeline),
    )
    return records
