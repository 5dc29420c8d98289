"""Images a second within a bench over a bare sampler loop, on the digits: what a bench costs besides the network.

    python eval/throughput.py [--out eval/throughput.json]

The bare loop draws each batch's noise at once and calls nothing but the sampler; the bench gives every image a
generator of its own, decodes, and converts to uint8. Both alternate, and the ratio of each pair is kept.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from stepdistill.build import new_student, open_teacher
from stepdistill.evaluation.benchmark import AT_ONCE, all_pictures, conditions, evaluator_for
from stepdistill.evaluation.records import device_name
from stepdistill.recipe import Teacher
from stepdistill.sampling import Sampler, trailing


@dataclass(frozen=True)
class Arguments:
    """Throughput of generation."""

    steps: tuple[int, ...] = (1, 4)
    """Of the student; its weights do not matter to its speed."""
    n: int = 2000
    """Images of one timing."""
    pairs: int = 9
    """Alternating timings of each kind."""
    out: Path = Path(__file__).resolve().parent / "throughput.json"
    """Where results go."""


def seconds(code: Callable[[], object]) -> float:
    """Of processor time, which other processes on the machine do not add to."""
    start = time.process_time()
    code()
    return time.process_time() - start


@torch.no_grad()
def main(given: Arguments) -> None:
    """Time both loops in turn and keep the ratios."""
    torch.set_num_threads(1)
    opened = open_teacher(Teacher("bundled:digits"))
    cond = conditions(opened, evaluator_for(opened, given.n))
    rows = []
    for steps in given.steps:
        student = new_student(opened, Sampler(trailing(steps))).eval()

        def bare(student=student) -> None:
            rng = torch.Generator().manual_seed(0)
            for start in range(0, given.n, AT_ONCE):
                part = {k: v[start : start + AT_ONCE] for k, v in cond.items()}
                noise = torch.randn(min(AT_ONCE, given.n - start), *opened.sample_shape, generator=rng)
                student.sampler.run(student, noise, part, rng)

        def bench(student=student) -> None:
            all_pictures(student, student.sampler, opened, cond, given.n, seed=0)

        bare(), bench()  # warm
        pairs = [(seconds(bare), seconds(bench)) for _ in range(given.pairs)]
        ratios = sorted(a / b for a, b in pairs)
        rows.append(
            {
                "steps": steps,
                "ratio": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
                "bare_seconds_per_image": statistics.median(a for a, _ in pairs) / given.n,
                "bench_seconds_per_image": statistics.median(b for _, b in pairs) / given.n,
            }
        )
        print(rows[-1])
    text = {"n": given.n, "pairs": given.pairs, "clock": "process time", "device": device_name("cpu"), "rows": rows}
    given.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
