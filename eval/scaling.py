"""Two processes against one at the same global batch: steps per second over twice those of one, one thread each.

    python eval/scaling.py --out eval/scaling.json     # on an idle machine with a core for each process

One process and the pair take turns, a few steps each, so that both see the same machine.
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
    batch: int = 64
    """Samples of a global batch."""
    steps: int = 6
    """Steps of a turn; a multiple of how often turns are taken."""
    repeats: int = 11
    """Pairs of turns."""
    out: Path | None = None
    """JSON file to write."""


def work(names: tuple[str, ...], batch: int, steps: int, rank: int, world: int, store: str, orders: Connection) -> None:
    """One process: takes ``steps`` steps of a recipe whenever its name comes, and says how long they took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if world > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    from stepdistill import distributed
    from stepdistill.build import build

    trainers = {}
    for name in names:
        recipe = recipe_of(name)
        trainers[name] = build(replace(recipe, warm_start=None, run=replace(recipe.run, batch=batch))).trainer
        trainers[name].step(0)
    orders.send(None)
    while (name := orders.recv()) is not None:
        distributed.wait()
        start = time.perf_counter()
        for index in range(steps):
            trainers[name].step(index)
        distributed.wait()
        orders.send(time.perf_counter() - start)


def main(given: Arguments) -> list[dict[str, object]]:
    """Print and return one row per recipe."""
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends: dict[int, list[Connection]] = {1: [], given.processes: []}
        for world, connections in ends.items():
            for rank in range(world):
                mine, theirs = spawned.Pipe()
                args = (given.recipes, given.batch, given.steps, rank, world, f"{folder}/{world}", theirs)
                spawned.Process(target=work, args=args, daemon=True).start()
                connections.append(mine)
        everyone = [c for connections in ends.values() for c in connections]
        for connection in everyone:
            connection.recv()

        def turn(world: int, name: str) -> float:
            for connection in ends[world]:
                connection.send(name)
            return max(connection.recv() for connection in ends[world]) / given.steps

        rows = []
        for name in given.recipes:
            pairs = [(turn(1, name), turn(given.processes, name)) for _ in range(given.repeats)]
            ratios = sorted(one / many / given.processes for one, many in pairs)
            rows.append(
                {
                    "recipe": name,
                    "batch": given.batch,
                    "milliseconds": {
                        "1": round(1e3 * statistics.median(one for one, _ in pairs), 2),
                        str(given.processes): round(1e3 * statistics.median(many for _, many in pairs), 2),
                    },
                    "efficiency": round(statistics.median(ratios), 4),
                    "lowest": round(ratios[0], 4),
                    "highest": round(ratios[-1], 4),
                }
            )
            print(json.dumps(rows[-1]))
        for connection in everyone:
            connection.send(None)
    if given.out:
        record = {"device": device_name("cpu"), "threads": 1, "versions": installed_versions(), "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main(tyro.cli(Arguments))
