"""AnimateDiff beside its stock pipeline: sizes and guidance."""

from __future__ import annotations

import pytest
import torch

from stepdistill.models.families import open_pipeline
from tests.models.families.stock_call import assert_same, both
from tests.models.test_every_family import stirred
from tests.tiny.animatediff import SIZE, pipeline


def test_another_size_under_guidance() -> None:
    opened = open_pipeline(stirred(pipeline()), size=(3, 24, 16), negative="blue")
    assert opened.sample_shape == (4, 3, 12, 8)
    assert_same(both(opened, 3.0, negative_prompt=["blue"] * 2))


def test_latents_are_those_of_each_frame() -> None:
    opened, videos = open_pipeline(pipeline(), size=SIZE), torch.rand(2, 3, *SIZE) * 2 - 1
    vae = opened.pipeline.vae
    with torch.no_grad():
        bare = vae.encode(videos[:, :, 1]).latent_dist.mode()
        latents = opened.to_latents(videos)
        assert latents.shape == (2, *opened.sample_shape)
        torch.testing.assert_close(latents[:, :, 1], bare * vae.config.scaling_factor)
        torch.testing.assert_close(opened.decode(latents)[:, :, 1], vae.decode(bare).sample, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_made_is_refused() -> None:
    assert open_pipeline(pipeline()).sample_shape == (4, 16, 8, 8)
    with pytest.raises(ValueError, match=r"size \[17, 16, 16\]: these motion modules know 16 frames"):
        open_pipeline(pipeline(), size=(17, 16, 16))
    with pytest.raises(ValueError, match=r"size \[16, 16\]: .* makes 3 sides"):
        open_pipeline(pipeline(), size=(16, 16))
    with pytest.raises(ValueError, match=r"size \[4, 16, 18\].*multiples of 4"):
        open_pipeline(pipeline(), size=(4, 16, 18))
