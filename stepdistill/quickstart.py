"""The main job in one command: the bundled digits teacher, distilled to one and to four steps."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch

from stepdistill.distill import claim, distill, evaluate_and_report, write_recipe
from stepdistill.evaluation.records import Record
from stepdistill.evaluation.tables import markdown_table
from stepdistill.export import load_lines
from stepdistill.logging import Progress
from stepdistill.recipe import Recipe
from stepdistill.recipes import find

TABLE = ("fd", "pix", "precision", "recall", "coverage")
"""Metrics of the short table."""

ONE_STEP, FOUR_STEPS = "digits_quickstart_1step", "digits_quickstart_4step"


def quickstart(out: Path, *, resume: bool = True, seed: int = 0) -> list[Record]:
    """Run the two quickstart recipes through ``distill``, one per core, measure them together, and print the outcome.

    Args:
        out: run directory of the one-step student; ``out/four_step`` is the other's.
        resume: go on with the quickstart that is there, if there is one; otherwise it is refused.
        seed: of training.

    Returns:
        The records in ``out/results.json``.

    Raises:
        ValueError: if ``out`` is in use, as ``distill``.
    """
    start = time.monotonic()
    one, four = (reseeded(find(name), seed) for name in (ONE_STEP, FOUR_STEPS))
    four_out = out / "four_step"
    claim(out, one, resume)
    write_recipe(out, one)
    # In a session of its own, so that ^C reaches this process alone. This one passes it on, once (a second would not be
    # waited for), and the other saves a checkpoint too.
    before = set(multiprocessing.active_children())
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned, initializer=os.setsid) as other_core:
        four_run = other_core.submit(_in_background, four, four_out)
        try:
            one_done = distill(one, out)
            _wait(four_run, four, four_out)
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise
    four_done = distill(four, four_out)  # it is finished: this loads it
    runs = [("student, 1 step", one, one_done), ("student, 4 steps", four, four_done)]
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # training wants one thread, sampling in large batches all of them
    try:
        records = evaluate_and_report(runs, out, title="Digits in one and four steps")
    finally:
        torch.set_num_threads(threads)
    print(markdown_table(records, TABLE))
    print(f"report: {out / 'report' / 'index.html'}")
    print(f"done in {time.monotonic() - start:.0f} s; load the one-step student with:\n")
    print(load_lines(one_done.pipeline))
    print(f"and the four-step student the same way from {four_done.pipeline}")
    return records


def _in_background(recipe: Recipe, out: Path) -> None:
    """A run whose progress goes to a file beside ``out``: the terminal shows the other one."""
    with (out.parent / f"{out.name}.log").open("a") as log, contextlib.redirect_stderr(log):
        distill(recipe, out)


def _wait(run: Future[None], recipe: Recipe, out: Path) -> None:
    """Show how far the other process is until it ends; raises what it raised."""
    title = f"{type(recipe.objective).__name__.lower()}, {recipe.sampler.steps} steps"
    with Progress(title, 0, recipe.run.steps) as bar:
        while not run.done():
            lines = (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").is_file() else 0
            bar.advance(min(lines * recipe.run.log_every, recipe.run.steps) - bar.done)
            time.sleep(0.5)
    run.result()
    for line in (out.parent / f"{out.name}.log").read_text().splitlines():
        if "Warning: " in line:  # a discriminator at chance, say; the rest of the log is progress
            print(line.partition("Warning: ")[2], file=sys.stderr)


def reseeded(recipe: Recipe, seed: int) -> Recipe:
    """A recipe and its warm starts with another training seed."""
    warm = reseeded(recipe.warm_start, seed) if recipe.warm_start else None
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, seed=seed), warm_start=warm)
