"""Opening pipelines: what is refused, and in which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import nn

from stepdistill.models.families import open_pipeline
from tests.tiny import sd, sd3


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


def test_a_folder_with_a_part_missing_is_named_by_the_part(tmp_path: Path) -> None:
    tiny(DDIMScheduler()).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"names a part 'scheduler', and there is no folder scheduler/"):
        open_pipeline(tmp_path)


def test_a_part_of_a_pipeline_leads_to_the_whole(tmp_path: Path) -> None:
    tiny(DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"part of the pipeline {str(tmp_path)!r}, name that"):
        open_pipeline(tmp_path / "unet")


@pytest.mark.parametrize("text", ["[]", "3", "\udcff"])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    tiny(DDIMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"model_index\.json is damaged"):
        open_pipeline(tmp_path)


def test_mixed_dtypes_are_named_by_the_part() -> None:
    pipeline = sd.pipeline()
    pipeline.text_encoder.half()
    with pytest.raises(ValueError, match=r"text_encoder holds torch\.float16 weights; training starts from float32"):
        open_pipeline(pipeline)


def test_a_tokenizer_of_another_model_is_found_out() -> None:
    pipeline = sd.pipeline()
    pipeline.text_encoder.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"tokenizer has 190 ids, and its text encoder knows 50"):
        open_pipeline(pipeline)


def test_a_scheduler_of_another_kind_is_named() -> None:
    pipeline = sd.pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no betas"):
        open_pipeline(pipeline)
    pipeline = sd3.pipeline()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler is no flow-matching scheduler"):
        open_pipeline(pipeline)


def test_an_unknown_prediction_type_is_named() -> None:
    pipeline = sd.pipeline(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type 'flow' of DDIMScheduler is none of epsilon, sample"):
        open_pipeline(pipeline)


def test_a_pipeline_without_text_refuses_prompts() -> None:
    with pytest.raises(ValueError, match="DDIMPipeline takes no prompts"):
        open_pipeline(tiny(DDIMScheduler())).encode(["a cat"])
    with pytest.raises(ValueError, match="takes no prompts; leave it empty"):
        open_pipeline(tiny(DDIMScheduler()), negative="blurry")


@pytest.mark.parametrize("size", [(16,), (16, 17), (0, 16), (4, 16, 16)])
def test_a_size_that_cannot_be_made_is_named(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"teacher\.size .*makes 2 sides, .*such as \[16, 16\]"):
        open_pipeline(sd.pipeline(), size=size)


def test_sd3_without_t5_opens_from_its_folder(tmp_path: Path) -> None:
    """diffusers wants to be told once more that it is not there."""
    live = sd3.pipeline()
    live.register_modules(text_encoder_3=None, tokenizer_3=None)
    live.save_pretrained(tmp_path)
    ours, theirs = open_pipeline(tmp_path), open_pipeline(live)
    for key, value in theirs.encode(["a"]).items():
        torch.testing.assert_close(ours.encode(["a"])[key], value, rtol=0, atol=0)


def test_a_recorded_text_length_is_the_one_that_is_used(tmp_path: Path) -> None:
    live = sd3.pipeline()
    live.register_to_config(_max_sequence_length=5)
    live.save_pretrained(tmp_path)
    assert open_pipeline(tmp_path).encode(["a"])["prompt"].shape[1] == 12 + 5
    assert open_pipeline(sd3.pipeline()).encode(["a"])["prompt"].shape[1] == 12 + 256


def test_latents_go_there_and_back_as_the_vae_does() -> None:
    """Shift and scale undo each other, whatever the VAE loses in between."""
    pipeline = sd3.pipeline()
    pipeline.vae.register_to_config(scaling_factor=1.5, shift_factor=0.3)
    opened, images = open_pipeline(pipeline), torch.rand(2, 3, 16, 16) * 2 - 1
    latents = opened.to_latents(images)
    with torch.no_grad():
        raw = pipeline.vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(latents, (raw - 0.3) * 1.5)
        torch.testing.assert_close(opened.decode(latents), pipeline.vae.decode(raw).sample, rtol=1e-4, atol=1e-4)
    drawn = opened.to_latents(images, torch.Generator().manual_seed(1))
    assert not torch.equal(drawn, latents)
