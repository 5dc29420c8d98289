"""The recipes on captioned shapes: read back, and built on tiny pipelines that take the bundled teachers' place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stepdistill.build import build, open_teacher
from stepdistill.data import ShapesPrompts, TeacherPairs
from stepdistill.distill import check
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.objective import registered
from stepdistill.recipe import Recipe, Teacher
from stepdistill.recipes import bundled
from tests.tiny import sd, sd3

RECIPES = {name: function for name, function in bundled().items() if name.startswith("shapes_")}


@pytest.fixture(scope="module")
def teachers() -> dict[str, Opened]:
    """Tiny pipelines of the bundled ones' families that make 32x32 pixels as well."""
    return {
        "bundled:shapes-sd": open_pipeline(sd.pipeline("v_prediction", sample_size=16)),
        "bundled:shapes-sd3": open_pipeline(sd3.pipeline(sample_size=16)),
    }


def small(recipe: Recipe) -> Recipe:
    """The same with little data."""
    data = recipe.data
    if isinstance(data, TeacherPairs):
        data = replace(data, prompts=ShapesPrompts(6))
    data = replace(data, count=8)
    warm = recipe.warm_start and small(recipe.warm_start)
    return replace(recipe, data=data, warm_start=warm, run=replace(recipe.run, batch=2, threads=0))


def test_there_is_a_recipe_for_each_method_and_teacher() -> None:
    for teacher in ("sd", "sd3"):
        methods = {type(function().objective) for name, function in RECIPES.items() if f"_{teacher}_" in name}
        ours = {cls for cls in registered().values() if cls.__module__.startswith("stepdistill.objectives.")}
        assert methods == ours


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_reads_back(name: str) -> None:
    assert Recipe.from_json(RECIPES[name]().to_json()) == RECIPES[name]()


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_is_built_and_takes_a_step(name: str, teachers: dict[str, Opened], tmp_path: Path) -> None:
    recipe = small(RECIPES[name]())
    opened, student = teachers[recipe.teacher.source], None
    for stage in recipe.stages():
        check(stage, opened)
        trainer = build(stage, opened=opened, start=student, cache=tmp_path).trainer
        assert all(value.isfinite() for value in trainer.step(0).values())
        student = trainer.nets.ema


@pytest.mark.parametrize("teacher", ["sd", "sd3"])
def test_drawn_scales_lie_around_the_teachers(teacher: str) -> None:
    recipe = RECIPES[f"shapes_{teacher}_snoopi"]()
    low, high = recipe.objective.guidance
    assert low < recipe.teacher.guidance < high


@pytest.mark.parametrize("source", ["bundled:shapes-sd", "bundled:shapes-sd3"])
def test_the_bundled_teachers_are_judged_as_shapes(source: str) -> None:
    recipe = next(recipe() for recipe in RECIPES.values() if recipe().teacher.source == source)
    check(recipe, open_teacher(Teacher(source)))
