"""Opening pipelines: what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler, UNet2DModel
from torch import nn

from stepdistill.models.families import open_pipeline


def tiny(scheduler: object, **config: object) -> DDIMPipeline:
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **config,
    )  # fmt: skip
    return DDIMPipeline(net, scheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_live_pipeline_answers_as_its_scheduler_converts(prediction: str) -> None:
    """The clean estimate equals diffusers' own, whatever the network predicts."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    opened = open_pipeline(tiny(scheduler))
    x, index = torch.randn(3, 1, 8, 8), 400
    with torch.no_grad():
        got = opened.denoiser(x, torch.full((3,), (index + 1) / 1000, dtype=torch.float64), {})
        raw = opened.denoiser.net(x, index).sample
    scheduler.set_timesteps(1000)
    torch.testing.assert_close(got, scheduler.step(raw, index, x).pred_original_sample, rtol=1e-5, atol=1e-5)


def test_an_opened_folder_equals_the_live_pipeline(tmp_path: Path) -> None:
    pipeline = tiny(DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9], dtype=torch.float64)
    with torch.no_grad():
        ours = open_pipeline(tmp_path).denoiser(x, t, {})
        torch.testing.assert_close(ours, open_pipeline(pipeline).denoiser(x, t, {}), rtol=0, atol=0)


def test_labels_are_checked_against_the_network() -> None:
    opened = open_pipeline(tiny(DDIMScheduler(), num_class_embeds=4))
    net, cond = opened.denoiser.net, opened.family.cond
    assert cond(net, {"labels": [0, 3]})["class_labels"].tolist() == [0, 3]
    for wrong in ([4], [-1], [0.5]):
        with pytest.raises(ValueError, match="class labels must be integers from 0 to 3"):
            cond(net, {"labels": wrong})
    plain = open_pipeline(tiny(DDIMScheduler()))
    with pytest.raises(ValueError, match="unconditional"):
        plain.family.cond(plain.denoiser.net, {"labels": [0]})


def test_a_folder_that_brings_code_is_not_run(tmp_path: Path) -> None:
    tiny(DDIMScheduler()).save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["evil", "Pipe"]}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"brings its own code, evil\.py"):
        open_pipeline(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_pipeline(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        open_pipeline(tmp_path)
    tiny(DDIMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        open_pipeline(tmp_path)


def test_a_scheduler_without_a_plain_table_is_named() -> None:
    pipeline = tiny(DDIMScheduler())
    pipeline.scheduler = EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="load the teacher with DDIMScheduler"):
        open_pipeline(pipeline)


def test_an_unknown_network_is_told_what_a_family_provides() -> None:
    class Strange(nn.Module):
        """Nobody knows it."""

    pipeline = tiny(DDIMScheduler())
    pipeline.unet = Strange()
    with pytest.raises(ValueError, match="A new one is one file"):
        open_pipeline(pipeline)
