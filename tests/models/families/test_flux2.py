"""FLUX.2 beside its stock pipelines: dev told its guidance, klein guided, and latents by batch-norm statistics."""

from __future__ import annotations

import pytest
import torch

from stepdistill.models.families import open_pipeline
from tests.models.families.beside import beside, feels_its_input, same
from tests.models.test_every_family import stirred
from tests.tiny import flux2


def test_a_size_of_its_own_and_a_guidance_told() -> None:
    opened = open_pipeline(stirred(flux2.pipeline()), size=(24, 12))
    assert opened.sample_shape == (16, 6, 3)
    feels_its_input(opened)
    ours, theirs = beside(opened, extra={"guidance": torch.tensor([7.0, 7.0])}, guidance_scale=7.0)
    same(ours, theirs)
    default, bare = beside(opened)
    same(default, bare)
    assert not torch.allclose(default, ours, atol=1e-3)


def test_klein_is_guided_with_the_empty_prompt() -> None:
    opened = open_pipeline(stirred(flux2.klein()))
    plain, bare = beside(opened)
    same(plain, bare)
    ours, theirs = beside(opened, scale=3.0, guidance_scale=3.0)
    same(ours, theirs)
    assert not torch.allclose(plain, ours, atol=1e-3)


def test_images_become_the_pipelines_own_latents() -> None:
    opened, images = open_pipeline(stirred(flux2.pipeline())), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        same(opened.to_latents(images), opened.pipeline._encode_vae_image(images, None))


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        open_pipeline(flux2.pipeline(), size=(16, 18))
    with pytest.raises(ValueError, match="told its guidance scale"):
        open_pipeline(flux2.pipeline(), negative="ugly")
