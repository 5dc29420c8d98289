"""Sana beside its stock pipeline: sizes, guidance, networks without a learned sigma, and what is refused."""

from __future__ import annotations

import pytest
import torch

from stepdistill.models.families import open_pipeline
from tests.models.families.stock_call import assert_same, both
from tests.models.test_every_family import stirred
from tests.tiny.sana import pipeline


def test_another_size_under_guidance() -> None:
    opened = open_pipeline(stirred(pipeline()), size=(32, 64), negative="blue")
    assert opened.sample_shape == (4, 8, 16)
    assert_same(both(opened, 3.0, negative_prompt="blue"))


def test_positions_and_no_learned_sigma() -> None:
    plain = pipeline(out_channels=4, timestep_scale=1.0, interpolation_scale=1.0, qk_norm=None)
    assert_same(both(open_pipeline(stirred(plain), size=(64, 32))))


def test_every_prompt_has_the_same_shape_and_goes_with_the_instruction() -> None:
    opened = open_pipeline(pipeline())
    prompts = opened.encode(["a", "a star " * 100])
    assert prompts["prompt"].shape[1:] == opened.null["prompt"].shape[1:] == (300, 16)
    alone = opened.family.null(opened.pipeline, "a", None)
    assert not torch.allclose(prompts["prompt"][:1], alone["prompt"], atol=1e-4)


def test_latents_are_scaled() -> None:
    opened, images = open_pipeline(pipeline()), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        bare = opened.pipeline.vae.encode(images).latent
        torch.testing.assert_close(opened.to_latents(images), 0.41 * bare)
        torch.testing.assert_close(opened.decode(0.41 * bare), opened.pipeline.vae.decode(bare).sample)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size \[48, 32\].*multiples of 32"):
        open_pipeline(pipeline(), size=(48, 32))
    with pytest.raises(ValueError, match="no family for SanaPipeline"):
        open_pipeline(pipeline(guidance_embeds=True))
