"""DiT beside DiTPipeline: guidance against class 1000, with a learned variance or without, labels, its one size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.build import new_student
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import open_pipeline
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.stock import stock_scheduler
from tests.models.families.beside import same
from tests.models.test_every_family import stirred
from tests.tiny.dit import pipeline

LABELS = [3, 999]


def beside(scale: float, monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[Tensor, Tensor]:
    """Our images and the pipeline's own, whose drawn latents are ours."""
    opened = open_pipeline(stirred(pipeline(**changes)))
    torch.manual_seed(2)
    noise, student = torch.randn(2, *opened.sample_shape), new_student(opened, Sampler(trailing(2), Ddim()))
    predict = Guided(opened.denoiser, scale, opened.null)
    cond = opened.family.cond(opened.denoiser.net, {"labels": LABELS})
    with torch.no_grad():
        ours = opened.decode(student.sampler.run(predict, noise, cond, torch.Generator()))
    opened.pipeline.scheduler = stock_scheduler(student, opened)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *a, **k: noise.clone())
    theirs = opened.pipeline(LABELS, guidance_scale=scale, num_inference_steps=2, output_type="pt").images
    return (ours / 2 + 0.5).clamp(0, 1), theirs


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_and_a_learned_variance(scale: float, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    same(*beside(scale, monkeypatch, out_channels=channels))


def test_labels_and_size_are_checked() -> None:
    opened = open_pipeline(pipeline())
    assert opened.null["class_labels"].tolist() == [1000]
    for wrong in ([1000], [-1], [0.5]):
        with pytest.raises(ValueError, match="class labels must be integers from 0 to 999"):
            opened.family.cond(opened.denoiser.net, {"labels": wrong})
    with pytest.raises(ValueError, match="conditioned on class labels from 0 to 999; give some"):
        opened.family.cond(opened.denoiser.net, {})
    with pytest.raises(ValueError, match=r"makes \[16, 16\] only"):
        open_pipeline(pipeline(), size=(16, 24))
    with pytest.raises(ValueError, match="takes no prompts"):
        open_pipeline(pipeline(), negative="a green square")
    assert open_pipeline(pipeline(), size=(16, 16)).sample_shape == (4, 8, 8)


def test_labels_are_never_dropped_in_training() -> None:
    """DiT's label embedding drops a tenth of the labels of a network in training mode."""
    opened = open_pipeline(pipeline())
    opened.denoiser.net.train()
    Guided(opened.denoiser)
    student = new_student(opened, Sampler(trailing(1), Ddim()))
    assert not any(m.training for m in student.net.modules())
