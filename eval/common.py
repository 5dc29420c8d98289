"""What the measuring scripts share: recipes with variants, runs of several seeds, and tables in README."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stepdistill.build import guided, open_teacher
from stepdistill.distill import distill
from stepdistill.evaluation.benchmark import bench_student, bench_teacher, evaluator_for
from stepdistill.evaluation.records import Record, check_same_protocol, load_records, mean_and_ci95, save_records
from stepdistill.evaluation.tables import format_value
from stepdistill.export import load_student
from stepdistill.plan import plan
from stepdistill.quickstart import reseeded
from stepdistill.recipe import Recipe, Teacher
from stepdistill.recipes import find
from stepdistill.student import Student

RUNS = Path(__file__).resolve().parents[1] / "runs" / "eval"

BUDGET = 300_000
"""Network evaluations of one sample that each method may spend, a backward pass counting as two."""

ALL_STEPS = (8, 4, 2, 1)
"""Of a student that has learned every time."""

GAN_COST = 1.34
"""Two steps of digits_dmd2 over two without a GAN, in milliseconds at 0.64 M parameters on an idle machine, when the
published runs were made. (The newer eval/overhead.json gives 1.43, from beside another process.)"""


def recipe_of(name: str, seed: int = 0) -> Recipe:
    """The recipe with a training seed; nothing is measured within the run.

    Args:
        name: a recipe's name; ``name/no-gan`` switches its adversarial term off, ``name/no-gan-equal-cost`` spends
            the time saved on more steps, ``name/budget`` lasts for ``BUDGET`` network evaluations (``name/budget-all``
            too, whose student is measured at ``ALL_STEPS``), ``name/apart`` puts each role's adapters on a network of
            its own.
        seed: of training, warm starts included.

    Raises:
        ValueError: for an unknown recipe or variant.
    """
    base, _, variant = name.partition("/")
    recipe = find(base)
    if variant in ("no-gan", "no-gan-equal-cost"):
        objective = replace(recipe.objective, gan=replace(recipe.objective.gan, weight=0.0))
        recipe = replace(recipe, objective=objective)
    elif variant in ("budget", "budget-all"):
        recipe = on_budget(recipe)
    elif variant == "apart":
        recipe = apart(recipe)
    elif variant:
        raise ValueError(f"{name}: variants are no-gan, no-gan-equal-cost, budget, budget-all and apart")
    if variant == "no-gan-equal-cost":
        recipe = replace(recipe, run=replace(recipe.run, steps=round(GAN_COST * recipe.run.steps)))
    return replace(reseeded(recipe, seed), evaluation=None)


def on_budget(recipe: Recipe) -> Recipe:
    """The recipe with the updates of all stages scaled alike, so that they and the data take ``BUDGET`` evaluations.

    Raises:
        ValueError: if making the data takes half of it or more.
    """
    stages = plan(recipe)
    made = sum(s.data for s in stages)
    if made >= BUDGET / 2:
        raise ValueError(f"making the data takes {made:,} network evaluations of {BUDGET:,}")
    factor = (BUDGET - made) / sum(s.evaluations - s.data for s in stages)

    def scaled(stage: Recipe) -> Recipe:
        run = replace(stage.run, steps=round(factor * stage.run.steps))
        return replace(stage, run=run, warm_start=stage.warm_start and scaled(stage.warm_start))

    return scaled(recipe)


def apart(recipe: Recipe) -> Recipe:
    """The recipe with every adapted role on a copy of the teacher's network instead of the network itself."""
    student, critic = (replace(w, own_base=w.form == "lora") for w in (recipe.student, recipe.critic))
    return replace(recipe, student=student, critic=critic, warm_start=recipe.warm_start and apart(recipe.warm_start))


def put_into_readme(name: str, text: str) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` in README.md.

    Raises:
        ValueError: if they do not stand there.
    """
    readme = Path(__file__).resolve().parents[1] / "README.md"
    if not readme.read_text().count(f"<!-- {name}:begin -->") == readme.read_text().count(f"<!-- {name}:end -->") == 1:
        raise ValueError(f"README.md has no place for the table: <!-- {name}:begin --> and <!-- {name}:end -->")
    head, _, rest = readme.read_text().partition(f"<!-- {name}:begin -->")
    _, _, tail = rest.partition(f"<!-- {name}:end -->")
    readme.write_text(f"{head}<!-- {name}:begin -->\n{text}<!-- {name}:end -->{tail}")


@dataclass(frozen=True)
class Measured:
    """How runs are measured."""

    n: int
    """Images per evaluation."""
    runs: Path = RUNS
    """Where the runs lie."""


def run_one(name: str, seed: int, how: Measured) -> list[Record]:
    """Train one recipe with one seed and measure its student, and those of its stages; records are kept."""
    torch.set_num_threads(1)
    out = how.runs / name.replace("/", "-") / f"seed{seed}"
    stored = out / f"records-{how.n}.json"
    if stored.is_file():
        return load_records(stored)
    recipe = recipe_of(name, seed)
    anew, start = not out.exists(), time.monotonic()
    done = distill(recipe, out)
    seconds = time.monotonic() - start
    evaluator = evaluator_for(done.opened, how.n)
    students = {name: (recipe, done.student)}
    for stage, folder in zip(recipe.stages(), sorted((out / "stages").glob("*")), strict=False):
        student = load_student(folder / "pipeline")  # each stage is a student of its own
        label = f"{type(stage.objective).__name__}, {student.sampler.steps} step{'s' * (student.sampler.steps > 1)}"
        students[f"{name}, after {label}"] = (stage, student)
    records = []
    for title, (stage, student) in students.items():
        method = type(stage.objective).__name__
        for each in at_all_steps(student, name) if name.endswith("/budget-all") else (student,):
            records += bench_student(each, done.opened, evaluator, [0], subject=f"{title} #{seed}", method=method)
    if anew:  # otherwise part of the time was spent in an earlier call
        none = {"extractor_sha256": None, "reference_sha256": None}
        records.append(dataclasses.replace(records[0], metric="training_seconds", value=seconds, values=[], **none))
    save_records(stored, records)
    return records


def at_all_steps(student: Student, name: str) -> list[Student]:
    """One student on the grid of each of ``ALL_STEPS``."""
    samplers = [find(f"{name.partition('@')[0]}@{k}").sampler for k in ALL_STEPS]
    return [Student(s, student.net, student.schedule, student.kind, student.call, student.dtype) for s in samplers]


def teacher_records(teacher: Teacher, steps: Sequence[int], how: Measured) -> list[Record]:
    """The teacher at several step counts; records are kept."""
    kept = how.runs / f"teacher-{teacher.source.rpartition(':')[2]}-{teacher.guidance:g}-{how.n}.json"
    if not kept.is_file():
        opened = open_teacher(teacher)
        save_records(kept, bench_teacher(guided(opened, teacher), opened, evaluator_for(opened, how.n), steps, [0]))
    return load_records(kept)


def run_all(
    recipes: Sequence[str],
    seeds: Sequence[int],
    teachers: Sequence[Teacher],
    steps: Sequence[int],
    how: Measured,
    jobs: int,
) -> list[Record]:
    """Everything that is not there yet, in ``jobs`` processes: teachers first, then recipes, all seeds of each."""
    each = [(name, seed) for seed in seeds for name in recipes]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(run_one, name, seed, how) for name, seed in each]
        records = [r for teacher in teachers for r in teacher_records(teacher, steps, how)]
        found = {job: future.result() for job, future in zip(each, pending, strict=True)}
    return records + [r for name in recipes for seed in seeds for r in found[name, seed]]


SPREAD = "Means over training seeds ± half widths of their 95 % intervals; a single run has two digits and no ±."


def cell(values: Sequence[float]) -> str:
    """Runs that differ by their training seed, in a table: no digit that their interval does not support."""
    return format_value(*mean_and_ci95(values))


def table(records: list[Record], metrics: Sequence[str]) -> str:
    """One line for each subject and way of sampling, its training seeds together; see ``cell``.

    Args:
        records: of one protocol.
        metrics: columns.
    """
    check_same_protocol([r for r in records if r.metric in metrics])
    rows: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for r in records:
        key = (r.subject.split(" #")[0], r.steps, r.sampler)
        rows.setdefault(key, {}).setdefault(r.metric, []).append(r.value)
    head = ["subject", "steps", "sampler", "seeds", *metrics]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (subject, steps, sampler), values in rows.items():
        cells = [subject, str(steps), sampler, str(len(values["fd"]))]
        cells += [cell(values[metric]) for metric in metrics]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
