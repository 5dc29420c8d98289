"""pipelines/class_conditional.py against the library's own sampler and diffusers' stock loops.

Both sides do float32 arithmetic with coefficients that the library rounds once from float64 and diffusers computes in
float32, so they agree to a few float32 roundings of the largest value: measured below 1e-6 of it, asserted at 5e-6.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UNet2DModel,
)
from torch import Tensor

from stepdistill.models.denoiser import Guided
from stepdistill.models.families import open_pipeline
from stepdistill.paths import project_dir
from stepdistill.sampling import Ddim, DpmPP2M, Sampler, Tcd, sample, sample_rngs, trailing

LABELS = torch.tensor([0, 3, 9, 10])
SHAPE = (4, 1, 8, 8)
TABLE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def load_file_as_module() -> ModuleType:
    file = project_dir("pipelines") / "class_conditional.py"
    spec = importlib.util.spec_from_file_location("class_conditional", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Pipeline = load_file_as_module().ClassConditionalPipeline


def tiny_net(classes: int | None = 11, channels: int = 1) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=classes,
    ).eval()


def ddim(prediction: str = "v_prediction") -> DDIMScheduler:
    return DDIMScheduler(prediction_type=prediction, timestep_spacing="trailing", clip_sample=False)


def pipeline(scheduler=None, **config) -> DiffusionPipeline:
    pipe = Pipeline(tiny_net(), scheduler or ddim(), **{"null_label": 10, **config})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, steps: int | None = None, **options) -> Tensor:
    return pipe(LABELS, steps, generator=sample_rngs(0, range(4)), output_type="latent", **options).images


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("steps", [4, 1])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_teacher_samples_as_the_library_does(prediction: str, steps: int) -> None:
    pipe = pipeline(ddim(prediction))
    denoiser = open_pipeline(pipe).denoiser
    want = sample(denoiser, SHAPE, {"class_labels": LABELS}, Sampler(trailing(steps), Ddim()))
    assert_same(draw(pipe, steps), want)


@pytest.mark.parametrize("steps", [50, 4, 1])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_library_samples_as_the_stock_ddim_pipeline(prediction: str, steps: int) -> None:
    """The stock pipeline clamps to [0, 1]; beta_end = 0.001 keeps an untrained eps-network mostly inside of it."""
    pipe = DDIMPipeline(tiny_net(None), DDIMScheduler.from_config(ddim(prediction).config, beta_end=0.001))
    pipe.set_progress_bar_config(disable=True)
    got = pipe(4, sample_rngs(0, range(4)), num_inference_steps=steps, output_type="pt").images
    want = sample(open_pipeline(pipe).denoiser, SHAPE, {}, Sampler(trailing(steps), Ddim())) / 2 + 0.5
    assert ((want > 0) & (want < 1)).float().mean() > 0.3
    torch.testing.assert_close(got, want.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0, 0.0])
def test_guidance_counts_as_in_the_library(scale: float) -> None:
    pipe = pipeline()
    opened = open_pipeline(pipe)
    teacher = Guided(opened.denoiser, scale, opened.null)
    want = sample(teacher, SHAPE, {"class_labels": LABELS}, Sampler(trailing(4), Ddim()))
    assert_same(draw(pipe, 4, guidance_scale=scale), want)


def test_guidance_costs_one_batch_of_twice_the_size_and_scale_1_nothing() -> None:
    pipe, sizes = pipeline(), []
    pipe.unet.register_forward_hook(lambda net, given, out: sizes.append(len(given[0])))
    draw(pipe, 2, guidance_scale=2.0)
    draw(pipe, 2)
    assert sizes == [8, 8, 4, 4]


def test_other_schedulers_of_the_teacher_give_their_samples() -> None:
    """Euler on the sigma axis is DDIM: 1e-4 since its sigma table is float32 and its start is sigma_T, not 1.

    TABLE is spelt out since ``from_config`` drops values that were defaults, and Heun's default table is another one.
    """
    pipe = pipeline()
    denoiser, config = open_pipeline(pipe).denoiser, TABLE | {"timestep_spacing": "trailing"}
    cond = {"class_labels": LABELS}
    pipe.scheduler = EulerDiscreteScheduler(**config)
    want = sample(denoiser, SHAPE, cond, Sampler(trailing(10), Ddim()))
    torch.testing.assert_close(draw(pipe, 10), want, rtol=0, atol=1e-4)

    pipe.scheduler = DPMSolverMultistepScheduler(**config, final_sigmas_type="zero")
    assert_same(draw(pipe, 10), sample(denoiser, SHAPE, cond, Sampler(trailing(10), DpmPP2M())))

    pipe.scheduler = HeunDiscreteScheduler(**config)
    want = sample(denoiser, SHAPE, cond, Sampler(trailing(1), Ddim()))
    torch.testing.assert_close(draw(pipe, 1), want, rtol=0, atol=1e-4)


def test_gamma_of_the_config_reaches_the_steps() -> None:
    """0.8 and not TCDScheduler's own 0.3."""
    pipe = pipeline(TCDScheduler(**TABLE, original_inference_steps=4), trained_steps=[4], gamma=0.8)
    want = sample(open_pipeline(pipe).denoiser, SHAPE, {"class_labels": LABELS}, Sampler(trailing(4), Tcd(0.8)))
    assert_same(draw(pipe), want)


def test_tcd_ends_at_the_data_where_the_stock_scheduler_keeps_noise() -> None:
    """TCDScheduler's last step aims at table entry 0, so sigma_0 = 0.01 of the predicted noise stays in the image."""
    pipe = pipeline(TCDScheduler(**TABLE, original_inference_steps=1), gamma=0.3)
    x = torch.randn(SHAPE)
    clean = pipe(LABELS, 1, latents=x, output_type="latent").images
    with torch.no_grad():
        output = pipe.unet(x, 999, class_labels=LABELS).sample
    stock = pipe.scheduler
    stock.set_timesteps(1)
    stopped = stock.step(output, stock.timesteps[0], x, return_dict=False)[0]
    alpha_bar = stock.alphas_cumprod[0]
    noise = (x - stock.alphas_cumprod[999].sqrt() * clean) / (1 - stock.alphas_cumprod[999]).sqrt()
    torch.testing.assert_close(stopped, alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise)
    assert (stopped - clean).std() > 5e-3


STUDENTS: dict[str, Callable[[int], object]] = {
    "ddim": lambda k: ddim(),
    "lcm": lambda k: LCMScheduler(**TABLE, original_inference_steps=k, clip_sample=False),
    "tcd": lambda k: TCDScheduler(**TABLE, original_inference_steps=k),
}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize(
    ("steps", "timesteps"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])], ids=["1", "2", "4"]
)
def test_a_student_takes_its_trained_timesteps_by_default(name: str, steps: int, timesteps: list[int]) -> None:
    pipe = pipeline(STUDENTS[name](steps), trained_steps=[steps])
    seen: list[int] = []
    pipe.unet.register_forward_hook(lambda net, given, out: seen.append(int(given[1])))
    draw(pipe)
    assert seen == timesteps


def test_a_student_refuses_other_steps_and_names_its_grid() -> None:
    grid = r"num_inference_steps 3: this student was trained for 4 \(timesteps 999, 749, 499, 249\)"
    with pytest.raises(ValueError, match=grid):
        draw(pipeline(trained_steps=[4]), 3)
    with pytest.raises(ValueError, match=r"1 \(timesteps 999\) or 2 \(timesteps 999, 499\)"):
        draw(pipeline(trained_steps=[1, 2]), 4)
    with pytest.raises(ValueError, match=r"choose one of \[1, 2\]"):
        draw(pipeline(trained_steps=[1, 2]))


def test_a_student_refuses_a_scheduler_with_another_grid() -> None:
    pipe = pipeline(trained_steps=[4])
    pipe.scheduler = LCMScheduler(**TABLE)  # its 50-point default takes 999, 759, 499, 259
    with pytest.raises(ValueError, match=r"LCMScheduler goes through 999, 759, 499, 259, but .* 999, 749, 499, 249"):
        draw(pipe)


@pytest.mark.parametrize("labels", [11, -1, [0, 11], 1.5, [True], "cat", ["cat"], [], torch.tensor([0.0])], ids=repr)
def test_labels_out_of_range_are_one_clear_error(labels: object) -> None:
    with pytest.raises(ValueError, match=r"class_labels must be integers from 0 to 10 \(10 stands for no class\); got"):
        pipeline()(labels, 1)


def test_bad_arguments_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"guidance_scale 2.0 needs a null label"):
        draw(pipeline(null_label=None), 1, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"num_inference_steps must be at least 1; got 0"):
        draw(pipeline(), 0)
    with pytest.raises(ValueError, match=r"one per label; got 3 for 2 labels"):
        pipeline()([0, 1], 1, generator=sample_rngs(0, range(3)))
    with pytest.raises(ValueError, match=r"latents must be noise of shape \(2, 1, 8, 8\); got \(1, 1, 8, 8\)"):
        pipeline()([0, 1], 1, latents=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"output_type must be one of pil, np, pt, latent; got 'jpg'"):
        pipeline()(0, 1, output_type="jpg")
    with pytest.raises(ValueError, match=r"unet has no num_class_embeds"):
        Pipeline(tiny_net(None), ddim())
    with pytest.raises(ValueError, match=r"null_label must lie in 0 to 10"):
        pipeline(null_label=11)
    with pytest.raises(ValueError, match=r"trained_steps must be a list"):
        pipeline(trained_steps=[])
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]; got 1.5"):
        pipeline(gamma=1.5)


def test_guidance_on_a_student_warns() -> None:
    with pytest.warns(UserWarning, match=r"guidance_scale 2.0 on a student"):
        draw(pipeline(trained_steps=[1]), guidance_scale=2.0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_are_one_image_in_several_forms(channels: int, mode: str) -> None:
    pipe = Pipeline(tiny_net(channels=channels), ddim())
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, channels, 8, 8)
    raw, tensor, array, pictures = (
        pipe([0, 1], 1, latents=latents, output_type=kind, return_dict=False)[0]
        for kind in ("latent", "pt", "np", "pil")
    )
    torch.testing.assert_close(tensor, (raw / 2 + 0.5).clamp(0, 1))
    assert tensor.shape == (2, channels, 8, 8)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(torch.from_numpy(array), tensor.permute(0, 2, 3, 1))
    assert [p.mode for p in pictures] == [mode, mode]
    pixels = torch.tensor(list(pictures[0].tobytes())).reshape(8, 8, channels)
    torch.testing.assert_close(pixels, (tensor[0].permute(1, 2, 0) * 255).round().long())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """With a generator each; the convolutions of another batch size may round differently."""
    pipe = pipeline(STUDENTS["lcm"](4), trained_steps=[4])
    alone = pipe(9, generator=sample_rngs(0, [2]), output_type="latent").images
    torch.testing.assert_close(alone, draw(pipe)[2:3], rtol=0, atol=1e-5)


def test_the_bundled_teacher_loads_and_takes_50_steps() -> None:
    pipe = DiffusionPipeline.from_pretrained(
        str(project_dir("assets") / "digits" / "teacher"),
        custom_pipeline=str(project_dir("pipelines") / "class_conditional.py"),
        trust_remote_code=True,
        use_safetensors=True,
    )
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.config.null_label, pipe.config.trained_steps, pipe.config.gamma) == (10, None, None)
    opened = open_pipeline(pipe)
    want = sample(opened.denoiser, SHAPE, {"class_labels": LABELS}, Sampler(trailing(50), Ddim()))
    assert_same(draw(pipe), want)
    assert len(pipe.scheduler.timesteps) == 50


def test_a_pipeline_saved_by_diffusers_keeps_its_settings(tmp_path) -> None:
    pipe = pipeline(STUDENTS["tcd"](2), trained_steps=[2], gamma=0.5)
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert (again.config.null_label, again.config.trained_steps, again.config.gamma) == (10, [2], 0.5)
    torch.testing.assert_close(draw(again), draw(pipe), rtol=0, atol=0)
