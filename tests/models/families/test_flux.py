"""FLUX.1 beside its stock pipeline: sizes, guidance told and guidance by a negative prompt."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxImg2ImgPipeline

from stepdistill.models.families import open_pipeline
from tests.models.families.beside import PROMPTS, beside, feels_its_input, same
from tests.models.test_every_family import stirred
from tests.tiny import flux


def test_a_size_of_its_own_and_a_guidance_told() -> None:
    opened = open_pipeline(stirred(flux.pipeline()), size=(24, 12))
    assert opened.sample_shape == (4, 12, 6)
    feels_its_input(opened)
    ours, theirs = beside(opened, extra={"guidance": torch.tensor([7.0, 7.0])}, guidance_scale=7.0)
    same(ours, theirs)
    default, bare = beside(opened)
    same(default, bare)
    assert not torch.allclose(default, ours, atol=2e-3)


def test_schnell_is_guided_by_a_negative_prompt() -> None:
    opened = open_pipeline(stirred(flux.pipeline(dynamic=False, guidance_embeds=False)), negative="a blue one")
    assert not opened.family.guidance_input(opened.denoiser.net)
    ours, theirs = beside(opened, scale=2.5, negative_prompt=["a blue one"] * 2, true_cfg_scale=2.5)
    same(ours, theirs)
    plain, bare = beside(opened)
    same(plain, bare)
    assert not torch.allclose(plain, ours, atol=2e-3)


def test_images_become_the_pipelines_own_latents() -> None:
    opened, images = open_pipeline(stirred(flux.pipeline())), torch.rand(2, 3, 16, 16) * 2 - 1
    own = FluxImg2ImgPipeline(**opened.pipeline.components)
    with torch.no_grad():
        theirs = own._encode_vae_image(images, torch.Generator().manual_seed(3))
    same(opened.to_latents(images, torch.Generator().manual_seed(3)), theirs)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        open_pipeline(flux.pipeline(), size=(16, 18))
    with pytest.raises(ValueError, match="told its guidance scale"):
        open_pipeline(flux.pipeline(), negative="ugly")
    with pytest.raises(ValueError, match="no family for FluxPipeline"):
        open_pipeline(flux.pipeline(in_channels=24, out_channels=16))


def test_all_prompts_have_one_shape() -> None:
    opened = open_pipeline(flux.pipeline())
    assert {v.shape[1:] for p in (*PROMPTS, "") for v in [opened.encode([p])["prompt"]]} == {(512, 32)}
