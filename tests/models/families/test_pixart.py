"""PixArt's two pipelines beside ours: told sizes or not, prompts of their own length, guidance, one variance less."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

from stepdistill.models.families import open_pipeline
from tests.models.families.beside import PROMPTS, beside, feels_its_input, same
from tests.models.test_every_family import stirred
from tests.tiny.pixart import SIZE, pipeline

SIGMA = {"cls": PixArtSigmaPipeline, "use_additional_conditions": False}
SMALL = {"cls": PixArtAlphaPipeline, "sample_size": 8}
ALPHA = {"cls": PixArtAlphaPipeline}


@pytest.mark.parametrize(("which", "tokens"), [(ALPHA, 120), (SMALL, 120), (SIGMA, 300)])
def test_alpha_and_sigma_at_a_size_of_their_own(which: dict, tokens: int) -> None:
    opened = open_pipeline(stirred(pipeline(**which)), size=(16, 24))
    cond = opened.encode(PROMPTS)
    assert opened.sample_shape == (4, 8, 12)
    assert cond["prompt"].shape[1] == cond["mask"].shape[1] == tokens
    assert ("resolution" in cond) is (which is ALPHA)
    feels_its_input(opened)
    same(*beside(opened))
    with pytest.raises(ValueError, match="height and width in multiples of 8"):
        open_pipeline(opened.pipeline, size=(16, 20))


@pytest.mark.parametrize("which", [ALPHA, SIGMA])
def test_guidance_and_a_negative_prompt(which: dict) -> None:
    opened = open_pipeline(stirred(pipeline(**which)), size=SIZE, negative="a green square")
    plain, _ = beside(opened)
    ours, theirs = beside(opened, scale=3.0, guidance_scale=3.0, negative_prompt="a green square")
    same(ours, theirs)
    assert not torch.allclose(plain, ours, atol=1e-3)


def test_conditions_count() -> None:
    opened = open_pipeline(stirred(pipeline()), size=SIZE)
    cond, x_t, t = opened.encode(PROMPTS), torch.randn(2, *opened.sample_shape), torch.full((2,), 0.5)
    with torch.no_grad():
        plain = opened.denoiser(x_t, t, cond)
        for key, other in {"mask": 1 - cond["mask"], "resolution": torch.full((2, 2), 900.0)}.items():
            assert not torch.allclose(plain, opened.denoiser(x_t, t, {**cond, key: other}), atol=1e-5), key


def test_prompts_are_cleaned_as_the_call_cleans_them() -> None:
    opened = open_pipeline(pipeline(), size=SIZE)
    shouted, said = (opened.encode([prompt])["prompt"] for prompt in (" A RED star ", "a red star"))
    torch.testing.assert_close(shouted, said, rtol=0, atol=0)


def test_a_network_without_a_variance() -> None:
    same(*beside(open_pipeline(stirred(pipeline(out_channels=4)), size=SIZE)))
