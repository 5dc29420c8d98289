"""Two processes against one at the same global batch: steps per second over twice those of one, one thread each.

    python eval/scaling.py --out eval/scaling.json     # on an idle machine with a core for each process

One process, the pair, and one process with a share of the batch take turns, a few steps each, so that all see the same
machine. The share alone bounds the efficiency: what a step of a small network costs whatever its batch is not shared.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from common import recipe_of

from stepdistill.evaluation.records import device_name, installed_versions


@dataclass(frozen=True)
class Arguments:
    """Measure how training scales."""

    recipes: tyro.conf.Positional[tuple[str, ...]] = ("digits_dmd2", "digits_cd")
    """Names under train/."""
    processes: int = 2
    """Processes that share the batch."""
    batches: tuple[int, ...] = (64, 512)
    """Samples of a global batch."""
    steps: int = 6
    """Steps of a turn; a multiple of how often turns are taken."""
    repeats: int = 7
    """Pairs of turns."""
    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Worker:
    """One process that takes steps when it is told to."""

    recipes: tuple[str, ...]
    batch: int
    """Of all processes together."""
    steps: int
    rank: int
    world: int
    store: str
    """File by which the processes find each other."""

    def __call__(self, orders: Connection) -> None:
        """Take the steps of a recipe whenever its name comes, and say how long they took."""
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        if self.world > 1:
            store = dist.FileStore(self.store, self.world)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world)
        from stepdistill import distributed
        from stepdistill.build import build

        trainers = {}
        for name in self.recipes:
            recipe = recipe_of(name)
            run = replace(recipe.run, batch=self.batch)
            trainers[name] = build(replace(recipe, warm_start=None, run=run)).trainer
            trainers[name].step(0)
        orders.send(None)
        while (name := orders.recv()) is not None:
            distributed.wait()
            start = time.perf_counter()
            for index in range(self.steps):
                trainers[name].step(index)
            distributed.wait()
            orders.send(time.perf_counter() - start)


class Team:
    """Processes that share a batch."""

    def __init__(self, given: Arguments, batch: int, world: int, store: Path):
        spawned = multiprocessing.get_context("spawn")
        self.steps, self.connections = given.steps, []
        for rank in range(world):
            mine, theirs = spawned.Pipe()
            worker = Worker(given.recipes, batch, given.steps, rank, world, str(store))
            spawned.Process(target=worker, args=(theirs,), daemon=True).start()
            self.connections.append(mine)
        for connection in self.connections:
            connection.recv()

    def turn(self, name: str) -> float:
        """Seconds of a step, the slowest process's."""
        for connection in self.connections:
            connection.send(name)
        return max(connection.recv() for connection in self.connections) / self.steps

    def dismiss(self) -> None:
        """Let the processes end."""
        for connection in self.connections:
            connection.send(None)


def main(given: Arguments) -> list[dict[str, object]]:
    """Print and return one row per batch and recipe."""
    rows = [row for batch in given.batches for row in measure(given, batch)]
    if given.out:
        record = {"device": device_name("cpu"), "threads": 1, "versions": installed_versions(), "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return rows


def measure(given: Arguments, batch: int) -> list[dict[str, object]]:
    """One row per recipe."""
    n, rows = given.processes, []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        one, many, share = (Team(given, b, w, store) for b, w in ((batch, 1), (batch, n), (batch // n, 1)))
        for name in given.recipes:
            turns = [(one.turn(name), many.turn(name), share.turn(name)) for _ in range(given.repeats)]
            ratios = sorted(a / b / n for a, b, _ in turns)
            names = ("one process", f"{n} processes", "one process, its share")
            middles = [1e3 * statistics.median(seconds) for seconds in zip(*turns, strict=True)]
            rows.append(
                {
                    "recipe": name,
                    "batch": batch,
                    "milliseconds": {label: round(value, 2) for label, value in zip(names, middles, strict=True)},
                    "efficiency": round(statistics.median(ratios), 4),
                    "lowest": round(ratios[0], 4),
                    "highest": round(ratios[-1], 4),
                    "without communication": round(statistics.median(a / c / n for a, _, c in turns), 4),
                }
            )
            print(json.dumps(rows[-1]))
        for team in (one, many, share):
            team.dismiss()
    return rows


if __name__ == "__main__":
    main(tyro.cli(Arguments))
