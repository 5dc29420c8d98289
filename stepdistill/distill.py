"""One run from a recipe to a directory with a pipeline, results and a report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from stepdistill import distributed
from stepdistill.build import Built, build, guided, new_discriminator, open_teacher, trained
from stepdistill.checkpoint import write_atomically
from stepdistill.data import Data, Labels, lent
from stepdistill.evaluation.benchmark import bench_student, bench_teacher, check_judged, evaluator_for, pictures
from stepdistill.evaluation.columns import metric_info
from stepdistill.evaluation.grids import Grid, save_grid
from stepdistill.evaluation.records import Record, save_records
from stepdistill.evaluation.report import write_report
from stepdistill.export import add_figures, check_exportable, load_lines, load_student, save_pipeline
from stepdistill.health import Health
from stepdistill.logging import check_trackers, read_lines
from stepdistill.lora_files import save_lora
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.families import Opened
from stepdistill.models.lora import Adapted, network_of
from stepdistill.models.nets import Nets
from stepdistill.models.two_time import TwoTime
from stepdistill.placement import check_device, sharded
from stepdistill.recipe import Recipe, Teacher, encode
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.student import Student
from stepdistill.validation import FILE, best_of, check_metric, restore_best, validation_of

PREVIEW_SEED = 1_000_003
"""Away from the seeds of evaluations."""

SMALL = 4096
"""Numbers in a sample up to which forty are shown together; of larger ones four are."""


@dataclass(frozen=True)
class Distilled:
    """What a run leaves in memory."""

    student: Student
    """The averaged student, as exported."""
    opened: Opened
    pipeline: Path
    """Folder that stock diffusers loads."""


def distill(recipe: Recipe, out: Path, *, resume: bool = True) -> Distilled:
    """Run a recipe, its warm starts first, into ``out``; or go on with it there.

    ``out`` gets recipe.json, data.json, metrics.jsonl, checkpoints/, samples/ and pipeline/, and a pipeline-Kstep/ for
    each further number of steps that its student serves; warm starts get the same under ``out/stages/``, oldest first.
    A finished stage is not run again.

    Under a launcher (accelerate, torchrun) every process calls this alike, and ``out`` lies where all can read it.

    Args:
        recipe: what to do.
        out: the run directory, new or empty, or that of the same recipe.
        resume: whether a run of the same recipe that is there is gone on with; otherwise it is refused.

    Returns:
        The student and where its pipeline is.

    Raises:
        ValueError: if ``out`` is in use for something else.
        KeyboardInterrupt: after ^C, with a checkpoint written.
    """
    distributed.join()
    distributed.take_card(recipe.run.device)
    distributed.on_main(lambda: claim(out, recipe, resume))
    stages = recipe.stages()
    opened = open_teacher(recipe.teacher)
    for stage in stages:
        check(stage, opened)
    names = [f"{i}-{type(stage.objective).__name__.lower()}" for i, stage in enumerate(stages, 1)]
    folders = [*(out / "stages" / name for name in names[:-1]), out]
    finished = distributed.on_main(lambda: sum(1 for _ in takewhile(lambda f: (f / "pipeline").is_dir(), folders)))
    student = _student_of(stages, folders, finished, opened) if finished else None
    for stage, folder in list(zip(stages, folders, strict=True))[finished:]:
        if stage.run.threads:
            torch.set_num_threads(stage.run.threads)
        built = build(stage, opened=opened, start=student, out=folder, cache=out / "cache")
        distributed.on_main(lambda: write_recipe(out, recipe))  # not before: what cannot be built leaves nothing behind
        distributed.on_main(lambda folder=folder, stage=stage: write_recipe(folder, stage))
        if not (folder / "recipe.json").is_file():
            raise ValueError(f"--out {out}: not the same folder for all processes; name one that they share")
        if distributed.is_main():
            built.report.keep(folder / "data.json")
        nets = _train(built, stage, folder)
        if sharded(stage.placement) or stage.placement.offload:  # its network is in pieces, or elsewhere
            opened = open_teacher(recipe.teacher)
            nets = trained(stage, opened, folder)
        distributed.wait()
        restore_best(stage.evaluation, folder, nets.ema)
        student = nets.ema
        if distributed.is_main():
            export(nets, opened, stage, folder)
        distributed.wait()
    opened.denoiser.to(recipe.run.device)
    student.dtype = torch.float32  # as exported, and as its teacher is measured, whatever it was trained in
    return Distilled(student.to(recipe.run.device), opened, out / "pipeline")


def _student_of(stages: list[Recipe], folders: list[Path], finished: int, opened: Opened) -> Student:
    """The averaged student of the last finished stage, as the next one starts from it."""
    stage, folder = stages[finished - 1], folders[finished - 1]
    # what is exported has no adapters any more, and no second time
    if (stage.student.form == "full" and not stage.objective.two_time) or finished == len(stages):
        return load_student(folder / "pipeline", opened=opened)
    student = trained(stage, opened, folder).ema
    restore_best(stage.evaluation, folder, student)
    return student


def check(recipe: Recipe, opened: Opened) -> None:
    """Find what a recipe asks of its teacher and of this machine in vain, before anything is trained or written.

    Args:
        recipe: one stage.
        opened: its teacher.

    Raises:
        ValueError: naming the field.
    """
    check_device("run.device", recipe.run.device)
    distributed.share(recipe.run.batch)
    distributed.refuse_other_precision(recipe.run.dtype)
    check_trackers(recipe.run.trackers)
    teacher = guided(opened, recipe.teacher)
    recipe.data.examples(opened, 1)
    if "disc" in recipe.players:
        new_discriminator(opened, recipe.heads, Nets({"teacher": teacher, "critic": opened.denoiser}))
    if recipe.evaluation is not None:
        if recipe.evaluation.judge:
            evaluator_for(opened, recipe.evaluation.n, recipe.evaluation.judge)  # whoever cannot judge is found out now
        else:
            check_judged(opened)
        check_metric(recipe.evaluation.keep_best)
        if recipe.evaluation.every and sharded(recipe.placement):
            raise ValueError("evaluation.every: a sharded student is measured at the end only; let it be 0")
    d = opened.denoiser
    if recipe.objective.two_time:
        TwoTime(d.net)  # refuses networks that it cannot tell
    for sampler in recipe.objective.serves(recipe.sampler):
        check_exportable(Student(sampler, d.net, d.schedule, d.kind, d.call), opened)


def claim(out: Path, recipe: Recipe, resume: bool = True) -> None:
    """Make sure that writing to ``out`` loses nothing.

    Raises:
        ValueError: see ``distill``.
    """
    above = next((folder for folder in out.absolute().parents if folder.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out}: {above} is no folder that can be written to")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    stored = out / "recipe.json"
    if not out.exists() or all(path.name in ("cache", f".{stored.name}.part") for path in out.iterdir()):
        return  # that much is left by a run that was stopped while its data were made
    if not stored.is_file():
        raise ValueError(f"--out {out}: there are other files already, and no recipe.json; name another folder")
    there = Recipe.load(stored)
    changed = differences(_trained_as(there), _trained_as(recipe))
    if changed:
        raise ValueError(
            f"--out {out}: a run of another recipe is there already ({'; '.join(changed[:5])}"
            f"{f'; and {len(changed) - 5} more' if len(changed) > 5 else ''}); name another folder, or go on with that "
            f"one: stepdistill distill {stored} --out {out}"
        )
    if not resume:
        raise ValueError(f"--out {out}: a run is there already; leave out --no-resume to go on, or name another folder")


def _trained_as(recipe: Recipe) -> dict[str, Any]:
    """What decides the outcome of a recipe: all but where it is worked out."""
    fields = encode(recipe)
    stage = fields
    while stage is not None:
        del stage["placement"]
        stage = stage["warm_start"]
    return fields


def differences(there: Any, here: Any, field: str = "") -> list[str]:
    """Where two encoded recipes differ: ``run.batch is 2 there and 3 here``."""
    if isinstance(there, dict) and isinstance(here, dict) and there.get("type") == here.get("type"):
        names = [*there, *(name for name in here if name not in there)]
        within = [differences(there.get(n), here.get(n), f"{field}.{n}" if field else n) for n in names]
        return [line for lines in within for line in lines]
    if there == here:
        return []
    old, new = (v.get("type", "given") if isinstance(v, dict) else json.dumps(v) for v in (there, here))
    return [f"{field} is {old} there and {new} here"]


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """``recipe.json``, resolved and reloadable."""
    write_atomically(folder / "recipe.json", lambda p: p.write_text(recipe.to_json()))


def _train(built: Built, recipe: Recipe, folder: Path) -> Nets:
    """Train one stage in ``folder``, from its newest checkpoint if there is one."""
    trainer, opened = built.trainer, built.opened
    shown = to_show(opened, recipe.data, recipe.teacher)
    trainer.preview = lambda net, index: preview(net, opened, folder / "samples" / f"{index:06d}.png", shown)
    trainer.resume()
    if recipe.run.health_every:
        trainer.health = health_of(opened, recipe, folder, trainer.index)
    plan = recipe.evaluation
    if plan is not None and plan.every:
        at = {"steps": recipe.run.steps, "done": trainer.index}
        trainer.watch = validation_of(plan, opened, folder, told=told(recipe.teacher), **at)
    trainer.fit()
    return trainer.nets


def export(nets: Nets, opened: Opened, recipe: Recipe, folder: Path) -> None:
    """Save the averaged student of a finished stage as pipelines, and as a LoRA if it is one."""
    student, method, source = nets.ema, type(recipe.objective).__name__, recipe.teacher.source
    takes_scale = opened.family.guidance_input(network_of(student.net))
    scale = told(recipe.teacher) if takes_scale else None
    if isinstance(student.net, Adapted):  # before the pipeline, whose folder says that the stage is finished
        save_lora(student, opened, folder / "lora", teacher=source, guidance=scale)
    others = [student.serving(s.steps) for s in student.serves if s.steps != student.sampler.steps]
    for one in (*others, student):
        name = "pipeline" if one is student else f"pipeline-{one.sampler.steps}step"
        back = nets["inverter"] if one is student and "inverter" in nets else None
        save_pipeline(one, opened, folder / name, teacher=source, method=method, guidance=scale, inverter=back)


@dataclass(frozen=True)
class Shown:
    """Conditions of pictures to look at, row by row; every row asks for the same."""

    cond: Cond
    """Each (rows * columns, ...)."""
    rows: int
    columns: int
    captions: tuple[str, ...]
    """Of the columns; none without text."""


def to_show(opened: Opened, data: Data, teacher: Teacher, *, large: tuple[int, int] = (1, 4)) -> Shown:
    """The first classes or prompts of a recipe's data, several samples of each where samples are small.

    Args:
        opened: the teacher's pipeline.
        data: where conditions come from.
        teacher: whose guidance students may be told.
        large: rows and columns where samples are large.
    """
    small = math.prod(opened.sample_shape) <= SMALL
    rows, columns = (4, 10) if small else large
    captions = tuple(data.captions(columns))
    columns = len(captions) or columns
    cond = {k: v.repeat(rows, *[1] * (v.ndim - 1)) for k, v in data.examples(opened, columns).items()}
    scale = told(teacher)
    if scale is not None:
        cond["guidance"] = torch.full((rows * columns,), scale)
    return Shown(cond, rows, columns, captions)


def told(teacher: Teacher) -> float | None:
    """The guidance scale at which students of a whole range are looked at: its middle; None without a range."""
    return None if teacher.guidance_range is None else sum(teacher.guidance_range) / 2


def health_of(opened: Opened, recipe: Recipe, folder: Path, done: int) -> Health:
    """What looks after a stage: four samples of each of a few conditions."""
    shown = to_show(opened, recipe.data, recipe.teacher, large=(4, 2))
    seeds, columns = (shown.rows, shown.columns) if shown.cond else (shown.rows * shown.columns, 1)
    at_once = min(seeds * columns, distributed.share(recipe.run.batch))  # what fits with a graph fits without
    return Health(opened, shown.cond, seeds, columns, folder, steps=recipe.run.steps, done=done, at_once=at_once)


def preview(student: Student, opened: Opened, path: Path, shown: Shown) -> None:
    """A picture of the same samples every time, made by all processes, since a student may be in pieces."""
    images = _grid("", student, student.sampler, opened, shown).images
    if distributed.is_main():
        save_grid(path, images, columns=shown.columns)


def side_by_side(
    students: Sequence[tuple[str, Student]], opened: Opened, teacher: Guided, shown: Shown | None = None
) -> list[Grid]:
    """Teacher at 50 steps, teacher at each student's steps, and the students, all from the same noise.

    Args:
        students: titles and students.
        opened: the teacher's pipeline.
        teacher: under its guidance.
        shown: what to ask for; None for the first ten classes.
    """
    shown = shown or to_show(opened, Labels(), Teacher(""))
    grids = [_grid("teacher, 50 steps", teacher, Sampler(trailing(50), Ddim()), opened, shown)]
    for title, student in students:
        k = student.sampler.steps
        if k not in [grid.steps for grid in grids if grid.title == "teacher"]:
            beside = _grid("teacher", teacher, Sampler(trailing(k), Ddim()), opened, shown)
            grids.append(beside._replace(steps=k))
        grids.append(_grid(title, student, student.sampler, opened, shown)._replace(steps=k))
    return grids


def _grid(title: str, predict: Guided | Student, sampler: Sampler, opened: Opened, shown: Shown) -> Grid:
    device = next(predict.parameters()).device
    with lent(opened, device, vae=True):
        n = shown.rows * shown.columns
        images = torch.cat(list(pictures(predict, sampler, opened, shown.cond, n, seed=PREVIEW_SEED)))
    return Grid(title, images, shown.columns, shown.captions)


def evaluate_and_report(runs: Sequence[tuple[str, Recipe, Distilled]], out: Path, *, title: str) -> list[Record]:
    """Measure the teacher and the students of one or more runs that share it; write results.json and the report.

    The students' model cards get their figures too.

    Args:
        runs: (name in tables, recipe, result) each; the first recipe's ``evaluation`` is the protocol.
        out: gets results.json and report/index.html; its metrics.jsonl gives the curves.
        title: of the page.

    Returns:
        The records.
    """
    _, recipe, first = runs[0]
    plan, opened, scale = recipe.evaluation, first.opened, told(recipe.teacher)
    evaluator = evaluator_for(opened, plan.n, plan.judge)
    teacher = guided(opened, recipe.teacher if scale is None else replace(recipe.teacher, guidance=scale))
    records = bench_teacher(teacher, opened, evaluator, plan.teacher_steps, plan.seeds)
    for name, run_recipe, done in runs:
        method = type(run_recipe.objective).__name__
        records += bench_student(done.student, opened, evaluator, plan.seeds, subject=name, method=method, told=scale)
        seen = sorted((done.pipeline.parent / "samples").glob("*.png"))
        add_figures(done.pipeline, [r for r in records if r.subject in ("teacher", name)], seen[-1] if seen else None)
    save_records(out / "results.json", records)
    ceiling = [f"{metric_info(k).label} {v:.3g} {metric_info(k).unit}".strip() for k, v in evaluator.ceiling().items()]
    notes = [f"Real images, measured the same way: {', '.join(ceiling)}."] if ceiling else []
    if plan.every and plan.keep_best:
        best = best_of(read_lines(out / FILE), plan.keep_best)
        notes.append(f"The student is that of step {best:,}, the best by {metric_info(plan.keep_best).label}.")
    students = [(name, done.student) for name, _, done in runs]
    write_report(
        out,
        title=title,
        records=records,
        grids=side_by_side(students, opened, teacher, to_show(opened, recipe.data, recipe.teacher)),
        curves=out / "metrics.jsonl",
        load_code=load_lines(first.pipeline),
        notes="\n\n".join(notes),
        evaluations=out / FILE if (out / FILE).is_file() else None,
    )
    return records
