"""What holds for every family: the few-step loop makes the stock images, and stock calls run no negative branch.

One case per file in tests/tiny. The reference is diffusers' own call, with the arguments that export records.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import stepdistill
from stepdistill.build import new_student
from stepdistill.inference import Parts, optimize
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.sampling import Ddim, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.stock import stock_scheduler
from tests.models.test_every_family import PROMPTS, TINY, stirred

STEPS = 2
EXACT = 5e-6
"""Of images in [0, 1]: the loop rounds its coefficients otherwise than diffusers' schedulers do."""


@pytest.fixture(scope="module", params=TINY)
def opened(request: pytest.FixtureRequest) -> Opened:
    """Each tiny pipeline in turn, holding an untrained student of two steps."""
    tiny = importlib.import_module(f"tests.tiny.{request.param}")
    made = open_pipeline(stirred(tiny.pipeline()), size=getattr(tiny, "SIZE", None))
    hold(made, Renoise() if made.family.name == "edm" else Ddim())
    return made


def hold(opened: Opened, rule: StepRule, steps: int = STEPS) -> None:
    student = new_student(opened, Sampler(trailing(steps), rule))
    opened.pipeline.scheduler = stock_scheduler(student, opened)


def wanted(opened: Opened) -> list[str] | list[int] | int:
    takes = opened.pipeline.scheduler.config["_student"]["takes"]
    return {"prompt": list(PROMPTS), "class_labels": [1, 2], "batch_size": 2}[takes]


def drawn(opened: Opened, **options: object) -> Tensor:
    return stepdistill.sample(opened.pipeline, wanted(opened), output="float", seed=3, **options)


@contextmanager
def counted(pipeline: DiffusionPipeline, name: str) -> Iterator[list[int]]:
    """Batch sizes of all calls of a component."""
    sizes: list[int] = []
    hook = pipeline.components[name].register_forward_pre_hook(
        lambda net, args, kwargs: sizes.append(len(next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v)))),
        with_kwargs=True,
    )
    try:
        yield sizes
    finally:
        hook.remove()


def test_a_stock_call_with_the_recorded_arguments_runs_no_negative_branch(opened: Opened) -> None:
    with counted(opened.pipeline, opened.family.module) as sizes:
        drawn(opened)
    assert sizes == [2] * STEPS


def test_the_loop_makes_the_stock_images(opened: Opened) -> None:
    want = drawn(opened)
    with counted(opened.pipeline, opened.family.module) as sizes:
        got = drawn(opened, optimize=Parts(cache_text=False, channels_last=False))
    assert sizes == [2] * STEPS
    torch.testing.assert_close(got, want, rtol=0, atol=EXACT)
    if opened.family.name != "unet2d":  # this one's random images are black and white
        assert ((want > 0) & (want < 1)).float().mean() > 0.3  # or clamping would hide a difference


def test_caches_change_no_bit_of_a_stock_call_or_of_the_loop(opened: Opened) -> None:
    if opened.family.encode is None:
        pytest.skip("takes no prompts")
    pipeline, record = opened.pipeline, opened.pipeline.scheduler.config["_student"]
    latents = opened.family.pack(torch.randn(2, *opened.sample_shape))

    def stock() -> Tensor:
        made = pipeline(
            **record["call"], prompt=list(PROMPTS), latents=latents, generator=torch.Generator(), output_type="pt"
        )
        return made.frames if hasattr(made, "frames") else made.images

    want, plain = stock(), drawn(opened, optimize=Parts(cache_text=False, channels_last=False))
    with optimize(pipeline, channels_last=False) as optimized:
        encoder = next(name for name in pipeline.components if name.startswith("text_encoder"))
        for first in (True, False):
            with counted(pipeline, encoder) as calls:
                assert torch.equal(stock(), want)
            assert bool(calls) is first  # the second time nothing is encoded
            assert torch.equal(drawn(opened), plain)
        kept = 0 if optimized.kv is None else optimized.kv.layers
    assert (kept > 0) == (opened.family.name in ("sd", "sdxl", "pixart", "sana", "wan"))
    assert torch.equal(stock(), want)


def test_noise_between_steps_is_the_stock_pipelines(opened: Opened) -> None:
    """Seeded for each sample where the pipeline passes its generator on, torch's own elsewhere, packed or not."""
    if opened.family.name == "flux2":
        pytest.skip("draws in an order of its own, as the docstring of noise() says")
    before = opened.pipeline.scheduler
    try:
        hold(opened, Renoise(), 4)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        want = drawn(opened)
        got = drawn(opened, optimize=Parts(cache_text=False, channels_last=False))
        # consistency schedulers re-noise to sqrt(sigma^2 - sigma_min^2), see stock.py
        torch.testing.assert_close(got, want, rtol=0, atol=5e-4 if opened.family.name == "edm" else 2 * EXACT)
    finally:
        opened.pipeline.scheduler = before


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "sana", "wan"])
def test_students_that_keep_guidance_are_guided_as_the_stock_pipeline_does(name: str) -> None:
    tiny = importlib.import_module(f"tests.tiny.{name}")
    opened = open_pipeline(stirred(tiny.pipeline()), size=getattr(tiny, "SIZE", None))
    hold(opened, Ddim())
    options = {"guidance": 2.5, "output": "float", "negative_prompt": ["red"]}
    want = stepdistill.sample(opened.pipeline, PROMPTS[0], **options)
    with counted(opened.pipeline, opened.family.module) as sizes:
        got = stepdistill.sample(opened.pipeline, PROMPTS[0], **options, optimize=True)
    assert sizes == [2] * STEPS
    torch.testing.assert_close(got, want, rtol=0, atol=4 * EXACT)
    assert not torch.allclose(got, stepdistill.sample(opened.pipeline, PROMPTS[0], output="float"), atol=1e-3)


def test_tcd_is_sampled_as_the_stock_pipeline_does() -> None:
    opened = open_pipeline(stirred(importlib.import_module("tests.tiny.sd").pipeline()))
    hold(opened, Tcd(0.3), 4)
    want, got = drawn(opened), drawn(opened, optimize=Parts(cache_text=False, channels_last=False))
    torch.testing.assert_close(got, want, rtol=0, atol=2 * EXACT)
