"""Resuming is as if nothing had happened; a crash or a full disk costs no checkpoint that was there."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.build import build, open_teacher
from stepdistill.checkpoint import Checkpoints, checksum, read_checkpoint, write_atomically
from stepdistill.data import DigitsData
from stepdistill.logging import MetricsFile
from stepdistill.models.families import Opened
from stepdistill.objective import Batch, Step
from stepdistill.objectives import CD, DMD2
from stepdistill.recipe import Recipe, Teacher
from stepdistill.sampling import Renoise, Sampler, trailing
from stepdistill.trainer import AdamW, Run, Trainer

DIGITS = Teacher("bundled:digits")
SHORT = Run(steps=7, batch=4, log_every=3, save_every=0)
RECIPES = {
    "dmd2": Recipe(
        teacher=DIGITS,
        objective=DMD2(student_every=2),
        data=DigitsData(),
        optim={name: AdamW(1e-3, decay="cosine", warmup=2) for name in ("student", "critic", "disc")},
        sampler=Sampler(trailing(2)),
        run=SHORT,
    ),
    "cd": Recipe(
        teacher=DIGITS,
        objective=CD(),
        data=DigitsData(),
        optim={"student": AdamW(1e-3)},
        sampler=Sampler(trailing(4), Renoise()),
        run=SHORT,
    ),
}


@pytest.fixture(scope="module")
def opened() -> Opened:
    """The bundled teacher, which nobody changes."""
    return open_teacher(DIGITS)


Make = Callable[..., Trainer]


@pytest.fixture
def make(opened: Opened) -> Make:
    """New networks, optimizers and data, as in a new process."""

    def new(name: str, out: Path | None, **run: int) -> Trainer:
        recipe = RECIPES[name]
        return build(replace(recipe, run=replace(recipe.run, **run)), opened=opened, out=out).trainer

    return new


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Everyone's weights and the optimizers' moments, copied."""
    found = {k: v.clone() for k, v in trainer.nets.trainable_state().items()}
    for name, optimizer in trainer.optimizers.items():
        for i, slots in optimizer.state_dict()["state"].items():
            found |= {f"{name}.{i}.{slot}": torch.as_tensor(v).clone() for slot, v in slots.items()}
    return found


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def stopping(data: Callable[[Step], Batch], index: int, stop: Callable[[], None]) -> Callable[[Step], Batch]:
    """A data source that stops the run at ``index``."""

    def source(step: Step) -> Batch:
        if step.index == index:
            stop()
        return data(step)

    return source


def crash() -> None:
    """A process that dies."""
    raise ConnectionError("power cut")


def interrupt() -> None:
    """A user who presses ^C."""
    signal.raise_signal(signal.SIGINT)


# Resuming


@pytest.fixture(scope="module")
def uninterrupted(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, bytes]]:
    """Final state and metrics of whole runs."""
    found = {}
    for name, recipe in RECIPES.items():
        out = tmp_path_factory.mktemp(name)
        trainer = build(recipe, opened=opened, out=out).trainer
        trainer.fit()
        found[name] = state(trainer), (out / "metrics.jsonl").read_bytes()
    return found


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_an_interrupted_run_that_is_resumed_equals_one_that_was_not(
    name: str, steps: int, make: Make, tmp_path: Path, uninterrupted: dict
) -> None:
    """Weights, averages, moments and metrics, also where a line of the log was half collected (steps 1 and 4)."""
    first = make(name, tmp_path)
    first.data = stopping(first.data, steps - 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert first.index == steps

    second = make(name, tmp_path)
    assert second.resume() and second.index == steps
    assert_same_bits(state(second), state(first))
    second.fit()
    assert_same_bits(state(second), uninterrupted[name][0])
    assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted[name][1]


@pytest.mark.parametrize(("at", "kept"), [(2, 0), (5, 4)])
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    at: int, kept: int, make: Make, tmp_path: Path, uninterrupted: dict
) -> None:
    """Lines that were logged after the checkpoint, or before there was any, do not appear twice."""
    first = make("cd", tmp_path, save_every=4, log_every=1)
    first.data = stopping(first.data, at, crash)
    with pytest.raises(ConnectionError):
        first.fit()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "stud')  # it died in the middle of a line
    second = make("cd", tmp_path, save_every=4, log_every=1)
    assert second.resume() == (kept > 0) and second.index == kept
    second.fit()
    assert_same_bits(state(second), uninterrupted["cd"][0])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]


def test_a_finished_run_that_is_resumed_stays_as_it_is(make: Make, tmp_path: Path, uninterrupted: dict) -> None:
    make("cd", tmp_path).fit()
    again = make("cd", tmp_path)
    assert again.resume()
    again.fit()
    assert_same_bits(state(again), uninterrupted["cd"][0])
    assert (tmp_path / "metrics.jsonl").read_bytes() == uninterrupted["cd"][1]


def test_there_is_nothing_to_resume_in_a_new_folder_or_without_one(make: Make, tmp_path: Path) -> None:
    assert make("cd", tmp_path).resume() is False
    assert make("cd", None).resume() is False


def test_a_checkpoint_holds_no_teacher(make: Make, tmp_path: Path) -> None:
    trainer = make("dmd2", tmp_path)
    trainer.save()
    trainer.checkpoints.finish()
    (path,) = trainer.checkpoints.paths()
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    roles = {name.split(".")[1] for name in json.loads(header) if name.startswith("nets.")}
    assert roles == {"student", "critic", "disc", "ema"}


# Damage


@pytest.fixture
def saved(make: Make, tmp_path: Path) -> list[Path]:
    """Checkpoints after 1, 2 and 3 steps."""
    trainer = make("cd", tmp_path, keep_last=3)
    for index in range(3):
        trainer.step(index)
        trainer.index += 1
        trainer.save()
    trainer.checkpoints.finish()
    return trainer.checkpoints.paths()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)


def _flip(where: float) -> Callable[[Path], None]:
    """One bit, at a share of the file's bytes."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 4
        path.write_bytes(content)

    return flip


@pytest.mark.parametrize("damage", [_truncate, _empty, _foreign, *(_flip(k / 10) for k in range(10)), _flip(0.99999)])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    damage: Callable[[Path], None], saved: list[Path], make: Make, tmp_path: Path
) -> None:
    damage(saved[2])
    trainer = make("cd", tmp_path)
    with pytest.warns(UserWarning, match="00000003.safetensors is damaged and passed over"):
        assert trainer.resume()
    assert trainer.index == 2


def test_if_all_checkpoints_are_damaged_one_line_says_so(saved: list[Path], make: Make, tmp_path: Path) -> None:
    for path in saved:
        _truncate(path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"no checkpoint in .* can be read") as caught:
        make("cd", tmp_path).resume()
    assert "\n" not in str(caught.value) and str(caught.value).endswith("start the run anew")


def test_a_checkpoint_of_another_recipe_is_refused_and_nothing_is_loaded(
    saved: list[Path], make: Make, tmp_path: Path
) -> None:
    trainer = make("dmd2", tmp_path)
    before = state(trainer)
    with pytest.raises(ValueError, match=r"00000003.safetensors belongs to another recipe: \S+ differs$"):
        trainer.resume()
    assert_same_bits(state(trainer), before)


@pytest.mark.parametrize("value", [None, [0.9], [0.9, "x"], [0.9, 10**400]])
def test_settings_of_an_optimizer_that_are_none_are_refused_with_the_file_and_a_cure(
    value: object, saved: list[Path], make: Make, tmp_path: Path
) -> None:
    """Whoever writes a checkpoint with the right checksum would otherwise fail within the optimizer, steps later."""
    meta, tensors = read_checkpoint(saved[-1])
    meta["groups"]["student"][0]["betas"] = value
    text = json.dumps(meta)
    save_file(tensors, saved[-1], metadata={"stepdistill": text, "sha256": checksum(text, tensors)})
    with pytest.raises(ValueError, match=rf"{saved[-1].name} does not hold what this run needs .*; move it away"):
        make("cd", tmp_path).resume()


def test_a_bit_of_the_header_that_is_flipped_is_noticed(saved: list[Path], make: Make, tmp_path: Path) -> None:
    """Names, shapes, offsets, metadata: either the file cannot be read, or its checksum is wrong."""
    path, whole = saved[2], saved[2].read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    checkpoints = Checkpoints(path.parent, 3)
    for place in range(0, length, length // 25):
        content = bytearray(whole)
        content[place] ^= 2
        path.write_bytes(content)
        if content[place : place + 1].isspace() or whole[place : place + 1].isspace():
            continue  # padding
        with pytest.warns(UserWarning, match="damaged and passed over"):
            assert checkpoints.newest() == saved[1], place


def test_a_leftover_of_a_killed_writer_is_no_checkpoint(saved: list[Path], make: Make, tmp_path: Path) -> None:
    (saved[0].parent / ".00000004.safetensors.part").write_bytes(b"half")
    trainer = make("cd", tmp_path)
    assert trainer.checkpoints.paths() == saved
    assert trainer.resume() and trainer.index == 3
    assert sorted(saved[0].parent.iterdir()) == saved  # it is cleared away


def test_only_the_newest_checkpoints_are_kept(make: Make, tmp_path: Path) -> None:
    make("cd", tmp_path, steps=7, save_every=2, keep_last=2).fit()
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints", 2).paths()] == [
        "00000006.safetensors",
        "00000007.safetensors",
    ]


# In the background


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_reach_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), save_file

    def slowly(*args: object, **kwargs: object) -> None:
        assert go.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr("stepdistill.checkpoint.save_file", slowly)
    trainer = make("dmd2", tmp_path)
    trainer.step(0)
    trainer.index = 1
    before = state(trainer)
    trainer.save()
    trainer.step(1)  # the writer waits
    assert trainer.checkpoints.paths() == []
    changed = state(trainer)
    assert any(not torch.equal(before[k], changed[k]) for k in before)
    go.set()
    trainer.checkpoints.finish()
    again = make("dmd2", tmp_path)
    assert again.resume() and again.index == 1
    assert_same_bits(state(again), before)


@pytest.mark.parametrize("save_every", [2, 0])
def test_a_writer_that_fails_stops_the_run_at_the_next_checkpoint_or_the_end(
    save_every: int, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepdistill.checkpoint.save_file", _full)
    trainer = make("cd", tmp_path, save_every=save_every)
    with pytest.raises(OSError, match=r"could not write .*No space left on device"):
        trainer.fit()
    assert trainer.index == (4 if save_every else 7)


def test_loss_scales_are_part_of_a_checkpoint(make: Make, tmp_path: Path) -> None:
    trainer = make("cd", tmp_path, dtype="float16")
    trainer.step(0)
    trainer.index = 1
    trainer.scales["student"].scale = 2.0**14
    trainer.save()
    trainer.checkpoints.finish()
    again = make("cd", tmp_path, dtype="float16")
    assert again.resume()
    assert (again.scales["student"].scale, again.scales["student"].clean) == (2.0**14, 1)
    for index in (1, 2):
        logs = trainer.step(index), again.step(index)
        assert logs[0] == logs[1] and float(logs[0]["student/loss_scale"]) == 2.0**14
    assert_same_bits(state(trainer), state(again))


# A full disk


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["stepdistill.checkpoint.save_file", "os.replace", "os.fsync"])
def test_a_full_disk_costs_no_older_checkpoint(
    call: str, saved: list[Path], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in saved[0].parent.iterdir()}
    trainer = make("cd", tmp_path, keep_last=1)
    trainer.resume()
    trainer.step(trainer.index)
    trainer.index += 1
    with monkeypatch.context() as patched:
        patched.setattr(call, _full)
        with pytest.raises(
            OSError, match=r"could not write .*00000004.safetensors: .*No space left on device"
        ) as error:
            trainer.save()
            trainer.checkpoints.finish()
    assert "\n" not in str(error.value) and "nothing already there was lost" in str(error.value)
    assert {path: path.read_bytes() for path in saved[0].parent.iterdir()} == before
    assert make("cd", tmp_path).resume()


def test_rewinding_the_log_on_a_full_disk_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(OSError, match="could not write"):
        MetricsFile(path).rewind(1, {})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_that_does_not_fit_on_the_disk_names_its_file() -> None:
    metrics = MetricsFile(Path("/dev/full"))
    metrics.add({"a": torch.tensor(1.0)})
    with pytest.raises(OSError, match=r"^could not write /dev/full: .*No space left on device; the last checkpoint"):
        metrics.write(1)


def test_a_writer_that_is_stopped_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half(aside: Path) -> None:
        aside.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda aside: aside.write_text("new") and None)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# Metrics


def test_a_line_of_metrics_is_the_mean_since_the_line_before(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for value in (1.0, 2.0, 6.0):
        metrics.add({"a": torch.tensor(value), **({"b": torch.tensor(5.0)} if value == 2 else {})})
    assert metrics.write(3) == {"a": 3.0, "b": 5.0}  # b was logged once
    metrics.add({"a": torch.tensor(10.0)})
    metrics.write(4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "a": 3.0, "b": 5.0}, {"step": 4, "a": 10.0}]
