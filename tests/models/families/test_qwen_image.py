"""Qwen-Image beside its stock pipeline: sizes, masked prompts, true guidance and its rescaling, the video VAE."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline

from stepdistill.models.families import open_pipeline
from stepdistill.models.families.flux import pack
from tests.models.families.beside import PROMPTS, beside, feels_its_input, same
from tests.models.test_every_family import stirred
from tests.tiny import qwen_image


def test_a_size_of_its_own_with_an_odd_number_of_patches() -> None:
    opened = open_pipeline(stirred(qwen_image.pipeline()), size=(40, 24))
    assert opened.sample_shape == (4, 10, 6)
    feels_its_input(opened)
    same(*beside(opened))
    same(*beside(opened, prompts=PROMPTS[:1]))  # of one length: the pipeline leaves the mask out


def test_guidance_is_the_pipelines_before_its_rescaling() -> None:
    """The pipeline gives every patch of the guided velocity the length of the conditional one."""
    opened = open_pipeline(stirred(qwen_image.pipeline()), negative="a blue one")
    torch.manual_seed(2)
    noise, t = torch.randn(2, *opened.sample_shape), torch.ones(2, dtype=torch.float64)
    cond = opened.encode(PROMPTS)
    null = {k: v.expand_as(cond[k]) for k, v in opened.null.items()}
    with torch.no_grad():
        one, other = (pack(opened.denoiser(noise, t, c, want="velocity")) for c in (cond, null))
    guided = other + 3.0 * (one - other)
    rescaled = guided * one.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    arguments = {"negative_prompt": ["a blue one"] * 2, "true_cfg_scale": 3.0}
    _, theirs = beside(opened, steps=1, output_type="latent", **arguments)
    same(pack(noise) - rescaled, theirs)
    assert not torch.allclose(rescaled, guided, atol=1e-3)


def test_all_prompts_have_one_shape() -> None:
    opened = open_pipeline(qwen_image.pipeline())
    for prompts in (PROMPTS, [""], ["x" * 900]):
        cond = opened.encode(prompts)
        assert cond["prompt"].shape[1:] == (512, 16)
        assert cond["mask"].shape == cond["prompt"].shape[:2]
    assert bool(cond["mask"].all())
    assert not bool(opened.null["mask"].all())


def test_images_become_the_pipelines_own_latents() -> None:
    opened, images = open_pipeline(stirred(qwen_image.pipeline())), torch.rand(2, 3, 32, 32) * 2 - 1
    own = QwenImageImg2ImgPipeline(**opened.pipeline.components)
    with torch.no_grad():
        theirs = own._encode_vae_image(images.unsqueeze(2), torch.Generator().manual_seed(3))
    same(opened.to_latents(images, torch.Generator().manual_seed(3)), theirs.squeeze(2))


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        open_pipeline(qwen_image.pipeline(), size=(32, 36))
    with pytest.raises(ValueError, match="no family for QwenImagePipeline"):
        open_pipeline(qwen_image.pipeline(use_additional_t_cond=True))
