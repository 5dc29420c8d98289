"""Lumina-Image 2.0 beside its stock pipeline: sizes and guidance."""

from __future__ import annotations

import pytest
import torch

from stepdistill.models.families import open_pipeline
from tests.models.families.stock_call import assert_same, both
from tests.models.test_every_family import stirred
from tests.tiny.lumina2 import pipeline


def test_another_size_under_guidance() -> None:
    opened = open_pipeline(stirred(pipeline()), size=(16, 48), negative="blue")
    assert opened.sample_shape == (4, 2, 6)
    # by default the pipeline then gives every row of latents the conditional one's length, as no sampler of ours does
    assert_same(both(opened, 3.0, negative_prompt="blue", cfg_normalization=False))


def test_every_prompt_has_the_same_shape() -> None:
    opened = open_pipeline(pipeline())
    assert opened.encode(["a", "a star " * 100])["prompt"].shape[1:] == opened.null["prompt"].shape[1:] == (256, 16)


def test_latents_are_shifted_and_scaled() -> None:
    opened, images = open_pipeline(pipeline()), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        bare = opened.pipeline.vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(opened.to_latents(images), (bare - 0.1) * 0.4)
        back = opened.pipeline.vae.decode(bare).sample
        torch.testing.assert_close(opened.decode(opened.to_latents(images)), back, rtol=1e-4, atol=1e-4)


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size \[24, 32\].*multiples of 16"):
        open_pipeline(pipeline(), size=(24, 32))
