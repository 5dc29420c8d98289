"""What a checkpoint costs the training loop, in steps: the call that copies the state, and the step beside the writer.

    python eval/checkpoint.py --out eval/checkpoint.json

A step without, a step that is followed by a checkpoint, and the step during which it is written take turns.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from common import recipe_of

from stepdistill.build import build
from stepdistill.data import TeacherPairs
from stepdistill.evaluation.records import device_name, installed_versions


@dataclass(frozen=True)
class Arguments:
    """Measure the cost of checkpoints."""

    recipes: tyro.conf.Positional[tuple[str, ...]] = ("digits_dmd2", "digits_kd", "shapes_sd_dmd2")
    """Names under train/."""
    repeats: int = 21
    """Checkpoints of each."""
    threads: int = 1
    """Of torch."""
    out: Path | None = None
    """JSON file to write."""


def main(given: Arguments) -> list[dict[str, object]]:
    """Print and return one row per recipe."""
    torch.set_num_threads(given.threads)
    rows = [measure(name, given.repeats) for name in given.recipes]
    if given.out:
        record = {"device": device_name("cpu"), "threads": given.threads, "versions": installed_versions()}
        given.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    return rows


def measure(name: str, repeats: int) -> dict[str, object]:
    """Medians of one recipe, in its own batches."""
    recipe = recipe_of(name)
    data = replace(recipe.data, count=recipe.run.batch) if isinstance(recipe.data, TeacherPairs) else recipe.data
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(replace(recipe, warm_start=None, data=data), out=Path(folder)).trainer

        def step() -> None:
            # steps at which all turns are due, so that all are alike
            trainer.step(0)
            trainer.index += 1

        step()
        trainer.save()
        trainer.checkpoints.finish()
        plain, call, beside, alone = [], [], [], []
        for _ in range(repeats):
            plain.append(seconds(step))
            call.append(seconds(trainer.save))
            beside.append(seconds(step))
            trainer.checkpoints.finish()
            trainer.save()
            alone.append(seconds(trainer.checkpoints.finish))
        size = trainer.checkpoints.paths()[-1].stat().st_size
    usual, copying = statistics.median(plain), statistics.median(call)
    row = {
        "recipe": name,
        "megabytes": round(size / 1e6, 2),
        "step_milliseconds": round(1e3 * usual, 2),
        "call_milliseconds": round(1e3 * copying, 2),
        "write_milliseconds": round(1e3 * statistics.median(alone), 2),
        "call_over_step": round(copying / usual, 4),
        "call_and_slower_step_over_step": round((copying + statistics.median(beside) - usual) / usual, 4),
    }
    print(json.dumps(row))
    return row


def seconds(do: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Arguments))
