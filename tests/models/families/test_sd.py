"""Stable Diffusion beside its stock pipeline: every prediction, zero terminal SNR, told and real guidance, sizes."""

from __future__ import annotations

import pytest
import torch

from stepdistill.models.families import open_pipeline
from tests.models.families.beside import PROMPTS, beside, feels_its_input, same
from tests.models.test_every_family import stirred
from tests.tiny.sd import pipeline


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("sample", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_every_prediction_and_table(prediction: str, zero_snr: bool, steps: int) -> None:
    opened = open_pipeline(stirred(pipeline(prediction, zero_snr)))
    last = opened.denoiser.schedule(torch.tensor([1.0])).alpha
    assert (float(last) == 0) is zero_snr
    feels_its_input(opened)
    same(*beside(opened, steps=steps))


def test_guidance_and_a_negative_prompt() -> None:
    opened = open_pipeline(stirred(pipeline()), negative="a green square")
    plain, _ = beside(opened)
    ours, theirs = beside(
        opened, scale=3.0, guidance_scale=3.0, negative_prompt=["a green square"] * len(PROMPTS)
    )  # a list, as the prompts are
    same(ours, theirs)
    assert not torch.allclose(plain, ours, atol=1e-3)


def test_a_guidance_told() -> None:
    opened = open_pipeline(stirred(pipeline(time_cond_proj_dim=32)))
    ours, theirs = beside(opened, extra={"guidance": torch.full((2,), 7.5)}, guidance_scale=7.5)
    same(ours, theirs)
    none, bare = beside(opened, extra={"guidance": torch.ones(2)})
    same(none, bare)
    assert not torch.allclose(none, ours, atol=1e-3)
    with pytest.raises(ValueError, match=r"told the guidance scale; give cond\['guidance'\]"):
        beside(opened)


def test_a_size_of_its_own() -> None:
    opened = open_pipeline(stirred(pipeline()), size=(24, 16))
    assert opened.sample_shape == (4, 12, 8)
    same(*beside(opened))
    for size in ((18, 16), (16,), (4, 16, 16), (0, 16)):
        with pytest.raises(ValueError, match=r"height and width in multiples of 4, such as \[16, 16\]"):
            open_pipeline(pipeline(), size=size)
