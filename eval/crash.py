"""Kill small runs with SIGKILL at random moments, go on with the same command, and compare bit for bit.

    python eval/crash.py --trials 50                   # 50 in one process, 50 in two; what is done already is kept
    python eval/crash.py --trials 500 & python eval/crash.py --trials 500      # two shells share the work

A trial draws how often it is killed, when, and with two processes which of them. A third of the kills wait for a
checkpoint that is being written. The run is then finished by the same command. Equal are: the checksum of the last
checkpoint (all weights, averages, moments, loss scales, open metrics), and the bytes of metrics.jsonl and of the
exported weights.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors import safe_open

from stepdistill.data import DigitsData
from stepdistill.evaluation.records import installed_versions
from stepdistill.objectives import DMD2
from stepdistill.recipe import Recipe, Teacher
from stepdistill.sampling import Sampler, trailing
from stepdistill.trainer import AdamW, Run

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["stepdistill.distill", "torch.optim"])

RUNS = Path(__file__).resolve().parents[1] / "runs" / "eval" / "crash"

RECIPE = Recipe(
    teacher=Teacher("bundled:digits"),
    objective=DMD2(student_every=2),
    data=DigitsData(),
    optim={name: AdamW(1e-4, decay="cosine", warmup=5) for name in ("student", "critic", "disc")},
    sampler=Sampler(trailing(2)),
    run=Run(steps=30, batch=4, log_every=2, save_every=2, preview_every=10, threads=1),
)


@dataclass(frozen=True)
class Arguments:
    """Kill runs and compare."""

    trials: int = 50
    """Of each number of processes."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes."""
    out: Path | None = None
    """JSON file to write."""


def train(out: Path, rank: int, world: int, port: int) -> None:
    """One process of a run, as a launcher starts it."""
    from stepdistill.distill import distill

    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (out.parent / f"{out.name}.{rank}.log").open("a") as log, redirect_stderr(log), redirect_stdout(log):
        distill(RECIPE, out)


def start(out: Path, world: int) -> list[multiprocessing.process.BaseProcess]:
    """All processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forks.Process(target=train, args=(out, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def end(processes: list[multiprocessing.process.BaseProcess]) -> None:
    """What a launcher does when one of its processes has died."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def fingerprint(out: Path) -> dict[str, str]:
    """What must not differ."""
    last = sorted((out / "checkpoints").glob("[0-9]*.safetensors"))[-1]
    with safe_open(last, framework="pt") as file:
        found = {"checkpoint": f"{last.stem} {file.metadata()['sha256']}"}
    for name in ("metrics.jsonl", *sorted(str(p.relative_to(out)) for p in out.glob("pipeline/*/*.safetensors"))):
        found[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    return found


def trial(number: int, world: int, folder: Path, reference: dict) -> dict[str, object]:
    """One run, killed a few times."""
    rng = random.Random(f"{world} {number}")
    out, kills = folder / f"trial-{number:04d}", []
    shutil.rmtree(out, ignore_errors=True)
    wanted = rng.choice((1, 1, 2, 3))
    while len(kills) < wanted:
        if (out / "pipeline").is_dir():  # it ended before its time had come
            shutil.rmtree(out)
            kills.clear()
        processes, saving = start(out, world), rng.random() < 1 / 3
        moment, begun = rng.uniform(0, reference["seconds"]), time.monotonic()
        parts = rng.randint(1, 8)  # checkpoints begun until the kill
        seen: set[str] = set()
        while any(p.is_alive() for p in processes):
            if saving:
                being_written = _written(out)
                seen |= being_written
                if len(seen) >= parts and being_written:
                    break
            elif time.monotonic() - begun > moment:
                break
            time.sleep(0.0005 if saving else 0.005)
        if all(p.is_alive() for p in processes):
            os.kill(processes[rng.randrange(world)].pid, signal.SIGKILL)
            kills.append({"saving": saving, "second": round(time.monotonic() - begun, 3)})
            time.sleep(rng.choice((0, 0, 0.3)))
        end(processes)
    processes = start(out, world)
    for process in processes:
        process.join(600)
    codes = [process.exitcode for process in processes]
    end(processes)
    found = fingerprint(out) if codes == [0] * world else {"exit codes": str(codes)}
    equal = found == reference["fingerprint"]
    if equal:
        shutil.rmtree(out)
    return {"trial": number, "processes": world, "kills": kills, "equal": equal} | ({} if equal else {"found": found})


def _written(out: Path) -> set[str]:
    """Checkpoints that are half there."""
    return {path.name for path in (out / "checkpoints").glob(".*.part")}


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether nobody else is at it; a lock that ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def reference_of(world: int, folder: Path) -> dict:
    """A run that nobody disturbs: its seconds, and what it comes to."""
    stored = folder / "reference.json"
    with (folder.parent / f"{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stored.is_file():
            warm = forks.Process(target=int)
            warm.start()  # whoever is forked from has imported everything then
            warm.join()
            begun = time.monotonic()
            shutil.rmtree(folder / "reference", ignore_errors=True)
            processes = start(folder / "reference", world)
            for process in processes:
                process.join()
            seconds = time.monotonic() - begun
            value = {"seconds": seconds, "fingerprint": fingerprint(folder / "reference")}
            aside = stored.with_suffix(".part")
            aside.write_text(json.dumps(value))
            aside.replace(stored)
    return json.loads(stored.read_text())


def main(given: Arguments) -> dict[str, object]:
    """Run what is missing, and sum up what is there."""
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((RUNS.parents[2] / "stepdistill").rglob("*.py"))))
    base = RUNS / code.hexdigest()[:12]  # other code, other trials
    for world in given.processes:
        folder = base / f"{world}-processes"
        folder.mkdir(parents=True, exist_ok=True)
        reference = reference_of(world, folder)
        for number in range(given.trials):
            result = folder / f"{number:04d}.json"
            with claimed(folder / f"{number:04d}.lock") as mine:
                if mine and not result.is_file():
                    found = trial(number, world, folder, reference)
                    result.write_text(json.dumps(found))
                    print(
                        f"{world} process(es), trial {number}: {len(found['kills'])} kills, equal: {found['equal']}",
                        flush=True,
                    )
    record = {"recipe": "digits, DMD2 with a GAN, 30 steps, a checkpoint every 2", "versions": installed_versions()}
    for world in given.processes:
        done = [json.loads(p.read_text()) for p in sorted((base / f"{world}-processes").glob("[0-9]*.json"))]
        kills = [kill for one in done for kill in one["kills"]]
        record[f"{world} processes"] = {
            "trials": len(done),
            "equal": sum(one["equal"] for one in done),
            "kills": len(kills),
            "kills while a checkpoint was written": sum(kill["saving"] for kill in kills),
            "different": [one for one in done if not one["equal"]],
        }
    print(json.dumps(record, indent=1))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main(tyro.cli(Arguments))
