"""What holds for every method: it trains on eps, v and flow teachers alike, and what it makes loads in stock diffusers.

Each digits recipe is put on tiny text-to-image pipelines of the real classes, with data made up here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from stepdistill.build import build
from stepdistill.data import Data, Setting
from stepdistill.export import load_student, save_pipeline
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.objective import Batch, Step, registered
from stepdistill.recipe import Recipe, Teacher
from stepdistill.recipes import find

METHODS = sorted(name for name, cls in registered().items() if cls.__module__.startswith("stepdistill.objectives."))
TEACHERS = ("sd_eps", "sd_v", "sd3")
SHORT = {"disback": {"record_steps": 2, "record_every": 1, "target_steps": 1}}
"""Fields that bring all turns of a method into a few updates."""
PROMPTS = ("a red star", "two blue squares on a white background")


@dataclass(frozen=True)
class MadeUp(Data):
    """Noise in place of images and trajectories, under prompts."""

    provides = frozenset({"path", "x0"})

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        cond = setting.opened.encode([PROMPTS[i % 2] for i in range(setting.batch)])
        shape = (setting.batch, *setting.opened.sample_shape)
        states = setting.sampler.steps + 1

        def batch(step: Step) -> Batch:
            path = torch.stack([step.randn(shape) for _ in range(states)], 1)
            return Batch(cond, shape, x0=step.randn(shape), path=path)

        return batch

    def examples(self, opened: Opened, n: int) -> dict[str, torch.Tensor]:
        return dict(opened.encode([PROMPTS[i % 2] for i in range(n)]))


@pytest.fixture(scope="module", params=TEACHERS)
def opened(request: pytest.FixtureRequest) -> Opened:
    """A tiny pipeline of each kind of prediction and path."""
    name, _, kind = request.param.partition("_")
    pipeline = importlib.import_module(f"tests.tiny.{name}").pipeline()
    if kind:
        prediction = {"eps": "epsilon", "v": "v_prediction"}[kind]
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
    return open_pipeline(pipeline)


def elsewhere(recipe: Recipe, name: str) -> Recipe:
    """On another teacher, with a few samples and a few updates; ``build`` makes its last stage alone."""
    return replace(
        recipe,
        teacher=replace(recipe.teacher, source="given"),
        objective=replace(recipe.objective, **SHORT.get(name, {})),
        data=MadeUp(),
        run=replace(recipe.run, batch=2, steps=4),
        warm_start=recipe.warm_start and elsewhere(recipe.warm_start, name),
        evaluation=None,
    )


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_its_pipeline_reads_back(opened: Opened, name: str, tmp_path: Path) -> None:
    trainer = build(elsewhere(find(f"digits_{name}"), name), opened=opened).trainer
    before = [p.clone() for p in trainer.nets.student.parameters()]
    teacher = [p.clone() for p in trainer.nets.teacher.parameters()]
    trainer.fit()
    after = list(trainer.nets.student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(bool(p.isfinite().all()) for p in after)
    assert all(torch.equal(a, b) for a, b in zip(teacher, trainer.nets.teacher.parameters(), strict=True))

    student = trainer.nets.ema
    save_pipeline(student, opened, tmp_path / "pipeline", teacher="given", method=name)
    again = load_student(tmp_path / "pipeline", opened=opened)
    shape, cond = (2, *opened.sample_shape), opened.encode(list(PROMPTS))
    torch.testing.assert_close(again.sample(shape, cond), student.sample(shape, cond), rtol=1e-4, atol=1e-4)


def test_the_teacher_of_a_recipe_is_replaced_and_nothing_else() -> None:
    """So that what is trained above is the recipe's own objective and optimizers."""
    recipe = elsewhere(find("digits_cd"), "cd")
    assert recipe.objective == find("digits_cd").objective and recipe.optim == find("digits_cd").optim
    assert recipe.teacher == Teacher("given")
