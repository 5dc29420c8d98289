"""EDM's preconditioning beside its schedulers, consistency models beside their pipeline, and what neither can do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
)

from stepdistill.build import new_student
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.sampling import Ddim, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.stock import stock_scheduler
from tests.models.families.beside import same
from tests.models.test_every_family import stirred
from tests.tiny import edm, unet2d


class EDMPipeline(DiffusionPipeline):
    """What a user brings: diffusers has no pipeline for an image network under EDM's schedulers."""

    def __init__(self, unet: torch.nn.Module, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


def user_pipeline(scheduler: SchedulerMixin, **changes: object) -> Opened:
    return open_pipeline(stirred(EDMPipeline(unet2d.pipeline(**changes).unet, scheduler)))


def karras(scheduler: SchedulerMixin, steps: int) -> tuple[float, ...]:
    """The grid on which a consistency pipeline calls its network under its own scheduler, as fractions of its top."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    return times_of(*scheduler.sigmas[:-1])


def times_of(*sigmas: float) -> tuple[float, ...]:
    """Fractions of Karras' way from sigma_min to sigma_max (arXiv:2206.00364 eq. 5)."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return tuple(max((float(sigma) ** (1 / 7) - low) / (high - low), 1e-6) for sigma in sigmas)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_clean_estimates_are_the_schedulers_own(cls: type[SchedulerMixin], prediction: str) -> None:
    opened = user_pipeline(cls(prediction_type=prediction), num_class_embeds=5)
    scheduler, labels = opened.pipeline.scheduler, torch.tensor([1, 4])
    scheduler.set_timesteps(6)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        scheduler._step_index = None
        x_t = torch.randn(2, *opened.sample_shape) * sigma
        with torch.no_grad():
            raw = opened.denoiser.net(scheduler.scale_model_input(x_t, t), t, labels).sample
            t = torch.tensor(times_of(sigma), dtype=torch.float64).expand(2)
            ours = opened.denoiser(x_t, t, {"class_labels": labels})
        torch.testing.assert_close(ours, scheduler.precondition_outputs(x_t, raw, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [trailing(1), trailing(2), trailing(4), times_of(80, 8, 0.8, 0.08), (1.0, 0.6, 0.05)])
def test_a_students_steps_are_eulers(times: tuple[float, ...]) -> None:
    opened = user_pipeline(EDMEulerScheduler())
    student = new_student(opened, Sampler(times, Ddim()))
    scheduler = stock_scheduler(student, opened)
    scheduler.set_timesteps(len(times))
    noise = torch.randn(2, *opened.sample_shape)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            raw = student.net(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(raw, t, x).prev_sample
        same(student.sampler.run(student, noise, {}, torch.Generator()), x)


def test_a_consistency_pipeline_with_classes_on_its_own_grid() -> None:
    opened = open_pipeline(stirred(edm.pipeline(num_class_embeds=5)))
    cond = opened.family.cond(opened.denoiser.net, {"labels": [1, 4]})
    for times in (karras(opened.pipeline.scheduler, 3), trailing(3), times_of(80, 0.64)):
        student = new_student(opened, Sampler(times, Renoise()))
        noise = torch.randn(2, *opened.sample_shape)
        with torch.no_grad():
            ours = student.sampler.run(student, noise, cond, torch.Generator())
        pipeline = ConsistencyModelPipeline(student.net, stock_scheduler(student, opened))
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            2, [1, 4], len(times), latents=noise, generator=torch.Generator(), output_type="pt"
        ).images  # by its config alone: no ``timesteps=``
        same((ours / 2 + 0.5).clamp(0, 1), theirs)


def test_a_consistency_model_is_the_identity_at_its_least_noise() -> None:
    opened = open_pipeline(stirred(edm.pipeline()))
    x_t = torch.randn(3, *opened.sample_shape)
    t = torch.tensor([9e-7, 5e-7, 0.0], dtype=torch.float64)  # at most 0.002
    with torch.no_grad():
        torch.testing.assert_close(opened.denoiser(x_t, t, {}), x_t)
        at_zero = user_pipeline(EDMEulerScheduler()).denoiser(x_t, torch.zeros(3, dtype=torch.float64), {})
    torch.testing.assert_close(at_zero, x_t)


@pytest.mark.parametrize("rule", [Ddim(), Renoise(), Tcd(0.3)])
@pytest.mark.parametrize("make", [edm.pipeline, lambda: EDMPipeline(unet2d.pipeline().unet, EDMEulerScheduler())])
def test_in_one_step_all_rules_are_one(make: object, rule: StepRule) -> None:
    opened = open_pipeline(make())
    scheduler = stock_scheduler(new_student(opened, Sampler(trailing(1), rule)), opened)
    scheduler.set_timesteps(1)
    assert np.isclose(scheduler.sigmas[0], 80)


def test_what_no_stock_scheduler_does_is_said() -> None:
    consistency, euler = open_pipeline(edm.pipeline()), user_pipeline(EDMEulerScheduler())
    for opened, sampler, message in (
        (consistency, Sampler(trailing(2), Ddim()), r"use Renoise\(\)"),
        (euler, Sampler(trailing(2), Renoise()), r"use Ddim\(\)"),
        (consistency, Sampler((0.5,), Renoise()), r"would sample at \[80.0\]"),
        (consistency, Sampler(times_of(80, 72, 8), Renoise()), "even in"),
        (euler, Sampler(times_of(80, 72, 8, 7.2), Ddim()), "even in"),
        (consistency, Sampler(times_of(80, 0.008), Renoise()), "end at or above 0.044"),
    ):
        with pytest.raises(ValueError, match=message):
            stock_scheduler(new_student(opened, sampler), opened)
    ddpm = open_pipeline(DDPMPipeline(unet2d.pipeline().unet, EDMEulerScheduler()))
    with pytest.raises(ValueError, match="does not scale what its network is given"):
        stock_scheduler(new_student(ddpm, Sampler(trailing(1), Ddim())), ddpm)
    with pytest.raises(ValueError, match=r"EDMDPMSolverMultistepScheduler is none of epsilon, v_prediction"):
        user_pipeline(EDMDPMSolverMultistepScheduler(prediction_type="sample"))


def test_a_saved_scheduler_walks_the_trained_grid(tmp_path) -> None:
    opened = open_pipeline(edm.pipeline())
    stock_scheduler(new_student(opened, Sampler(trailing(4), Renoise())), opened).save_pretrained(tmp_path)
    again = CMStochasticIterativeScheduler.from_pretrained(tmp_path)
    again.set_timesteps(4)
    np.testing.assert_allclose(again.sigmas[:-1], [80.0, 17.53, 2.515, 0.1698], rtol=1e-3)
    assert not again.config.clip_denoised
