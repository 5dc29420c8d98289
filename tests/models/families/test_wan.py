"""Wan beside its stock pipeline: sizes, guidance, Wan 2.2 (5B), and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from stepdistill.models.families import open_pipeline
from tests.models.families.stock_call import assert_same, both
from tests.models.test_every_family import stirred
from tests.tiny.wan import SIZE, pipeline, transformer, vae


@pytest.mark.parametrize(("size", "shape"), [((9, 16, 32), (4, 3, 2, 4)), ((1, 32, 16), (4, 1, 4, 2))])
def test_another_size_under_guidance(size: tuple[int, ...], shape: tuple[int, ...]) -> None:
    opened = open_pipeline(stirred(pipeline()), size=size, negative="blue")
    assert opened.sample_shape == shape
    assert_same(both(opened, 3.0, negative_prompt="blue"))


def test_the_scheduler_that_wan_comes_with() -> None:
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert_same(both(open_pipeline(stirred(pipeline(scheduler=scheduler)), size=SIZE)))


def test_one_time_for_all_tokens_does_for_wan_22() -> None:
    patched = vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    opened = open_pipeline(stirred(pipeline(vae=patched, expand_timesteps=True)), size=(5, 32, 64))
    assert opened.sample_shape == (4, 2, 2, 4)
    assert_same(both(opened))


def test_channels_are_normalised() -> None:
    opened, videos = open_pipeline(pipeline(), size=SIZE), torch.rand(2, 3, *SIZE) * 2 - 1
    with torch.no_grad():
        bare = opened.pipeline.vae.encode(videos).latent_dist.mode()
        latents = opened.to_latents(videos)
        assert latents.shape == (2, *opened.sample_shape)
        torch.testing.assert_close(latents[:, 1], (bare[:, 1] - 0.3) / 1.4)
        back = opened.pipeline.vae.decode(bare).sample
        torch.testing.assert_close(opened.decode(latents), back, rtol=1e-4, atol=1e-4)
    assert not torch.equal(opened.to_latents(videos, torch.Generator()), latents)


def test_every_prompt_has_the_same_shape() -> None:
    opened = open_pipeline(pipeline(), size=SIZE)
    assert opened.encode(["a", "a star " * 100])["prompt"].shape[1:] == opened.null["prompt"].shape[1:] == (512, 16)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size \[6, 32, 48\]: frames must be a multiple of 4 and 1 more"):
        open_pipeline(pipeline(), size=(6, 32, 48))
    with pytest.raises(ValueError, match=r"size \[5, 24, 48\].*multiples of 16"):
        open_pipeline(pipeline(), size=(5, 24, 48))
    with pytest.raises(ValueError, match=r"boundary_ratio 0.875: two networks.*take Wan 2.1"):
        open_pipeline(pipeline(transformer_2=transformer(), boundary_ratio=0.875), size=SIZE)
    with pytest.raises(ValueError, match="no family for WanPipeline"):
        open_pipeline(pipeline(transformer=transformer(in_channels=8)), size=SIZE)
