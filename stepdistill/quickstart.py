"""The main job in one command: the bundled digits teacher, distilled to one and to four steps."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from stepdistill.distill import distill, evaluate_and_report
from stepdistill.evaluation.records import Record, markdown_table
from stepdistill.export import load_lines
from stepdistill.recipe import Recipe
from stepdistill.recipes import find

TABLE = ("fd", "pix", "precision", "recall", "coverage")
"""Metrics of the short table."""

ONE_STEP, FOUR_STEPS = "digits_quickstart_1step", "digits_quickstart_4step"


def quickstart(out: Path, *, resume: bool = False, seed: int = 0) -> list[Record]:
    """Run the two quickstart recipes through ``distill``, measure them together, and print what came out.

    Args:
        out: run directory of the one-step student; ``out/four_step`` is the other's.
        resume: go on with an interrupted quickstart.
        seed: of training.

    Returns:
        The records in ``out/results.json``.

    Raises:
        ValueError: if ``out`` is in use, as ``distill``.
    """
    start = time.monotonic()
    one, four = (reseeded(find(name), seed) for name in (ONE_STEP, FOUR_STEPS))
    one_done = distill(one, out, resume=resume)
    four_out = out / "four_step"
    four_done = distill(four, four_out, resume=resume and four_out.exists())
    runs = [("student, 1 step", one, one_done), ("student, 4 steps", four, four_done)]
    records = evaluate_and_report(runs, out, title="Digits in one and four steps")
    print(markdown_table(records, TABLE))
    print(f"report: {out / 'report' / 'index.html'}")
    print(
        f"done in {time.monotonic() - start:.0f} s; load the one-step student with:\n\n{load_lines(one_done.pipeline)}"
    )
    print(f"\nand the four-step student the same way from {four_done.pipeline}")
    return records


def reseeded(recipe: Recipe, seed: int) -> Recipe:
    """A recipe and its warm starts with another training seed."""
    warm = reseeded(recipe.warm_start, seed) if recipe.warm_start else None
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seed=seed), warm_start=warm)
