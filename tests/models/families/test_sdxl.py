"""Stable Diffusion XL beside its stock pipeline: what is null, sizes as conditions, told guidance, EDM's path."""

from __future__ import annotations

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from stepdistill.models.families import family_for, open_pipeline
from tests.models.families.beside import PROMPTS, beside, feels_its_input, same
from tests.models.test_every_family import stirred
from tests.tiny import sd, sdxl


@pytest.mark.parametrize("zeros", [True, False])
def test_without_a_negative_prompt_the_pipelines_config_decides(zeros: bool) -> None:
    opened = open_pipeline(stirred(sdxl.pipeline(zeros=zeros)))
    assert bool(opened.null["prompt"].any()) is not zeros
    assert bool(opened.null["pooled"].any()) is not zeros
    same(*beside(opened, scale=3.0, guidance_scale=3.0))


def test_a_negative_prompt() -> None:
    opened = open_pipeline(stirred(sdxl.pipeline()), negative="a green square")
    assert bool(opened.null["prompt"].any())
    same(*beside(opened, scale=3.0, guidance_scale=3.0, negative_prompt=["a green square"] * len(PROMPTS)))


def test_a_size_of_its_own_is_a_condition() -> None:
    opened = open_pipeline(stirred(sdxl.pipeline()), size=(24, 16))
    assert opened.encode(PROMPTS)["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]] * 2
    ours, theirs = beside(opened)
    same(ours, theirs)
    another, _ = beside(opened, extra={"time_ids": torch.full((2, 6), 16.0)})
    assert not torch.allclose(ours, another, atol=1e-3)
    with pytest.raises(ValueError, match=r"height and width in multiples of 4, such as \[16, 16\]"):
        open_pipeline(sdxl.pipeline(), size=(18, 16))


def test_a_guidance_told() -> None:
    opened = open_pipeline(stirred(sdxl.pipeline(time_cond_proj_dim=32)))
    same(*beside(opened, extra={"guidance": torch.full((2,), 7.5)}, guidance_scale=7.5))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_on_edms_path_with_latents_of_a_mean_and_deviation(prediction: str, steps: int) -> None:
    """As Playground v2.5: the one stock pipeline that samples an image network under EDM's schedulers."""
    moments = {"latents_mean": [0.5, -1.0, 0.2, 0.0], "latents_std": [2.0, 1.5, 3.0, 1.0]}
    scheduler = EDMDPMSolverMultistepScheduler(prediction_type=prediction)
    opened = open_pipeline(stirred(sdxl.pipeline(scheduler, latents=moments)))
    feels_its_input(opened)
    same(*beside(opened, steps=steps))
    assert isinstance(opened.pipeline.scheduler, EDMEulerScheduler)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = opened.pipeline.vae.encode(images).latent_dist.mode()
    back = opened.to_latents(images) * torch.tensor(moments["latents_std"])[:, None, None] / 0.18215
    torch.testing.assert_close(back + torch.tensor(moments["latents_mean"])[:, None, None], raw, rtol=1e-5, atol=1e-5)


def test_families_on_one_network_class_are_told_apart() -> None:
    scheduler = sd.pipeline().scheduler
    assert family_for(sd.unet(), scheduler).name == "sd"
    assert family_for(sdxl.xl_unet(), scheduler).name == "sdxl"
    for changes in ({"in_channels": 9}, {"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}):
        assert family_for(sdxl.xl_unet(**changes), scheduler) is None, changes  # inpainting and Kolors
