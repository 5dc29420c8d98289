"""TensorBoard and Weights & Biases by accelerate's trackers: missing ones are named, the others get every line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker

from stepdistill.logging import Trackers, check_trackers
from stepdistill.objectives import KD
from stepdistill.recipe import decode
from stepdistill.trainer import Run, Trainer
from tests.test_trainer import batches, players

seen: list[tuple] = []


class Recording(GeneralTracker):
    """accelerate's interface, and a list."""

    name, requires_logging_directory = "recording", False

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(_blank=True)
        seen.append(("made", args, kwargs))

    def start(self) -> None:
        """Open."""
        seen.append(("start",))

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        """Note."""
        seen.append(("log", step, values))

    def finish(self) -> None:
        """Close."""
        seen.append(("finish",))


def trainer(out: Path, **run: object) -> Trainer:
    """Four steps, a line after each second."""
    nets = players(KD())
    spec = {"student": torch.optim.SGD(nets.student.parameters(), 0.1)}
    return Trainer(nets, KD(), spec, batches, Run(steps=4, batch=4, log_every=2, **run), out=out)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_gets_the_lines_of_metrics_jsonl(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tracker in ("TensorBoardTracker", "WandBTracker"):
        monkeypatch.setattr(accelerate.tracking, tracker, Recording)
    seen.clear()
    trainer(tmp_path / "project" / "run", trackers=(name,)).fit()
    kinds = [event[0] for event in seen]
    assert kinds == ["made", "start", "log", "log", "finish"]
    assert [event[1] for event in seen[2:4]] == [2, 4]
    assert seen[2][2].keys() == {"student/loss", "student/grad_norm"}
    _, args, kwargs = seen[0]
    if name == "tensorboard":
        assert args == ("tensorboard", tmp_path / "project" / "run") and kwargs == {"purge_step": 1}
    else:
        assert args == ("project",) and kwargs["name"] == "run" and kwargs["resume"] == "allow"
    seen.clear()
    Trackers((name,), tmp_path / "project" / "run", 2)  # resumed: the same curve goes on
    assert seen[0][2].get("purge_step", 3) == 3 and seen[0][2].get("id") == kwargs.get("id")


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(())
    with pytest.raises(ValueError, match=r"run.trackers: 'wandb' is not installed; pip install 'stepdistill\[wandb\]'"):
        check_trackers(("wandb",))


def test_another_tracker_is_no_value_of_the_field() -> None:
    with pytest.raises(ValueError, match="'mlflow' is none of 'tensorboard', 'wandb'"):
        decode({"type": "Run", "trackers": ["mlflow"]}, Run, "run")


def test_tensorboard_writes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer(tmp_path / "run", trackers=("tensorboard",)).fit()
    assert any((tmp_path / "run" / "tensorboard").glob("events.*"))
