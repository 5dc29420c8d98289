"""The command line: quickstart, distill, sample, bench, methods, plan, doctor."""

from __future__ import annotations

import dataclasses
import inspect
import json as json_
import math
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from diffusers import DDIMScheduler
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor
from transformers.utils import logging as transformers_logging

from stepdistill import distributed
from stepdistill.bench.command import Bench, bench
from stepdistill.bench.rows import recipe_of
from stepdistill.data.prompts import read_prompts
from stepdistill.distill import distill, evaluate_and_report
from stepdistill.doctor import CHECKS, QUICK, diagnose
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.grids import save_grid
from stepdistill.evaluation.tables import brief_table
from stepdistill.export import load_lines, load_student, stand_in
from stepdistill.generate import folder_of, sample
from stepdistill.inference import Parts
from stepdistill.known_teachers import known_name
from stepdistill.models.families import family_for
from stepdistill.objective import Objective, registered
from stepdistill.plan import open_for_plan, plan, propose, table
from stepdistill.quickstart import quickstart
from stepdistill.recipe import Evaluation, Recipe, suggest
from stepdistill.recipes import bundled, find
from stepdistill.student import Student

USAGE = """stepdistill: turn a pretrained diffusers pipeline into a one- to four-step generator

  stepdistill quickstart              distil the bundled digits teacher into one- and four-step generators
  stepdistill distill RECIPE [...]    run a recipe: a name under train/, a Python file, or a run's recipe.json
  stepdistill sample RUN [...]        draw samples from a run or an exported pipeline
  stepdistill bench SUITE [...]       measure a teacher and its students; or name runs: bench RUN RUN ...
  stepdistill methods                 the objectives there are
  stepdistill plan RECIPE [...]       what it will cost, and what fits a --card; --teacher config:sdxl needs no weights
  stepdistill doctor RUN              what is wrong with a run; exits with 1 if anything is

Every command answers --help; --debug shows a traceback with an error."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (a bug, or what ``doctor`` found), 2 (bad input) or 130 (interrupted)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    disable_progress_bar()  # of loading and saving; ours stay
    transformers_logging.disable_progress_bar()
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if args else 2)
    try:
        if args[0] not in COMMANDS:
            raise ValueError(f"no command {args[0]!r}{suggest(args[0], COMMANDS)}")
        if distributed.launched() > 1 and args[0] != "distill":
            raise ValueError(f"{args[0]} runs in one process; a launcher is for distill")
        distributed.join()  # first of all, so that one of them says what is wrong
        COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if args[0] in ("quickstart", "distill", "bench") else ""
        if distributed.is_main():
            print(f"stepdistill: interrupted{goes_on}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not distributed.first_to_fail():
            sys.exit(2)  # the one that was has said why
        if debug:
            traceback.print_exc()
        said = _one_line(str(error))
        if _is_out_of_memory(error):
            said = f"out of memory: {said or 'too much was asked for'}; a smaller run.batch or data.count takes less"
        elif not isinstance(error, ValueError | OSError | FloatingPointError):
            raise
        print(f"stepdistill: {said}", file=sys.stderr)
        sys.exit(2)


def _one_line(text: str, longest: int = 1000) -> str:
    """An error to read at a glance; of one that quotes a page of input both ends: where it is, and how to mend it."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest * 2 // 3]} ... {line[-longest // 4 :]}"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether this is how Python, torch on a card, or torch on the CPU says so."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _parse(kind: type, args: list[str], command: str, **options: Any) -> Any:
    return tyro.cli(kind, args=args, prog=f"stepdistill {command}", console_outputs=distributed.is_main(), **options)


@dataclass(frozen=True)
class Quickstart:
    """Distil the bundled digits teacher into a one-step and a four-step generator, on CPU in minutes."""

    out: Path = Path("runs/quickstart")
    """Run directory of the one-step student; the four-step student's is four_step/ inside."""
    resume: bool = True
    """Go on with the quickstart that is there, if there is one; without, refuse to."""
    seed: int = 0
    """Of training."""


def _quickstart(args: list[str]) -> None:
    given = _parse(Quickstart, args, "quickstart")
    quickstart(given.out, resume=given.resume, seed=given.seed)


@dataclass(frozen=True)
class Distill:
    """Run a recipe; every field of it can be set."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path
    """Run directory, new or empty."""
    resume: bool = True
    """Go on with the run of the same recipe that is there, if there is one; without, refuse to."""
    print: bool = False
    """Print the resolved recipe and stop."""


def _distill(args: list[str]) -> None:
    if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
        raise ValueError(f"distill {args[0]}: the recipe comes first; `stepdistill distill --help` lists them")
    if not args or args[0].startswith("-"):
        print("usage: stepdistill distill RECIPE [--out DIR] [--print] [--field.sub VALUE ...]\n\nrecipes:")
        lines: dict[str, list[str]] = {}
        for name, function in bundled().items():
            lines.setdefault((inspect.getdoc(function) or "-").splitlines()[0], []).append(name)
        for line, names in lines.items():
            print(textwrap.fill(f"{', '.join(names):<24} {line}", 118, initial_indent="  ", subsequent_indent="      "))
        sys.exit(0 if args else 2)
    name = args[0]
    default = Distill(find(name), Path("runs") / _run_name(name))
    if default.recipe.evaluation is None and any(arg.startswith("--evaluation") for arg in args):
        default = dataclasses.replace(default, recipe=dataclasses.replace(default.recipe, evaluation=Evaluation()))
    config = (tyro.conf.AvoidSubcommands,)
    given = _parse(Distill, args[1:], f"distill {name}", default=default, config=config)
    recipe = given.recipe
    if given.print:
        print(recipe.to_json())
        return
    start = time.monotonic()
    done = distill(recipe, given.out, resume=given.resume)
    main = distributed.is_main()
    distributed.leave()
    if not main:
        return
    if recipe.evaluation is not None:
        title = f"{name}: {type(recipe.objective).__name__}"
        print(brief_table(evaluate_and_report([("student", recipe, done)], given.out, title=title)))
        print(f"report: {given.out / 'report' / 'index.html'}")
    print(f"done in {time.monotonic() - start:.0f} s; load the student with:\n\n{load_lines(done.pipeline)}")


def _run_name(recipe: str) -> str:
    """A folder's name for a recipe: its own, or for a run's recipe.json the run's with ``-again``."""
    path = Path(recipe)
    if path.suffix == ".json":
        return f"{path.absolute().parent.name}-again"
    return (recipe.rpartition(":")[2] if ":" in recipe else path.stem).replace("@", "-")


@dataclass(frozen=True)
class Sample:
    """Draw samples from a run or an exported pipeline into one picture."""

    source: tyro.conf.Positional[Path]
    """A run directory or a pipeline folder."""
    labels: tuple[int, ...] = ()
    """Classes, one column each; by default what the model knows, up to ten."""
    prompts: tuple[str, ...] = ()
    """Prompts, one column each; by default the first ten that the run was trained on."""
    prompts_file: Path | None = None
    """A file of prompts instead, one a line, or .jsonl."""
    guidance: float | None = None
    """Guidance scale, for students that take one; by default the recorded one."""
    rows: int = 4
    """Rows of samples."""
    steps: int | None = None
    """Steps; a student takes only what it was trained for, which is the default."""
    seed: int = 0
    """Of the noise."""
    optimize: bool = False
    """Sample by the few-step loop instead of the pipeline's own call: the same images to rounding, faster."""
    parts: tuple[Literal["cache_text", "channels_last", "compile", "cuda_graph"], ...] | None = None
    """What --optimize does besides; by default cache_text and channels_last. compile pays for many images only."""
    tiny_decoder: str | None = None
    """A folder or hub id of an AutoencoderTiny that --optimize decodes with."""
    out: Path = Path("samples.png")
    """Picture to write."""


def _sample(args: list[str]) -> None:
    given = _parse(Sample, args, "sample")
    folder = folder_of(given.source)
    if given.rows < 1:
        raise ValueError(f"--rows must be at least 1; got {given.rows}")
    if not 0 <= given.seed < 2**31:
        raise ValueError(f"--seed must lie in [0, 2^31); got {given.seed}")
    _check_writable(given.out)
    if not given.optimize and (given.parts is not None or given.tiny_decoder is not None):
        raise ValueError(f"--{'parts' if given.parts is not None else 'tiny-decoder'}: a part of --optimize; give both")
    draw = _draw_prompts if "text_encoder" in _index(folder) else _draw_classes
    images, columns, of = draw(given, folder)
    save_grid(given.out, images, columns=columns)
    print(f"wrote {given.out}: {given.rows} rows{of}")


def _draw_classes(given: Sample, folder: Path) -> tuple[Tensor, int, str]:
    """Images uint8 (N, 3, H, W), how many make a row, and what they show; none of the folder's code is run."""
    if given.prompts or given.prompts_file:
        raise ValueError(f"--prompts: {folder} takes no prompts")
    student = load_student(folder)
    pipeline = stand_in(student.net, DDIMScheduler())
    family = family_for(student.net, pipeline.scheduler)
    columns = given.labels or _known_labels(folder, student)[:10]
    if _null_label(folder) in columns:
        raise ValueError(f"--labels: {_null_label(folder)} is the null label, which stands for no class")
    n = given.rows * (len(columns) or 10)
    cond = family.cond(student.net, {"labels": torch.tensor(columns * given.rows)} if columns else {})
    of = f" of classes {', '.join(map(str, columns))}" if columns else ""
    if given.optimize:
        wanted = columns * given.rows if columns else n
        images = sample(folder, wanted, seed=given.seed, steps=given.steps, output="uint8", optimize=_parts(given))
        return images.expand(-1, 3, -1, -1), len(columns) or 10, of
    shape = (n, *family.sample_shape(pipeline, None))
    samples = student.sample(shape, cond, steps=given.steps, seed=given.seed)
    return to_uint8(samples), len(columns) or 10, of


def _draw_prompts(given: Sample, folder: Path) -> tuple[Tensor, int, str]:
    """See ``_draw_classes``; drawn by the stock pipeline. Of videos the middle frame is shown."""
    if given.labels:
        raise ValueError(f"--labels: {folder} takes prompts; give --prompts")
    if given.prompts and given.prompts_file:
        raise ValueError("--prompts and --prompts-file are both given; choose one")
    texts = read_prompts(given.prompts_file, "--prompts-file") if given.prompts_file else list(given.prompts)
    if not texts:
        recipe = recipe_of(given.source)
        texts = recipe.data.captions(10) if recipe else []
    if not texts:
        raise ValueError(f'--prompts: {folder} takes prompts; give some, as in --prompts "a red circle"')
    made = sample(
        folder,
        texts * given.rows,
        seed=given.seed,
        steps=given.steps,
        guidance=given.guidance,
        output="uint8",
        optimize=_parts(given),
    )
    images = made[:, made.shape[1] // 2] if made.ndim == 5 else made
    return images, len(texts), f" of {len(texts)} prompts"


def _parts(given: Sample) -> bool | Parts:
    if not given.optimize:
        return False
    if given.parts is None:
        return Parts(tiny_decoder=given.tiny_decoder)
    switched = {name: name in given.parts for name in ("cache_text", "channels_last", "compile", "cuda_graph")}
    return Parts(**switched, tiny_decoder=given.tiny_decoder)


def _index(folder: Path) -> dict[str, Any]:
    """The pipeline's config.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        index = json_.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:  # of the text or of its encoding
        raise ValueError(f"{folder / 'model_index.json'} is damaged ({error})") from error
    return index if isinstance(index, dict) else {}


def _null_label(folder: Path) -> int | None:
    return _index(folder).get("null_label")


def _known_labels(folder: Path, student: Student) -> tuple[int, ...]:
    """Classes that a student was trained on; none for an unconditional one."""
    return tuple(c for c in range(student.net.config.num_class_embeds or 0) if c != _null_label(folder))


def _check_writable(out: Path) -> None:
    """Of a file that is written when all the work is done."""
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file in it")
    if out.parent.exists() and not out.parent.is_dir():
        raise ValueError(f"--out {out}: {out.parent} is a file; name a folder")


def _bench(args: list[str]) -> None:
    bench(_parse(Bench, args, "bench"))


@dataclass(frozen=True)
class Methods:
    """The objectives there are: family, paper, networks and data they need, steps they serve. Teachers of every kind
    (eps, v, x0, velocity) will do for all of them.
    """

    costs: bool = False
    """Measure what an update of each one's digits recipe takes: network evaluations and bytes for each sample."""
    json: bool = False
    """Print JSON."""
    markdown: bool = False
    """Print the table of stepdistill/objectives/README.md."""


def _methods(args: list[str]) -> None:
    given = _parse(Methods, args, "methods")
    if given.markdown:
        print(methods_table())
        return
    rows = [_facts(name, cls, given.costs) for name, cls in _by_family()]
    if given.json:
        print(json_.dumps(rows, indent=2))
        return
    for row in rows:
        needs, data = ", ".join(row["needs"]), ", ".join(row["data"])
        steps = f"; steps: {', '.join(map(str, row['steps']))}" if row["steps"] else ""
        print(f"{row['name']:<13} {row['family']:<12} {row['paper']:<17} needs {needs}; data: {data}{steps}")
        print(f"{'':<13} {row['what']}")
        if "evaluations_per_sample" in row:
            kib = row["bytes_per_sample"] / 1024
            print(f"{'':<13} {row['evaluations_per_sample']:.2f} network evaluations and {kib:.0f} KB a sample")


def _by_family() -> list[tuple[str, type[Objective]]]:
    return sorted(registered().items(), key=lambda item: (item[1].family, item[0]))


def _facts(name: str, cls: type[Objective], costs: bool) -> dict[str, Any]:
    """What ``methods`` says of one objective."""
    objective, recipe = cls(), bundled().get(f"digits_{name}")
    facts = {
        "name": name,
        "family": cls.family,
        "paper": f"arXiv:{cls.paper}",
        "needs": _networks(objective),
        "data": sorted(objective.data) or ["conditions only"],
        "steps": [k for k in (1, 2, 4, 8) if recipe and _served(recipe, k)],
        "what": (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "),
    }
    if costs and recipe:
        last = plan(recipe())[-1]
        facts |= {"evaluations_per_sample": last.per_update, "bytes_per_sample": last.bytes_per_sample}
    return facts


def _networks(objective: Objective) -> list[str]:
    """What there must be, and what moves: some only until a term is switched off."""
    movers = {name for turn in objective.turns() for name in turn.moves}
    roles = sorted(objective.needs | movers)
    return [f"{role} (optional)" if role in objective.optional - objective.needs else role for role in roles]


def _served(recipe: Callable[..., Recipe], steps: int) -> bool:
    try:
        recipe(steps=steps)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class PlanOf:
    """What a recipe will cost: network evaluations and parameters, counted in a few updates on noise, and the peak
    memory of a device, from a rehearsal of its steps that allocates nothing.

    Teachers that need no weights and no download: --teacher config:sd1.5, config:sdxl, config:sd3-medium,
    config:sd3.5-medium, config:sd3.5-large, config:flux-dev. They are planned as on a card, and take a minute or
    two a stage, with --card some more.
    """

    recipe: tyro.conf.Positional[str]
    """A name under train/, a file, or a run's recipe.json."""
    teacher: str | None = None
    """Plan for another teacher: one of the above, a folder or a hub id."""
    size: tuple[int, ...] = ()
    """Pixels of its samples, if not its own."""
    batch: int | None = None
    """Samples of a micro-batch, if not the recipe's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Arithmetic inside networks, if not the recipe's."""
    devices: int = 1
    """How many share each batch and, with placement.shard, the networks."""
    card: float | None = None
    """GiB of a card: propose the least change under which the last stage fits on it."""
    json: bool = False
    """Print JSON."""


def _cost(args: list[str]) -> None:
    given = _parse(PlanOf, args, "plan")
    if given.card is not None and not 0 < given.card < math.inf:
        raise ValueError(f"--card must be GiB above 0; got {given.card:g}")
    if given.devices < 1:
        raise ValueError(f"--devices must be at least 1; got {given.devices}")
    recipe = _planned(find(given.recipe), given)
    opened = open_for_plan(recipe.teacher)
    stages = plan(recipe, opened, memory=True, devices=given.devices)
    fits = propose(recipe, opened, given.card, stages[-1].memory, given.devices) if given.card else None
    if given.json:
        rows = [dataclasses.asdict(s) | {"evaluations": s.evaluations} for s in stages]
        proposal = fits and {"changes": fits.changes, "options": fits.options, "peak": fits.peak}
        print(json_.dumps({"stages": rows, "proposal": proposal} if given.card else rows, indent=2))
        return
    print(table(stages))
    if given.card:
        print(
            f"on {given.card:g} GiB: {fits or 'nothing here fits; try several cards, --devices 8 and placement.shard'}"
        )
        if fits and fits.options:
            print(f"  as options of distill: {' '.join(fits.options)}")


def _planned(recipe: Recipe, given: PlanOf) -> Recipe:
    """The recipe, and its warm starts, with what the command line says."""
    source = given.teacher or recipe.teacher.source
    teacher = dataclasses.replace(recipe.teacher, source=source, size=given.size or recipe.teacher.size)
    asked = {"batch": given.batch, "dtype": given.dtype, "device": "cuda" if given.card or known_name(source) else None}
    run = dataclasses.replace(recipe.run, **{k: v for k, v in asked.items() if v is not None})
    start = recipe.warm_start and _planned(recipe.warm_start, given)
    return dataclasses.replace(recipe, teacher=teacher, run=run, warm_start=start)


@dataclass(frozen=True)
class Doctor:
    """Read a run directory and name what is wrong with it: each finding with numbers, a likely cause and a cure.

    Nothing is changed. Exits with 0 if nothing was found, with 1 otherwise.
    """

    run: tyro.conf.Positional[Path]
    """A run directory, finished or not."""
    quick: bool = False
    """Read the recipe and what training has logged and saved, and open no network."""
    json: bool = False
    """Print JSON."""


def _doctor(args: list[str]) -> None:
    given = _parse(Doctor, args, "doctor")
    found = diagnose(given.run, checks=QUICK if given.quick else CHECKS)
    if given.json:
        print(json_.dumps([one.facts() for one in found], indent=2))
    else:
        for one in found:
            print(f"{one.folder}: {len(one.findings) or 'nothing'} found")
            for finding in one.findings:
                print(f"- {finding}")
            for line in one.not_checked:
                print(f"  not checked: {line}")
    if any(one.findings for one in found):
        sys.exit(1)


def methods_table() -> str:
    """The registered objectives as a Markdown table."""
    lines = ["| objective | family | paper | networks | data |", "| --- | --- | --- | --- | --- |"]
    for name, cls in _by_family():
        paper = f"[{cls.paper}](https://arxiv.org/abs/{cls.paper})"
        path = f"{cls.family}/{cls.__module__.rpartition('.')[2]}.py"
        needs, data = ", ".join(_networks(cls())), ", ".join(sorted(cls().data)) or "conditions only"
        lines.append(f"| [`{name}`]({path}) | {cls.family} | {paper} | {needs} | {data} |")
    return "\n".join(lines)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": _quickstart,
    "distill": _distill,
    "sample": _sample,
    "bench": _bench,
    "methods": _methods,
    "plan": _cost,
    "doctor": _doctor,
}
