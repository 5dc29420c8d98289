"""CogVideoX beside its stock pipeline: three kinds of positions, sizes, guidance, schedulers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler

from stepdistill.models.families import open_pipeline
from stepdistill.stock import same_table
from tests.models.families.stock_call import assert_same, both
from tests.models.test_every_family import stirred
from tests.tiny.cogvideox import pipeline

KINDS: dict[str, dict[str, Any]] = {
    "2b": {"use_rotary_positional_embeddings": False},
    "5b": {},
    "1.5": {"patch_size_t": 2, "patch_bias": False, "sample_width": 12, "sample_height": 12},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(9, 16, 24), (17, 24, 16), (1, 16, 16)])
def test_another_size_under_guidance(kind: str, size: tuple[int, ...]) -> None:
    opened = open_pipeline(stirred(pipeline(**KINDS[kind])), size=size, negative="blue")
    assert opened.sample_shape[1] == size[0] // 4 + 1 + (kind == "1.5")
    ours, theirs = both(opened, 3.0, negative_prompt="blue")
    assert ours.shape[2:] == size
    assert_same((ours, theirs))


def test_the_teachers_scheduler_samples_so_too() -> None:
    opened = open_pipeline(stirred(pipeline()))
    assert float(opened.denoiser.schedule(torch.ones(1, dtype=torch.float64)).alpha) == 0
    assert_same(both(opened, own_scheduler=True))


def test_the_scheduler_of_the_larger_networks_has_the_same_table() -> None:
    teacher, larger = open_pipeline(pipeline()), pipeline()
    larger.scheduler = CogVideoXDPMScheduler.from_config(teacher.pipeline.scheduler.config)
    assert same_table(open_pipeline(larger).denoiser.schedule, teacher.denoiser.schedule)


@pytest.mark.parametrize("kind", ["5b", "1.5"])
def test_latents_are_scaled_and_padded(kind: str) -> None:
    opened, videos = open_pipeline(pipeline(**KINDS[kind]), size=(9, 16, 24)), torch.rand(2, 3, 9, 16, 24) * 2 - 1
    vae = opened.pipeline.vae
    with torch.no_grad():
        bare, latents = vae.encode(videos).latent_dist.mode(), opened.to_latents(videos)
        assert latents.shape == (2, *opened.sample_shape)
        torch.testing.assert_close(latents[:, :, -3:], bare * vae.config.scaling_factor)
        torch.testing.assert_close(opened.decode(latents), vae.decode(bare).sample, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size \[5, 16, 24\]: frames must be a multiple of 8 and 1 more"):
        open_pipeline(pipeline(), size=(5, 16, 24))
    with pytest.raises(ValueError, match=r"size \[9, 12, 24\].*multiples of 8"):
        open_pipeline(pipeline(), size=(9, 12, 24))
    with pytest.raises(ValueError, match="no family for CogVideoXPipeline"):
        open_pipeline(pipeline(in_channels=8))
    opened = open_pipeline(pipeline(**KINDS["1.5"]))
    with pytest.raises(ValueError, match="no discriminator reads"):
        opened.family.taps(opened.denoiser.net)
