"""``stepdistill bench``: from the command line to measured files."""

from __future__ import annotations

import dataclasses
import json as json_
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from stepdistill.bench.cache import Cache, default_folder
from stepdistill.bench.measure import asked_of, measure, outcomes
from stepdistill.bench.output import check_out, records_from, stamp_of, table_text, unchanged, write_all
from stepdistill.bench.rows import recipe_of, rows_of
from stepdistill.bench.suite import Subject, Suite, find_suite, names_a_suite
from stepdistill.evaluation.records import Record, load_records, save_records
from stepdistill.generate import folder_of
from stepdistill.recipe import Evaluation, Recipe, Teacher
from stepdistill.sampling import Ddim


@dataclass(frozen=True)
class Bench:
    """Measure a suite: a teacher under several solvers and its students, on the same noise; or students that are named,
    beside their teacher. What was measured once is kept, so asking again costs nothing, and a bench that was stopped
    goes on.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """A suite (a name under eval/suites, a Python file, a suite.json), or run directories and pipeline folders."""
    n: int | None = None
    """Images per seed; by default the suite's, or as in the first run's recipe, or 5000."""
    seeds: tuple[int, ...] = ()
    """Sampling seeds, two or more for error bars; by default the suite's, or 0 1 2."""
    steps: tuple[int, ...] = ()
    """Step counts of students; by default the suite's, or all that each serves."""
    teacher_steps: tuple[int, ...] = ()
    """Step counts of the teacher; by default the suite's, or as in the first run's recipe, or 1 2 4 8 50."""
    device: str | None = None
    """Where to sample: cpu, cuda, cuda:1; by default the suite's, or cpu."""
    jobs: int = 1
    """Processes to measure with. Times are taken afterwards, by one alone."""
    out: Path | None = None
    """Folder for results.json, results.csv, table.md, plots/ and report/index.html; by default runs/bench-NAME. A name
    that ends in .json gets the records alone."""
    cache: Path = dataclasses.field(default_factory=default_folder)
    """Folder of what was measured before."""
    json: bool = False
    """Print the records instead of a table."""


def bench(given: Bench) -> list[Record]:
    """Run the command; returns the records.

    Raises:
        ValueError: for bad input, before anything is measured where that can be known; and if rows differ in protocol.
        OSError: if something is missing, or cannot be written.
    """
    if not given.sources:
        raise ValueError("bench: name a suite, or at least one run directory or pipeline folder")
    if given.jobs < 1:
        raise ValueError(f"--jobs must be at least 1; got {given.jobs}")
    named = len(given.sources) == 1 and names_a_suite(given.sources[0])
    suite, name = (find_suite(given.sources[0]), suite_name(given.sources[0])) if named else (_of_runs(given), "runs")
    suite = _overridden(suite, given)
    out = given.out or Path("runs") / f"bench-{name}"
    alone = out.suffix == ".json"  # the records and nothing else
    if out.is_dir() if alone else out.is_file():
        raise ValueError(f"--out {out}: is a {'folder; name a file in it' if alone else 'file; name a folder'}")
    check_out(out.parent if alone else out)
    cache = Cache(given.cache)
    rows, notes = rows_of(suite, cache)
    asked = asked_of(suite, rows, cache)
    title = f"Bench: {name}" if named else "Teacher and students"
    stamp = stamp_of(suite, asked, notes, title, cache)
    cache.flush()
    if not alone and unchanged(out, stamp, cache):
        records, measured = load_records(out / "results.json"), 0
    else:
        measured = measure(suite, asked, cache, given.jobs)
        found = outcomes(asked, cache)
        if alone:
            records = records_from(found)
            save_records(out, records)
        else:
            records = write_all(out, suite, found, notes, title=title, stamp=stamp, cache=cache)
    if given.json:
        print(json_.dumps([dataclasses.asdict(r) for r in records], indent=2))
    else:
        print(table_text(records, notes))
        print(f"{measured} outcomes measured, the others kept from before ({cache.folder})")
        print(f"wrote {out}" if alone else f"report: {out / 'report' / 'index.html'}")
    return records


def suite_name(source: str) -> str:
    """What a suite's folder is called."""
    path, _, function = source.partition(":")
    return function or Path(path).stem


def _overridden(suite: Suite, given: Bench) -> Suite:
    """The suite with what the command line says; the long run stays unless teacher steps are named."""
    changes = {name: getattr(given, name) for name in ("seeds", "steps", "teacher_steps") if getattr(given, name)}
    changes |= {name: getattr(given, name) for name in ("n", "device") if getattr(given, name) is not None}
    return dataclasses.replace(suite, **changes, **({"long_run": 0} if given.teacher_steps else {}))


def _of_runs(given: Bench) -> Suite:
    """The suite that a list of runs and pipeline folders stands for."""
    for source in given.sources:
        folder_of(Path(source))
    recipes = [recipe_of(Path(source)) for source in given.sources]
    plan = (recipes[0] and recipes[0].evaluation) or Evaluation()
    return Suite(
        _same_teacher(given.sources, recipes),
        tuple(Subject(source) for source in given.sources),
        steps=(),
        solvers=(Ddim(),),
        teacher_steps=plan.teacher_steps,
        long_run=0,
        seeds=(0, 1, 2),
        n=plan.n,
        judge=plan.judge,
    )


def _same_teacher(sources: Sequence[str], recipes: Sequence[Recipe | None]) -> Teacher:
    """The teacher of all; where no recipe is kept, the bundled one of digits.

    Raises:
        ValueError: if there are two.
    """
    teachers = [recipe.teacher if recipe else Teacher("bundled:digits") for recipe in recipes]
    for source, teacher in zip(sources, teachers, strict=True):
        if teacher != teachers[0]:
            raise ValueError(
                f"bench: {sources[0]} and {source} have different teachers, {_named(teachers[0])} and "
                f"{_named(teacher)}; measure them one after the other"
            )
    return teachers[0]


def _named(teacher: Teacher) -> str:
    return f"{teacher.source} at guidance {teacher.guidance_range or teacher.guidance}"
