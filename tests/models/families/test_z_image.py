"""Z-Image beside its stock pipeline: sizes that need padding, prompts of any length, a guidance that counts from 0."""

from __future__ import annotations

import pytest
import torch

from stepdistill.models.families import open_pipeline
from tests.models.families.beside import PROMPTS, beside, feels_its_input, same
from tests.models.test_every_family import stirred
from tests.tiny import z_image


def test_a_size_whose_patches_are_padded() -> None:
    opened = open_pipeline(stirred(z_image.pipeline()), size=(24, 20))
    assert opened.sample_shape == (4, 12, 10)
    feels_its_input(opened)
    same(*beside(opened))


def test_guidance_counts_from_0_in_the_pipeline() -> None:
    opened = open_pipeline(stirred(z_image.pipeline()), size=(16, 16), negative="a blue one")
    negative = ["a blue one"] * 2
    ours, theirs = beside(opened, scale=3.0, negative_prompt=negative, guidance_scale=2.0)
    same(ours, theirs)
    plain, _ = beside(opened)
    assert not torch.allclose(plain, ours, atol=1e-3)


def test_all_prompts_have_one_shape() -> None:
    opened = open_pipeline(z_image.pipeline(), size=(16, 16))
    for prompts in (PROMPTS, [""], ["x" * 900]):
        cond = opened.encode(prompts)
        assert cond["prompt"].shape[1:] == (512, 16)
        assert cond["mask"].shape == cond["prompt"].shape[:2]
    assert bool(cond["mask"].all())


def test_decoding_undoes_encoding_up_to_the_vae() -> None:
    opened, images = open_pipeline(stirred(z_image.pipeline()), size=(16, 16)), torch.rand(2, 3, 16, 16) * 2 - 1
    vae = opened.pipeline.vae
    with torch.no_grad():
        bare = vae.decode(vae.encode(images).latent_dist.mode()).sample
    same(opened.decode(opened.to_latents(images)), bare)


def test_what_cannot_be_is_said() -> None:
    assert open_pipeline(z_image.pipeline()).sample_shape == (4, 512, 512)
    with pytest.raises(ValueError, match="multiples of 4"):
        open_pipeline(z_image.pipeline(), size=(16, 18))
    with pytest.raises(ValueError, match="no family for ZImagePipeline"):
        open_pipeline(z_image.pipeline(siglip_feat_dim=8))
