"""The teacher's own trajectories, made before training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from stepdistill.data.base import (
    MEMORY,
    Data,
    Setting,
    companions,
    epochs,
    placed,
    to_device,
    weights_hash,
)
from stepdistill.data.cache import cached
from stepdistill.data.classes import class_cond
from stepdistill.data.encoding import encoded
from stepdistill.data.prompts import PromptSource
from stepdistill.logging import Progress
from stepdistill.models.denoiser import Cond, of_samples
from stepdistill.objective import Batch, Step
from stepdistill.sampling import DpmPP2M, Sampler, trailing

BLOCK = 500
"""Trajectories whose noise is drawn together; of small samples all of them are made at once too."""
SMALL = 64
"""Numbers in a sample up to which it counts as small; larger ones are made as many at once as a batch has, which fits
memory and, on a CPU, its caches."""


@dataclass(frozen=True)
class TeacherPairs(Data):
    """The teacher's own trajectories from noise to image, made once before training and kept in the run's cache.

    ``path`` holds its states at the student's grid, ``x0`` its samples.

    Raises:
        ValueError: if the student's grid is not a part of the solver's.
    """

    provides = frozenset({"path", "x0"})

    count: int = 8000
    """Trajectories."""
    classes: int = 10
    """Labels are 0 ... classes - 1, in turn; 0 gives none, for an unconditional teacher. Not looked at with prompts."""
    solver: Sampler = field(default_factory=lambda: Sampler(trailing(16), DpmPP2M()))
    """How the teacher is sampled: the student's ceiling."""
    prompts: PromptSource | None = field(default=None, repr=False)  # the cache's keys are older than this field
    """What a text-to-image teacher is asked for, in turn."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.count < 1:
            raise ValueError(f"data.count must be at least 1; got {self.count}")
        if self.classes < 0:
            raise ValueError(f"data.classes must be at least 0; got {self.classes}")

    @property
    def evaluations(self) -> int:
        """See ``Data``."""
        return self.count * self.solver.evaluations

    def check(self, sampler: Sampler) -> None:
        """The student's times must be states of the solver."""
        self._states(sampler)

    def captions(self, n: int) -> list[str]:
        """See ``Data``."""
        return self.prompts.captions(n) if self.prompts else []

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        states = self._states(setting.sampler)
        cond_of = self._conditions(setting)
        path = self._paths(setting, cond_of, states)
        path_of = placed(path, setting.device, self.prompts.memory if self.prompts else MEMORY)
        rows_of = epochs(self.count, setting.batch, setting.seed)
        shape = (setting.batch, *path.shape[2:])

        def batch(step: Step) -> Batch:
            rows = rows_of(step.index)
            picked = path_of(rows)
            return Batch(cond_of(rows), shape, x0=picked[:, -1], path=picked)

        return batch

    def _states(self, sampler: Sampler) -> list[int]:
        """The numbers of the solver's states, of ``steps + 1``, at the student's times and at the end."""
        grid = {round(t, 9): i for i, t in enumerate((*self.solver.times, 0.0))}
        outside = [t for t in sampler.times if round(t, 9) not in grid]
        if outside:
            raise ValueError(
                f"the student's time {outside[0]:g} is not on the solver's grid of {self.solver.steps} steps; "
                f"let data.solver have a multiple of {sampler.steps} steps"
            )
        return [grid[round(t, 9)] for t in (*sampler.times, 0.0)]

    def _conditions(self, setting: Setting) -> Callable[[Tensor], Cond]:
        """From the numbers of trajectories (B,) to their conditions, each (B, ...) on the run's device."""
        if self.prompts is not None:
            texts = self.prompts.reported(setting)
            of_text = encoded(texts, setting, self.prompts.memory, self.prompts.store(setting))
            return lambda rows: of_text(rows % len(texts))
        labels = torch.arange(self.count) % self.classes if self.classes else torch.arange(0)
        cond = to_device(class_cond(setting.opened, labels), setting.device)
        return partial(of_samples, cond)

    def _paths(self, setting: Setting, cond_of: Callable[[Tensor], Cond], states: list[int]) -> Tensor:
        """The chosen states of all trajectories, (count, states, ...), from the cache if they are there.

        Of class-conditional teachers all states are kept, and serve students of every grid.
        """
        teacher, denoiser = setting.teacher, setting.opened.denoiser
        guidance = f"{teacher.scale} {teacher.interval}"
        key = f"{self!r} {setting.seed} {guidance} {denoiser.dtype} {weights_hash(denoiser.net)}"
        kept = list(range(self.solver.steps + 1))
        if self.prompts is not None:
            kept, key = states, f"{key} {self._asked(setting)} {states}"
        shape = setting.opened.sample_shape
        at_once = BLOCK if math.prod(shape) <= SMALL else setting.batch

        def make() -> dict[str, Tensor]:
            parts = []
            with Progress("teacher trajectories", 0, self.count) as progress, torch.no_grad():
                for block in torch.arange(self.count).split(BLOCK):
                    rng = Step.at(int(block[0]), setting.seed, device=setting.device).rng
                    noise = torch.randn((len(block), *shape), generator=rng, device=setting.device)
                    for rows in block.split(at_once):
                        start = noise[rows - int(block[0])]
                        found = self.solver.run(teacher, start, cond_of(rows), rng, path=True)
                        parts.append(found[:, kept].cpu())
                        progress.advance(len(rows))
            return {"path": torch.cat(parts)}

        path = cached(setting.cache, "pairs", key, ("path",), make)["path"]
        return path[:, [kept.index(state) for state in states]]

    def _asked(self, setting: Setting) -> str:
        """What trajectories of prompts depend on besides."""
        opened = setting.opened
        encoders = [part for name, part in companions(opened).items() if name != "vae"]
        digest = hashlib.sha256("\n".join(self.prompts.texts()).encode())
        for value in (opened.null or {}).values():
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return f"{digest.hexdigest()} {weights_hash(*encoders)} {opened.sample_shape}"
