"""Killed with SIGKILL and started again by the same command, a run ends as if nothing had happened.

``eval/crash.py`` does the same many times over, at random moments.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from safetensors import safe_open

from stepdistill import cli, distributed
from tests.processes import started

RECIPE = '''"""A small run."""
from stepdistill.data import DigitsData
from stepdistill.objectives import DMD2
from stepdistill.recipe import Recipe, Teacher
from stepdistill.trainer import AdamW, Run


def dmd2() -> Recipe:
    """DMD2 with a GAN."""
    optim = dict.fromkeys(("student", "critic", "disc"), AdamW())
    run = Run(steps=10, batch=4, log_every=2, save_every=2, threads=1)
    return Recipe(Teacher("bundled:digits"), DMD2(student_every=2), DigitsData(), optim, run=run)
'''


def command(out: Path, args: list[str], world: int, rank: int, port: int, slow: bool) -> None:
    """One process of ``stepdistill distill``, as a launcher starts it; what it says goes to files."""
    if slow:  # a disk that takes its time, so that there is a moment to be killed at
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(0.3), fsync(file))[1]
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said, wrong = (out.parent / f"{out.name}.{rank}.{name}" for name in ("out", "err"))
    with said.open("w") as a, wrong.open("w") as b, redirect_stdout(a), redirect_stderr(b):
        cli.main(["distill", f"{out.parent / 'recipe.py'}:dmd2", "--out", str(out), *args])


def start(out: Path, *args: str, world: int = 1, slow: bool = False) -> list[BaseProcess]:
    """All processes of the command."""
    (out.parent / "recipe.py").write_text(RECIPE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [started(command, out, list(args), world, rank, port, slow) for rank in range(world)]


def ended(processes: list[BaseProcess]) -> list[int | None]:
    """Exit codes."""
    for process in processes:
        process.join(240)
    return [process.exitcode for process in processes]


def kill_when(processes: list[BaseProcess], ready: Callable[[], bool]) -> None:
    """SIGKILL to the last process once it is time, and then to the others, as launchers do."""
    deadline = time.monotonic() + 240
    while not ready():
        assert all(process.is_alive() for process in processes) and time.monotonic() < deadline
        time.sleep(0.002)
    for process in reversed(processes):
        process.kill()
    ended(processes)


def fingerprint(out: Path) -> tuple[str, bytes, bytes]:
    """Of all weights, averages and moments; the metrics; the exported weights."""
    with safe_open(out / "checkpoints" / "00000010.safetensors", framework="pt") as file:
        checkpoint = file.metadata()["sha256"]
    (weights,) = (out / "pipeline").glob("*/*.safetensors")
    return checkpoint, (out / "metrics.jsonl").read_bytes(), weights.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Whole runs, in one process and in two."""
    found = {world: tmp_path_factory.mktemp(f"world{world}") / "run" for world in (1, 2)}
    for world, out in found.items():
        assert ended(start(out, world=world)) == [0] * world
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_three_times_ends_bit_for_bit_as_one_that_was_not(
    world: int, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    """Before its first checkpoint, between two, and while one is half written."""
    out = tmp_path / "run"
    kill_when(start(out, world=world), lambda: (out / "recipe.json").is_file())
    kill_when(start(out, world=world), lambda: len(list(out.glob("checkpoints/[0-9]*"))) >= 1)
    saved = {path.name for path in out.glob("checkpoints/[0-9]*")}
    kill_when(start(out, world=world, slow=True), lambda: any(out.glob("checkpoints/.*.part")))
    assert any(out.glob("checkpoints/.*.part")) and saved & {path.name for path in out.glob("checkpoints/[0-9]*")}
    assert ended(start(out, world=world)) == [0] * world
    assert fingerprint(out) == fingerprint(undisturbed[world])
    assert not any(out.glob("checkpoints/.*"))


def test_two_processes_go_on_with_what_one_has_begun_and_in_shards(
    undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    """Within rounding: as many go on as there are, whole or in shards, and one takes over from them again."""
    out = tmp_path / "run"
    for logged, args, world in ((2, [], 1), (4, [], 2), (6, ["--placement.shard"], 2)):
        kill_when(start(out, *args, world=world), partial(_has_logged, out, logged))
    assert ended(start(out)) == [0]
    mine, whole = (_lines(path) for path in (out, undisturbed[1]))
    assert [line.keys() for line in mine] == [line.keys() for line in whole]
    for a, b in zip(mine, whole, strict=True):
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-3, abs=1e-6)


def _lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _has_logged(out: Path, step: int) -> bool:
    return (out / "metrics.jsonl").is_file() and any(line["step"] >= step for line in _lines(out))


def test_the_main_process_alone_speaks_and_an_error_is_one_line_of_one_process(
    undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    out = undisturbed[2]
    said = [(out.parent / f"run.{rank}.{name}").read_text() for rank in (0, 1) for name in ("out", "err")]
    assert "load the student with:" in said[0] and "dmd2  10/10" in said[1]
    assert said[2:] == ["", ""]

    codes = ended(start(tmp_path / "odd", "--run.batch", "5", world=2))
    assert codes == [2, 2] and not (tmp_path / "odd").exists()
    wrong = "".join((tmp_path / f"odd.{rank}.err").read_text() for rank in (0, 1))
    assert wrong == "stepdistill: run.batch 5 is shared by 2 processes: use a multiple of 2\n"


def test_other_commands_refuse_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(distributed, "launched", lambda: 2)
    with pytest.raises(SystemExit):
        cli.main(["methods"])
    assert capsys.readouterr().err == "stepdistill: methods runs in one process; a launcher is for distill\n"
