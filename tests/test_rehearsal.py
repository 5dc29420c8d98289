"""Steps on fake tensors: what they count, and that they allocate nothing."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stepdistill.build import build, open_teacher
from stepdistill.data import ShapesPrompts
from stepdistill.known_teachers import KNOWN, Known, open_untrained
from stepdistill.memory import Memory, Noise, held_by, rehearse, size_of
from stepdistill.placement import Placement
from stepdistill.profiling import measured_peak
from stepdistill.recipe import Recipe, Teacher
from stepdistill.recipes import find
from stepdistill.rehearsal import LiveBytes, cuda_autocast, rehearsal
from tests.processes import together
from tests.tiny import sd


def test_views_count_with_what_they_view_and_nothing_stays_counted() -> None:
    with LiveBytes() as books:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        c = a + 1
        assert books.now == 8000
        del a, c
        assert books.now == 4000 and books.peak == 8000  # b still holds the storage
        del b
    assert books.now == 0


def test_a_rehearsal_allocates_nothing() -> None:
    known = Known(
        lambda: sd.unet(block_out_channels=(128, 256)), KNOWN["sd1.5"].scheduler, (4, 16, 16), {"prompt": (8, 16)}
    )
    opened = open_untrained(known)
    recipe = find("shapes_sd_kd")
    data = replace(recipe.data, count=2, prompts=ShapesPrompts(count=2))
    recipe = replace(recipe, teacher=Teacher("config:sd1.5"), data=data, run=replace(recipe.run, batch=4, steps=1))
    found: list[Memory] = []
    real = measured_peak(lambda _: found.append(rehearse(recipe, opened)))
    assert found[0].peak > 100e6 and real < 0.02 * found[0].peak


def test_norms_are_kept_in_float32_on_a_card_and_not_on_a_cpu() -> None:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    norm = nn.LayerNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        with cuda_autocast():
            assert norm(x).dtype == torch.float32
            # nor where a backward pass computes them again
            checkpoint(norm, x.requires_grad_(), use_reentrant=False).sum().backward()


def test_numbers_that_are_read_do_not_stop_a_rehearsal() -> None:
    with rehearsal():
        x = torch.zeros(3)
        assert bool((x + 1).isfinite().all()) and float(x.sum()) == 1.0
        drawn = int(torch.randint(5, (1,), generator=torch.Generator().manual_seed(0)))
    assert drawn == int(torch.randint(5, (1,), generator=torch.Generator().manual_seed(0)))


def sharded_step() -> int:
    """Peak of one of two processes, in a step of a run that goes on."""
    recipe = sharded_regression()
    opened = open_teacher(Teacher("bundled:digits"))
    noise = Noise(recipe.data, recipe.data.examples(opened, 4))
    trainer = build(replace(recipe, data=noise), opened=opened).trainer
    trainer.step(0)
    gc.collect()
    states = [v for one in trainer.optimizers.values() for state in one.state.values() for v in state.values()]
    held = size_of([*(t for tensors in held_by(trainer.nets).values() for t in tensors), *states])
    return held + measured_peak(lambda _: trainer.step(0))


def sharded_regression() -> Recipe:
    recipe = find("digits_kd")
    return replace(recipe, run=replace(recipe.run, batch=8, steps=1), placement=Placement(shard=True))


def test_one_of_two_processes_is_planned_with_its_shards() -> None:
    digits = open_teacher(Teacher("bundled:digits"))
    m = rehearse(sharded_regression(), digits, devices=2)
    own = 4 * sum(p.numel() for p in digits.denoiser.parameters())
    assert m.weights["student"] == pytest.approx(own / 2, rel=0.01)
    assert [m.peak - m.data] * 2 == pytest.approx(together(2, sharded_step), rel=0.1)
