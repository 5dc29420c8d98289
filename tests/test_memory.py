"""Rehearsed peaks against torch's allocator, and their parts against counts made by hand."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from stepdistill.build import build, open_teacher
from stepdistill.data import DigitsData, ShapesData, ShapesPrompts, TeacherPairs
from stepdistill.memory import (
    Memory,
    Noise,
    held_by,
    rehearse,
    size_of,
    table_bytes,
    whole_steps,
)
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.nets import is_weight
from stepdistill.placement import Placement
from stepdistill.profiling import measured_peak
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.recipes import find
from tests.tiny import sd


@pytest.fixture(scope="module")
def digits() -> Opened:
    return open_teacher(Teacher("bundled:digits"))


@pytest.fixture(scope="module")
def dmd2() -> Recipe:
    """Of few samples, so that networks weigh about as much as activations."""
    recipe = find("digits_dmd2")
    return replace(recipe, run=replace(recipe.run, batch=4, steps=2))


@pytest.fixture(scope="module")
def kd() -> Recipe:
    """Of two samples, so that every network is more than a tenth of the whole."""
    recipe = find("digits_kd")
    return replace(recipe, run=replace(recipe.run, batch=2, steps=1))


@pytest.fixture(scope="module")
def planned(dmd2: Recipe, digits: Opened) -> Memory:
    return rehearse(dmd2, digits)


@pytest.fixture(scope="module")
def measured(dmd2: Recipe, digits: Opened) -> int:
    return measure(dmd2, digits)


def measure(recipe: Recipe, opened: Opened) -> int:
    """What torch's allocator hands out, and the teacher, which is there before."""
    noise = Noise(recipe.data, recipe.data.examples(opened, recipe.run.batch))

    def steps() -> None:
        trainer = build(replace(recipe, data=noise), opened=opened).trainer
        for index in whole_steps(trainer) * 2:
            trainer.step(index)

    gc.collect()
    return measured_peak(lambda _: steps()) + size_of([*opened.denoiser.parameters(), *opened.denoiser.buffers()])


def few_pairs() -> Recipe:
    """Regression for a text-to-image teacher, on few prompts."""
    recipe = find("shapes_sd_kd")
    return replace(recipe, data=replace(recipe.data, count=2, prompts=ShapesPrompts(count=2)))


def test_a_rehearsed_peak_is_the_measured_one(planned: Memory, measured: int) -> None:
    assert planned.peak - planned.data == pytest.approx(measured, rel=0.03)


def test_whatever_is_forgotten_would_be_noticed(kd: Recipe, digits: Opened) -> None:
    """The bound of ten per cent means something: without a network, or its optimizer, the plan is outside of it."""
    m, measured = rehearse(kd, digits), measure(kd, digits)
    within = pytest.approx(measured, rel=0.1)
    assert m.peak - m.data == within
    for forgotten in (m.weights["ema"], m.weights["teacher"], m.optimizer, m.gradients):
        assert m.peak - m.data - forgotten != within


def test_standing_parts_are_what_one_counts_by_hand(planned: Memory, digits: Opened, dmd2: Recipe) -> None:
    own = 4 * sum(p.numel() for p in digits.denoiser.parameters())
    heads = planned.weights["disc"]
    assert planned.weights == {role: own for role in ("teacher", "student", "critic", "ema")} | {"disc": heads}
    movers = build(dmd2, opened=digits).trainer.nets
    steps = 4 * sum(1 for role in ("student", "critic", "disc") for _ in movers[role].parameters())
    assert planned.optimizer == 2 * (own + own + heads) + steps  # two moments each, and a counter of steps a tensor
    assert planned.gradients == own + heads  # of the critic's turn; the student's is smaller


def test_activations_grow_with_the_batch_and_weights_do_not(kd: Recipe, digits: Opened) -> None:
    more = replace(kd, run=replace(kd.run, batch=32))
    few, many = rehearse(kd, digits), rehearse(more, digits)
    assert many.standing == few.standing
    assert many.peak - few.peak == pytest.approx(measure(more, digits) - measure(kd, digits), rel=0.03)


def test_adapters_share_the_teacher_and_each_role_has_its_own() -> None:
    opened = open_pipeline(sd.pipeline(layers_per_block=1))
    recipe = replace(few_pairs(), student=Weights("lora", rank=2))
    m = rehearse(replace(recipe, run=replace(recipe.run, batch=1, steps=1)), opened)
    assert m.weights["teacher"] == size_of([*opened.denoiser.parameters(), *opened.denoiser.buffers()])
    assert 0 < m.weights["student"] == m.weights["ema"] < m.weights["teacher"]
    assert all(".lora_" not in name for name, _ in opened.denoiser.named_parameters())  # the real one is untouched


def test_idle_networks_off_the_device_leave_room(dmd2: Recipe, digits: Opened, planned: Memory) -> None:
    """The student's turn needs the teacher, so only the average's room is won; between turns both are gone."""
    away = rehearse(replace(dmd2, placement=Placement(offload=("teacher", "ema"))), digits)
    assert planned.peak - away.peak == planned.weights["ema"]
    assert planned.standing - away.standing == planned.weights["teacher"] + planned.weights["ema"]


def test_recomputed_activations_are_not_kept() -> None:
    opened = open_pipeline(sd.pipeline(layers_per_block=1))
    recipe = few_pairs()
    recipe = replace(recipe, run=replace(recipe.run, batch=8, steps=1))
    less = replace(recipe, placement=Placement(checkpointing=("student",)))
    kept, recomputed = rehearse(recipe, opened), rehearse(less, opened)
    assert recomputed.peak < kept.peak
    assert recomputed.peak - recomputed.data == pytest.approx(measure(less, opened), rel=0.1)


def test_tables_on_the_device_are_counted(digits: Opened) -> None:
    cond = digits.family.examples(digits.pipeline, 1)
    assert table_bytes(DigitsData(), cond, (1, 8, 8), 2) == 1437 * (64 * 4 + 8)


def test_images_and_each_caption_once_are_counted_until_they_are_too_many() -> None:
    cond, shape = {"prompt": torch.zeros(1, 5)}, (4, 2, 2)
    data = ShapesData(count=64, dropout=1.0)
    captions = len(set(data.captions(64)))
    assert captions < 64 and table_bytes(data, cond, shape, 2) == captions * 5 * 4 + 64 * 16 * 4
    assert table_bytes(replace(data, memory=3e-6), cond, shape, 2) == captions * 5 * 4
    pairs = TeacherPairs(count=10, prompts=ShapesPrompts(count=64, dropout=1.0))
    assert table_bytes(pairs, cond, shape, 3) == captions * 5 * 4 + 10 * 3 * 16 * 4


def test_frozen_weights_and_what_a_discriminator_reads_are_parameters(digits: Opened) -> None:
    recipe = find("digits_gdd")
    heads = replace(recipe.heads, backbone="judge", taps=())
    frozen = replace(recipe, heads=heads, student=Weights(freeze=("conv1",)), warm_start=None)
    nets = build(frozen, opened=digits).trainer.nets
    found = held_by(nets, is_weight)
    own = sum(p.numel() for p in digits.denoiser.parameters())
    assert sum(t.numel() for t in found["student"]) == own > sum(p.numel() for p in nets.student.parameters())
    judge = sum(p.numel() for p in nets["disc"].backbone.parameters())
    assert sum(t.numel() for t in found["disc"]) == judge + sum(p.numel() for p in nets["disc"].parameters())


@pytest.mark.gpu
def test_on_a_card_the_plan_holds_too(dmd2: Recipe) -> None:
    opened = open_teacher(Teacher("bundled:digits"))
    recipe = replace(dmd2, run=replace(dmd2.run, batch=256, device="cuda"))
    m = rehearse(recipe, opened, as_on_cuda=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer = build(recipe, opened=opened).trainer
    for index in whole_steps(trainer) * 2:
        trainer.step(index)
    assert m.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
