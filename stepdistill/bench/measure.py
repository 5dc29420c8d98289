"""Measuring what is not in the cache: scores and verdicts of each row and seed, pictures to look at, seconds.

Rows are spread over processes, each of which keeps its outcomes in the cache as soon as it has them, so that a bench
that was stopped goes on where it was. Times are taken afterwards, one row after the other with nothing beside them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.bench.cache import Cache, key_of
from stepdistill.bench.opening import Sampled, open_row, open_suite
from stepdistill.bench.rows import Row, teacher_hash
from stepdistill.bench.suite import Suite
from stepdistill.evaluation.benchmark import Graded, Itemised, all_pictures, arithmetic, seconds_per_image
from stepdistill.evaluation.columns import SECONDS, metric_info
from stepdistill.evaluation.grids import png_of
from stepdistill.evaluation.records import device_name, installed_versions
from stepdistill.logging import Progress
from stepdistill.paths import project_dir
from stepdistill.placement import check_device

SHOWN_SEED = 1_000_003
"""Of pictures to look at; away from the seeds of evaluations."""
SMALL = 4096
"""Numbers in a sample up to which forty are shown together; of larger ones four are."""
START = "spawn"
"""How processes begin: with nothing of this one's, since forked threads and devices do not survive."""
FAILURES = 10
"""Pictures kept of what went wrong, of the first seed."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """Everything that a row's outcomes depend on, by what is asked: keys of the cache."""

    row: Row
    scores: dict[int, Facts]
    """By seed."""
    look: Facts
    time: Facts


def asked_of(suite: Suite, rows: Sequence[Row], cache: Cache) -> list[Asked]:
    """What there is to know of each row, as facts to be looked up."""
    judges = _judges(suite)
    t = suite.teacher
    common = {
        "teacher": teacher_hash(t, cache),
        "asked_of_teacher": {"interval": t.interval, "negative": t.negative, "size": t.size, "range": t.guidance_range},
        "judge": suite.judge.rpartition(":")[2],
        "judges": [cache.file_hash(p) for p in judges],
        "n": suite.n,
        "device": suite.device,
        "versions": installed_versions(),
        "code": cache.code_hash(),
    }
    check_device("device", suite.device)
    # seconds are the machine's own; numbers of images are not, up to rounding
    machine = f"{os.uname().nodename}, {device_name(suite.device)}"
    found = []
    for row in rows:
        own = common | row.facts()
        scores = {seed: own | {"what": "scores", "seed": seed} for seed in suite.seeds}
        look = own | {"what": "look", "seed": SHOWN_SEED}
        found.append(Asked(row, scores, look, own | {"what": "time", "machine": machine}))
    return found


def _judges(suite: Suite) -> list[Path]:
    """Files that decide what an image is worth."""
    if suite.judge:
        files = [Path(suite.judge.rpartition(":")[0]), *map(Path, suite.judge_files)]
        missing = next((path for path in files if not path.is_file()), None)
        if missing:
            raise FileNotFoundError(f"judge {suite.judge!r}: no file {missing}")
        return files
    shapes = project_dir("assets") / "shapes-judges"
    return [project_dir("assets") / "digits" / "classifier.safetensors", *sorted(shapes.rglob("*.*"))]


def measure(suite: Suite, asked: Sequence[Asked], cache: Cache, jobs: int) -> int:
    """Fill the cache with everything that is asked and not there; returns how many outcomes had to be measured.

    Raises:
        ValueError: if a row cannot be opened; before anything is measured.
        OSError: if a process died.
    """
    missing = []
    for one in asked:
        seeds = [seed for seed, facts in one.scores.items() if cache.load(key_of(facts)) is None]
        look = cache.load(key_of(one.look)) is None
        if seeds or look:
            missing.append((one, seeds, look))
    untimed = [one for one in asked if cache.load(key_of(one.time)) is None]
    if missing or untimed:
        open_suite(suite)  # so that a teacher that cannot be judged is found before anything begins
        for row in dict.fromkeys(one.row for one in [*(one for one, _, _ in missing), *untimed]):
            if row.kind != "teacher":
                open_row(row, suite)  # nor are hours spent on others before one turns out to be damaged
    with Progress("bench", 0, sum(len(seeds) + look for _, seeds, look in missing) + len(untimed)) as progress:
        if jobs > 1 and len(missing) > 1:
            _in_processes(suite, missing, cache, min(jobs, len(missing)), progress)
        else:
            for one, seeds, look in missing:
                progress.advance(measure_row(suite, one, seeds, look, cache))
        for one in untimed:
            sampled = open_row(one.row, suite)
            seconds = seconds_per_image(sampled.predict, sampled.sampler, sampled.opened, sampled.cond, suite.n)
            device = device_name(next(sampled.predict.parameters()).device)
            cache.save(key_of(one.time), one.time, {"seconds": seconds, "device": device})
            progress.advance()
    return sum(len(seeds) + look for _, seeds, look in missing) + len(untimed)


def measure_row(suite: Suite, asked: Asked, seeds: Sequence[int], look: bool, cache: Cache) -> int:
    """Measure one row at some seeds, and make its pictures; returns the number of outcomes."""
    sampled = open_row(asked.row, suite)
    _, evaluator = open_suite(suite)
    for seed in seeds:
        images = all_pictures(sampled.predict, sampled.sampler, sampled.opened, sampled.cond, suite.n, seed=seed)
        graded = isinstance(evaluator, Graded) and evaluator.grade
        scores, grades = evaluator.scores_and_grades(images) if graded else (evaluator.scores(images), None)
        value = _facts_of(sampled, evaluator) | {"scores": scores}
        value["protocols"] = {metric: evaluator.protocol(metric) for metric in (*scores, SECONDS)}
        if isinstance(evaluator, Itemised):
            right = evaluator.right(images)
            wrong = (~right).nonzero().flatten()
            value |= {"right": "".join("01"[int(r)] for r in right)} | _items(evaluator, images, wrong, seed, suite)
        elif graded:
            worst = grades.argsort(descending=metric_info(evaluator.grade).better == "lower", stable=True)
            value |= {"grade": evaluator.grade, "grades": [float(f"{g:.5g}") for g in grades.tolist()]}
            value |= _items(evaluator, images, worst, seed, suite)
        facts = asked.scores[seed]
        cache.save(key_of(facts), facts, value)
    if look:
        cache.save(key_of(asked.look), asked.look, _look(sampled, evaluator))
    return len(seeds) + look


def _facts_of(sampled: Sampled, evaluator: object) -> dict[str, Any]:
    """What a record says besides its number."""
    return {
        "sampler": sampled.sampler_name,
        "nfe": sampled.nfe,
        "guidance": sampled.guidance,
        "device": device_name(next(sampled.predict.parameters()).device),
        "dtype": arithmetic(sampled.predict),
        "versions": installed_versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _look(sampled: Sampled, evaluator: Any) -> dict[str, Any]:
    """Pictures of what is asked first, on the noise that every row is shown on."""
    small = math.prod(sampled.opened.sample_shape) <= SMALL
    rows, columns = (4, min(10, evaluator.n)) if small else (1, min(4, evaluator.n))
    cond = {k: v[:columns].repeat(rows, *[1] * (v.ndim - 1)) for k, v in sampled.cond.items()}
    n = rows * columns
    images = all_pictures(sampled.predict, sampled.sampler, sampled.opened, cond, n, seed=SHOWN_SEED)
    captions = evaluator.asked()[:columns] if isinstance(evaluator, Itemised | Graded) else []
    return {"png": png_of(images, columns), "shape": list(images.shape), "columns": columns, "captions": captions}


def _items(evaluator: Any, images: Tensor, worst: Tensor, seed: int, suite: Suite) -> dict[str, Any]:
    """What was asked for, and of the first seed pictures of the worst, given by their places."""
    worst, failures = worst[:FAILURES], None
    if len(worst) and seed == suite.seeds[0]:
        failures = {"png": png_of(images[worst], len(worst)), "items": worst.tolist()}
    return {"asked": evaluator.asked(), "failures": failures}


def _in_processes(suite: Suite, missing: Sequence[tuple], cache: Cache, jobs: int, progress: Progress) -> None:
    before = set(multiprocessing.active_children())
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context(START)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(threads,)) as pool:
        try:
            pending = [pool.submit(_in_process, suite, one, seeds, look, cache.folder) for one, seeds, look in missing]
            for done in as_completed(pending):
                progress.advance(done.result())
        except BrokenProcessPool as error:
            raise OSError(
                "a process of the bench was killed, for want of memory perhaps; what was measured is kept: run the "
                "same command again, with fewer --jobs"
            ) from error
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):  # their outcomes so far are kept
                for process in set(multiprocessing.active_children()) - before:
                    process.terminate()
            raise


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the parent's to handle
    torch.set_num_threads(threads)


def _in_process(suite: Suite, asked: Asked, seeds: Sequence[int], look: bool, folder: Path) -> int:
    return measure_row(suite, asked, seeds, look, Cache(folder))


@dataclass(frozen=True)
class Outcome:
    """What is known of a row."""

    row: Row
    scores: dict[int, dict[str, Any]]
    """By seed: see ``measure_row``."""
    look: dict[str, Any]
    seconds: list[float]
    """Of one image, several timings."""
    device: str


def outcomes(asked: Sequence[Asked], cache: Cache) -> list[Outcome]:
    """Every row's outcomes, once all are measured."""
    return [
        Outcome(
            one.row,
            {seed: cache.load(key_of(facts)) for seed, facts in one.scores.items()},
            cache.load(key_of(one.look)),
            **cache.load(key_of(one.time)),
        )
        for one in asked
    ]
