"""Proposals for a card, on made-up peaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from stepdistill.cli import Distill
from stepdistill.fitting import GIB, RESERVE, fit
from stepdistill.recipe import Recipe, Weights
from stepdistill.recipes import find


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    found = replace(find("shapes_sd_dmd2"), warm_start=None)
    return replace(found, run=replace(found.run, batch=8, dtype="bfloat16", device="cuda"))


def peak_of(recipe: Recipe, limit: float) -> float:
    """Full networks 40 GiB, adapters 10, and each sample 2, or 0.5 where activations are recomputed."""
    held = 10.0 if recipe.student.form == "lora" else 40.0 - 4 * ("ema" in recipe.placement.offload)
    return GIB * (held + recipe.run.batch * (0.5 if "student" in recipe.placement.checkpointing else 2.0))


def room(gigabytes: float) -> float:
    """A card that leaves so much."""
    return gigabytes / (1 - RESERVE) + 1e-6


def test_what_fits_is_left_alone(recipe: Recipe) -> None:
    found = fit(recipe, room(56), peak_of)
    assert found.changes == () and found.recipe == recipe and str(found) == "as it is: 56 GiB"


def test_batches_are_divided_before_anything_is_changed(recipe: Recipe) -> None:
    found = fit(recipe, room(45), peak_of)
    assert found.changes == ("batch 2 x accumulate 4",) and found.peak == 44 * GIB
    assert (found.recipe.run.batch, found.recipe.run.accumulate) == (2, 4)
    assert found.options == ("--run.batch 2", "--run.accumulate 4")


def test_the_least_change_that_fits_is_taken(recipe: Recipe) -> None:
    found = fit(recipe, room(41), peak_of)  # a sample of 2 is too much for full networks, one of 0.5 is not
    assert found.changes == ("activations of student and critic recomputed", "batch 2 x accumulate 4")
    found = fit(recipe, room(38), peak_of)
    assert found.changes == ("teacher and ema offloaded", "batch 1 x accumulate 8")
    found = fit(recipe, room(20), peak_of)
    assert found.changes == ("student and critic as LoRA", "batch 4 x accumulate 2")
    assert found.recipe.student == found.recipe.critic == Weights("lora", rank=64)


def test_nothing_is_proposed_where_nothing_fits(recipe: Recipe) -> None:
    assert fit(recipe, room(10), peak_of) is None


def test_adapters_go_through_all_stages_and_their_options_say_so() -> None:
    chain = find("digits_pd@2")  # whose last stage must start from the one before
    found = fit(chain, room(30), peak_of)
    assert found.changes == ("student as LoRA", "batch 8 x accumulate 8")
    assert [stage.student for stage in found.recipe.stages()] == 3 * [Weights("lora", rank=64)]
    given = [word for option in found.options for word in option.split(" ")]
    config = (tyro.conf.AvoidSubcommands,)
    assert tyro.cli(Distill, args=given, default=Distill(chain, Path()), config=config).recipe == found.recipe


def test_a_student_with_fewer_layers_is_not_proposed_as_lora(recipe: Recipe) -> None:
    assert fit(replace(recipe, student=Weights(layers=1)), room(20), peak_of) is None
