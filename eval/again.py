"""Seconds to ask again for a bench that was measured before: 10 students x 4 step counts beside their teacher.

    python eval/again.py [--out eval/again.json]

The students are untrained copies, each at a scale of its own so that no two share an outcome; their weights do not
matter to the time. Imports are not counted: the same process asks for all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
import tyro

from stepdistill.bench.command import Bench, bench
from stepdistill.bench.suite import Subject, Suite
from stepdistill.build import new_student, open_teacher
from stepdistill.evaluation.records import device_name
from stepdistill.export import save_pipeline
from stepdistill.recipe import Teacher
from stepdistill.sampling import Sampler, trailing


@dataclass(frozen=True)
class Arguments:
    """Asking again."""

    students: int = 10
    """Students, each with a pipeline for 1, 2, 4 and 8 steps."""
    out: Path = Path(__file__).resolve().parent / "again.json"
    """Where results go."""


def main(given: Arguments) -> None:
    """Bench once, then again: into the same folder, into another one, there with all plots to be drawn, and with files'
    hashes to be made as well.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, teacher = Path(temporary), Teacher("bundled:digits")
        opened = open_teacher(teacher)
        for i in range(given.students):
            for k in (1, 2, 4, 8):
                student = new_student(opened, Sampler(trailing(k)))
                with torch.no_grad():
                    next(student.parameters()).mul_(1 + 1e-3 * i)
                save_pipeline(student, opened, folder / f"s{i}" / ("pipeline" if k == 1 else f"pipeline-{k}step"))
        subjects = tuple(Subject(str(folder / f"s{i}"), f"s{i}") for i in range(given.students))
        (folder / "suite.json").write_text(Suite(teacher, subjects, n=50, seeds=(0, 1, 2)).to_json())

        cache, found, processor = folder / "cache", {}, {}

        def ask(name: str, out: str, times: int = 1) -> None:
            """The least of several times, on the clock and of the processor, which is less disturbed."""
            seconds = []
            for _ in range(times):
                start = time.perf_counter(), time.process_time()
                with redirect_stdout(StringIO()):
                    bench(Bench((str(folder / "suite.json"),), out=folder / out, cache=cache))
                seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
                if out != "out":
                    shutil.rmtree(folder / out)
            found[name], processor[name] = (min(column) for column in zip(*seconds, strict=True))

        ask("first", "out")
        ask("again", "out", 3)
        ask("elsewhere", "other", 3)
        for path in cache.glob("??/*.json"):
            if json.loads(path.read_text())["facts"]["what"] == "plots":
                path.unlink()
        ask("elsewhere_with_plots_drawn", "other")
        (cache / "files.json").unlink()
        ask("again_without_hashes", "out")
    found |= {"processor": processor, "load": round(os.getloadavg()[0], 1)}
    found |= {"students": given.students, "steps": [1, 2, 4, 8], "device": device_name("cpu")}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
