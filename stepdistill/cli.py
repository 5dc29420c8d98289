"""The command line: quickstart, distill, sample, bench, methods."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

USAGE = """stepdistill: turn a pretrained diffusers pipeline into a one- to four-step generator

  stepdistill quickstart              distil the bundled digits teacher into one- and four-step generators
  stepdistill distill RECIPE [...]    run a recipe: a name under train/, a Python file, or a run's recipe.json
  stepdistill sample RUN [...]        draw samples from a run or an exported pipeline
  stepdistill bench RUN ... [...]     measure students beside their teacher
  stepdistill methods                 the objectives there are

Every command answers --help; --debug shows a traceback with an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (a bug), 2 (bad input) or 130 (interrupted)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if args else 2)
    if args[0] not in COMMANDS:
        from stepdistill.recipe import suggest

        print(f"stepdistill: no command {args[0]!r}{suggest(args[0], COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), 8)))
    try:
        COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt:
        print("stepdistill: interrupted; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        print(f"stepdistill: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _quickstart(args: list[str]) -> None:
    @dataclass(frozen=True)
    class Quickstart:
        """Distil the bundled digits teacher into a one-step and a four-step generator, on CPU in minutes."""

        out: Path = Path("runs/quickstart")
        """Run directory of the one-step student; the four-step student's is four_step/ inside."""
        resume: bool = False
        """Go on with an interrupted quickstart."""
        seed: int = 0
        """Of training."""

    from stepdistill.quickstart import quickstart

    given = tyro.cli(Quickstart, args=args, prog="stepdistill quickstart")
    quickstart(given.out, resume=given.resume, seed=given.seed)


def _distill(args: list[str]) -> None:
    from stepdistill.distill import distill, evaluate_and_report
    from stepdistill.evaluation.records import markdown_table
    from stepdistill.export import load_lines
    from stepdistill.recipe import Recipe
    from stepdistill.recipes import bundled, find

    if not args or args[0].startswith("-"):
        print("usage: stepdistill distill RECIPE [--out DIR] [--resume] [--print] [--field.sub VALUE ...]\n\nrecipes:")
        for name, function in bundled().items():
            print(f"  {name:<24} {inspect.getdoc(function).splitlines()[0]}")
        sys.exit(0 if args else 2)
    name = args[0]
    recipe = find(name)

    @dataclass(frozen=True)
    class Distill:
        out: Path = Path("runs") / (Path(name).stem if "." in name else name)
        """Run directory, new or empty."""
        resume: bool = False
        """Go on with an interrupted run."""
        print: bool = False
        """Print the resolved recipe and stop."""
        recipe: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=lambda: recipe)

    given = tyro.cli(Distill, args=args[1:], prog=f"stepdistill distill {name}", config=(tyro.conf.AvoidSubcommands,))
    if given.print:
        print(given.recipe.to_json())
        return
    start = time.monotonic()
    done = distill(given.recipe, given.out, resume=given.resume)
    if given.recipe.evaluation is not None:
        title = f"{name}: {type(given.recipe.objective).__name__}"
        records = evaluate_and_report([("student", given.recipe, done)], given.out, title=title)
        print(markdown_table(records, TABLE))
        print(f"report: {given.out / 'report' / 'index.html'}")
    print(f"done in {time.monotonic() - start:.0f} s; load the student with:\n\n{load_lines(done.pipeline)}")


TABLE = ("fd", "pix", "precision", "recall", "coverage")
"""Metrics of the short table."""


def _sample(args: list[str]) -> None:
    @dataclass(frozen=True)
    class Sample:
        """Draw samples from a run or an exported pipeline into one picture."""

        source: tyro.conf.Positional[Path]
        """A run directory or a pipeline folder."""
        labels: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
        """Classes, one column each."""
        rows: int = 4
        """Samples of each class."""
        steps: int | None = None
        """Steps; a student takes only what it was trained for, which is the default."""
        seed: int = 0
        """Of the noise."""
        out: Path = Path("samples.png")
        """Picture to write."""

    from stepdistill.evaluation.features import to_uint8
    from stepdistill.evaluation.report import save_grid
    from stepdistill.export import load_student
    from stepdistill.models.families import open_pipeline

    given = tyro.cli(Sample, args=args, prog="stepdistill sample")
    folder = _pipeline_of(given.source)
    if given.rows < 1 or not given.labels:
        raise ValueError(f"--rows {given.rows}, --labels {list(given.labels)}: at least one of each is needed")
    student = load_student(folder)
    opened = open_pipeline(folder, custom_pipeline=str(folder / "pipeline.py"))
    labels = torch.tensor(given.labels * given.rows)
    cond = opened.family.cond(opened.denoiser.net, {"labels": labels})
    samples = student.sample((len(labels), *opened.sample_shape), cond, steps=given.steps, seed=given.seed)
    save_grid(given.out, to_uint8(samples), columns=len(given.labels))
    print(f"wrote {given.out}: {given.rows} rows of classes {', '.join(map(str, given.labels))}")


def _pipeline_of(source: Path) -> Path:
    folder = source / "pipeline" if (source / "pipeline").is_dir() else source
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{source}: neither a run with a pipeline/ nor a pipeline folder (no model_index.json)")
    return folder


def _bench(args: list[str]) -> None:
    @dataclass(frozen=True)
    class Bench:
        """Measure digits students beside the bundled teacher, on the same noise."""

        sources: tyro.conf.Positional[tuple[Path, ...]]
        """Run directories or pipeline folders."""
        n: int = 5000
        """Images per seed."""
        seeds: tuple[int, ...] = (0, 1, 2)
        """Sampling seeds; two or more give error bars."""
        teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 50)
        """Step counts of the teacher."""
        out: Path = Path("results.json")
        """Records to write."""
        json: bool = False
        """Print the records instead of a table."""

    from stepdistill.build import open_teacher
    from stepdistill.evaluation.benchmark import bench_student, bench_teacher
    from stepdistill.evaluation.digits import DigitsEvaluator
    from stepdistill.evaluation.records import markdown_table, save_records
    from stepdistill.export import load_student
    from stepdistill.models.denoiser import Guided
    from stepdistill.recipe import Teacher

    given = tyro.cli(Bench, args=args, prog="stepdistill bench")
    students = [(str(source), load_student(_pipeline_of(source))) for source in given.sources]
    evaluator = DigitsEvaluator(n=given.n)
    opened = open_teacher(Teacher("bundled:digits"))
    records = bench_teacher(Guided(opened.denoiser), opened, evaluator, given.teacher_steps, given.seeds)
    for name, student in students:
        records += bench_student(student, opened, evaluator, given.seeds, subject=name, method="distilled")
    save_records(given.out, records)
    print(
        json.dumps([dataclasses.asdict(r) for r in records], indent=2)
        if given.json
        else markdown_table(records, TABLE) + f"\nwrote {given.out}"
    )


def _methods(args: list[str]) -> None:
    @dataclass(frozen=True)
    class Methods:
        """The objectives there are: family, paper, networks and data they need."""

        json: bool = False
        """Print JSON."""

    import stepdistill.objectives  # noqa: F401 (fills the registry)
    from stepdistill.objective import registered

    given = tyro.cli(Methods, args=args, prog="stepdistill methods")
    rows = [
        {
            "name": name,
            "family": cls.family,
            "paper": f"arXiv:{cls.paper}",
            "needs": sorted(cls.needs),
            "data": sorted(cls().data) or ["conditions only"],
            "what": inspect.getdoc(cls).split("\n\n")[0].replace("\n", " "),
        }
        for name, cls in sorted(registered().items(), key=lambda item: (item[1].family, item[0]))
    ]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['name']:<8} {row['family']:<12} {row['paper']:<17} needs {', '.join(row['needs'])}; "
            f"data: {', '.join(row['data'])}\n         {row['what']}"
        )


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": _quickstart,
    "distill": _distill,
    "sample": _sample,
    "bench": _bench,
    "methods": _methods,
}
