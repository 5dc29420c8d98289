"""Suites on the bundled digits: ``stepdistill bench digits_teacher``, ``stepdistill bench digits_published``."""

from __future__ import annotations

from pathlib import Path

from stepdistill.bench import Subject, Suite
from stepdistill.recipe import Teacher
from stepdistill.sampling import Ddim, DpmPP2M, Heun

RUNS = Path(__file__).resolve().parents[2] / "runs" / "eval"
PUBLISHED = ("quickstart_1step", "quickstart_4step", "dmd2", "dmd2_4step", "cd", "tscd", "ladd")


def digits_teacher() -> Suite:
    """The teacher alone: three solvers, and what a long run is worth."""
    return Suite(Teacher("bundled:digits"), teacher_steps=(1, 2, 4, 8, 16), solvers=(Ddim(), DpmPP2M(), Heun()))


def digits_published() -> Suite:
    """The students of README's table that lie under runs/eval (``python eval/digits.py`` trains them)."""
    folders = [(name, RUNS / f"digits_{name}" / "seed0") for name in PUBLISHED]
    students = tuple(Subject(str(folder), name) for name, folder in folders if (folder / "pipeline").is_dir())
    return Suite(Teacher("bundled:digits"), students)
