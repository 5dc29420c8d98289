"""Every digits recipe takes a step in bfloat16: networks under autocast, weights and losses in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepdistill.build import build
from stepdistill.data import TeacherPairs
from stepdistill.recipes import bundled


@pytest.mark.parametrize("name", sorted(name for name in bundled() if name.startswith("digits_")))
def test_a_step_in_bfloat16_stays_finite_and_near_float32(name: str) -> None:
    recipe = bundled()[name]()  # its last stage; build runs no warm start
    if isinstance(recipe.data, TeacherPairs):
        recipe = replace(recipe, data=replace(recipe.data, count=16))
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = build(replace(recipe, run=replace(recipe.run, batch=16, dtype=dtype))).trainer
        losses[dtype] = trainer.step(0)
        assert trainer.nets.student.dtype == getattr(torch, dtype)
        assert all(p.dtype == torch.float32 for p in trainer.nets.parameters())
    for term, value in losses["float32"].items():
        if term.endswith("loss"):
            torch.testing.assert_close(losses["bfloat16"][term], value, rtol=0.15, atol=0.03)
