"""A stage's directory under examination: read when a check asks, and never written to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from stepdistill.build import open_teacher
from stepdistill.checkpoint import Checkpoints, read_checkpoint
from stepdistill.exported import load_student
from stepdistill.health import FILE
from stepdistill.logging import read_lines
from stepdistill.models.families import Opened
from stepdistill.recipe import Recipe
from stepdistill.student import Student
from stepdistill.symptoms import Curves, Finding


@dataclass(frozen=True)
class Examined:
    """One stage of a run."""

    folder: Path
    recipe: Recipe

    @functools.cached_property
    def curves(self) -> Curves:
        """What it has logged."""
        health, metrics = (read_lines(self.folder / name) for name in (FILE, "metrics.jsonl"))
        return Curves(health, metrics, self.recipe.run.steps)

    @functools.cached_property
    def checkpoints(self) -> dict[Path, str]:
        """Its checkpoints, oldest first, and what is wrong with each; empty where nothing is."""
        verdicts = {}
        for path in Checkpoints(self.folder / "checkpoints", self.recipe.run.keep_last).paths():
            try:
                read_checkpoint(path, verify=True)
                verdicts[path] = ""
            except (SafetensorError, OSError, ValueError) as error:
                verdicts[path] = str(error).splitlines()[0]
        return verdicts

    @functools.cached_property
    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Description and tensors of the newest good checkpoint; both empty if there is none."""
        good = [path for path, wrong in self.checkpoints.items() if not wrong]
        return read_checkpoint(good[-1]) if good else ({}, {})

    def state(self, role: str) -> dict[str, Tensor]:
        """One network's state in the newest good checkpoint; empty if it is not there."""
        prefix = f"nets.{role}."
        return {k.removeprefix(prefix): v for k, v in self.saved[1].items() if k.startswith(prefix)}

    @property
    def done(self) -> int:
        """Steps of the newest good checkpoint."""
        return self.saved[0].get("index", 0)

    @property
    def pipeline(self) -> Path:
        """Where the exported student is, or would be."""
        return self.folder / "pipeline"

    @functools.cached_property
    def exported(self) -> Student:
        """The exported student.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is damaged.
        """
        return load_student(self.pipeline)

    @functools.cached_property
    def opened(self) -> Opened:
        """The teacher.

        Raises:
            OSError: if it cannot be had.
            ValueError: if it cannot be opened.
        """
        return open_teacher(self.recipe.teacher)


Check = Callable[[Examined], Iterator[Finding]]
