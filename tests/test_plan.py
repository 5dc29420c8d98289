"""What a recipe will cost, against counts made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stepdistill.build import open_teacher
from stepdistill.data import ShapesPrompts
from stepdistill.known_teachers import KNOWN, Known, open_untrained
from stepdistill.memory import Memory, rehearse
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.nets import Nets
from stepdistill.objective import registered
from stepdistill.parts.gan import Gan
from stepdistill.plan import StagePlan, parameters, plan, propose, table
from stepdistill.recipe import Teacher, Weights
from stepdistill.recipes import find
from tests.tiny import sd


@pytest.fixture(scope="module")
def digits() -> Opened:
    return open_teacher(Teacher("bundled:digits"))


def test_a_regression_costs_three_per_sample_and_its_trajectories(digits: Opened) -> None:
    recipe = find("digits_kd")
    (stage,) = plan(recipe, digits)
    run, data = recipe.run, recipe.data
    assert stage.per_update == 3
    assert stage.data == data.count * data.solver.steps
    assert stage.evaluations == run.steps * run.batch * 3 + stage.data
    own = sum(p.numel() for p in digits.denoiser.parameters())
    assert stage.parameters == 3 * own  # teacher, student and its average


def test_guidance_doubles_what_the_data_cost(digits: Opened) -> None:
    recipe = find("digits_kd")
    (plain,), (guided,) = (
        plan(replace(recipe, teacher=replace(recipe.teacher, guidance=scale)), digits) for scale in (1.0, 2.0)
    )
    assert guided.data == 2 * plain.data and guided.per_update == plain.per_update


def test_turns_that_are_not_always_due_are_averaged(digits: Opened) -> None:
    """Without a GAN: the student's turn costs 3 + 1 + 1, the critic's 3, and a rollout where there was no student's."""
    recipe = find("digits_dmd2")
    objective = replace(recipe.objective, gan=Gan(weight=0.0), student_every=4)
    recipe = replace(recipe, objective=objective, run=replace(recipe.run, steps=8))
    (stage,) = plan(recipe, digits)
    assert stage.per_update == pytest.approx(((3 + 1 + 1 + 3) + 3 * (1 + 3)) / 4)


def test_every_stage_of_a_chain_is_planned_for_its_own_student(digits: Opened) -> None:
    stages = plan(find("digits_tscd"), digits)
    assert [s.steps for s in stages] == [4, 2, 1] and all(s.per_update == 5 for s in stages)


def test_a_stage_that_must_follow_another_is_rehearsed(digits: Opened) -> None:
    first, second = plan(find("digits_pd@4"), digits, memory=True)
    assert second.memory.weights == first.memory.weights | {"previous": first.memory.weights["student"]}


@pytest.mark.parametrize("name", [n for n, cls in registered().items() if cls.__module__.startswith("stepdistill.")])
def test_every_method_is_rehearsed_without_numbers(name: str, digits: Opened) -> None:
    recipe = find(f"digits_{name}")
    memory = rehearse(replace(recipe, run=replace(recipe.run, batch=4)), digits)
    assert memory.peak > memory.standing > 0


def test_a_shared_backbone_is_counted_once() -> None:
    """Whatever plays on it: the held parameters are the network and three sets of adapters (one is the average)."""
    opened = open_pipeline(sd.pipeline())
    recipe = find("shapes_sd_shared")
    lora = Weights("lora", rank=2)
    objective = replace(recipe.objective, gan=Gan(weight=0.0))
    recipe = replace(recipe, warm_start=None, student=lora, critic=lora, objective=objective)
    (stage,) = plan(recipe, opened)
    bare = sum(p.numel() for name, p in opened.denoiser.named_parameters() if ".lora_" not in name)
    one_role = sum(p.numel() for n, p in opened.denoiser.named_parameters() if ".lora_" in n and "role0" in n)
    assert one_role > 0 and stage.parameters == bare + 3 * one_role
    twice = Nets({"student": opened.denoiser, "teacher": opened.denoiser})
    assert parameters(twice) == parameters(Nets({"teacher": opened.denoiser}))


def test_heads_on_a_shared_backbone_cost_its_forward_pass_alone() -> None:
    """Student's turn: 3, guided teacher 2, critic 1, heads 1 + 1 for the sample's gradient. Fit: critic 3, heads over
    twice the samples 2. Adapters of other roles on the network that the heads read are none of theirs."""
    opened = open_pipeline(sd.pipeline())
    recipe, lora = find("shapes_sd_shared"), Weights("lora", rank=2)
    objective = replace(recipe.objective, student_every=1)
    recipe = replace(recipe, warm_start=None, student=lora, critic=lora, objective=objective)
    (stage,) = plan(replace(recipe, run=replace(recipe.run, steps=2)), opened)
    assert recipe.heads.backbone == "teacher" and stage.per_update == (3 + 2 + 1 + 2) + (3 + 2)


def test_a_known_teacher_is_planned_without_weights() -> None:
    """A narrow network of SD 1.5's class on the meta device: the counts of a real one."""
    known = Known(sd.unet, KNOWN["sd1.5"].scheduler, (4, 8, 8), {"prompt": (12, 16)})
    recipe = find("shapes_sd_kd")
    recipe = replace(recipe, data=replace(recipe.data, count=2, prompts=ShapesPrompts(count=2)))
    (imagined,) = plan(recipe, open_untrained(known), memory=True)
    (real,) = plan(recipe, open_untrained(known, device="cpu"))
    assert replace(imagined, memory=None) == real and imagined.per_update == 3 and imagined.bytes_per_sample > 0
    assert imagined.memory == rehearse(recipe, open_untrained(known))  # counting evaluations holds nothing


def test_a_table_has_a_line_for_every_part_and_they_add_up() -> None:
    gib = 2**30
    memory = Memory({"teacher": gib, "student": gib, "ema": gib}, 2 * gib, gib, 0, 6 * gib, away=("teacher",))
    stage = StagePlan("KD", 1, 100, 8, 3.0, 50, 1_500_000, 7, memory)
    lines = [line.split() for line in table([stage, replace(stage, memory=replace(memory, away=()))]).splitlines()]
    assert lines[1] == ["1", "KD", "1", "100", "8", "3.00", "50", "1.50", "M"]
    assert lines[3][0] == "4,900"  # 2 (100 updates, 8 samples, 3 evaluations, and 50)
    of = {" ".join(line[:-2]): line[-2:] for line in lines[5:]}
    assert of["teacher"] == ["-", "1"] and of["optimizers"] == ["2", "2"] and of["data"] == ["-", "-"]
    assert of["gradients, activations"] == ["2", "1"] and of["peak"] == ["6", "6"]


def test_a_proposal_for_a_card_is_what_a_rehearsal_of_it_takes(digits: Opened) -> None:
    recipe = find("digits_kd")
    (stage,) = plan(recipe, digits, memory=True)
    card = stage.memory.peak * 0.9 / 2**30
    found = propose(recipe, digits, card, stage.memory)
    assert found.changes == ("batch 32 x accumulate 2",)
    assert found.peak == rehearse(found.recipe, digits).peak <= stage.memory.peak * 0.9
    assert propose(recipe, digits, 1.0, stage.memory).recipe == recipe
