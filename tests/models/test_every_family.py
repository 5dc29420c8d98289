"""What holds for every family: it samples as the stock pipeline does, trains, adapts, and names its layers rightly.

One case per file in tests/tiny. The reference is diffusers' own pipeline call, whose code shares nothing with ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from stepdistill.build import new_critic, new_student
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.lora import Adapted
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Objective
from stepdistill.objectives import CD, DMD2
from stepdistill.sampling import Ddim, Renoise, Sampler, trailing
from stepdistill.stock import stock_scheduler
from stepdistill.trainer import AdamW, Run, Trainer

TINY = sorted(p.stem for p in (Path(__file__).parents[1] / "tiny").glob("[a-z]*.py"))
DRAWING = {"unet2d": "diffusers.pipelines.ddim.pipeline_ddim", "dit": "diffusers.pipelines.dit.pipeline_dit"}
"""Modules of the pipelines that take no latents."""
PROMPTS = ["a red star", "on a white, blue and very long background"]


@pytest.fixture(scope="module", params=TINY)
def opened(request: pytest.FixtureRequest) -> Opened:
    """Each tiny pipeline in turn, with every weight that initialisation left at zero moved off it."""
    tiny = importlib.import_module(f"tests.tiny.{request.param}")
    return open_pipeline(stirred(tiny.pipeline()), size=getattr(tiny, "SIZE", None))  # where the default is too large


def stirred(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Zero-initialised layers hide mistakes."""
    torch.manual_seed(1)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for p in part.parameters():
                if not bool(p.any()):
                    torch.nn.init.normal_(p, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def conditions(opened: Opened) -> Cond:
    if opened.family.encode is not None:
        return opened.encode(PROMPTS)
    return opened.family.examples(opened.pipeline, 2)


def own_arguments(opened: Opened) -> dict[str, object]:
    """What the pipeline's own call needs for the same two samples."""
    cond = conditions(opened)
    if opened.family.encode is not None:
        size = opened.size or ()
        sides = dict(zip(("width", "height", "num_frames"), reversed(size), strict=False))
        return {"prompt": list(PROMPTS)} | sides  # a copy: some pipelines write into it
    return {"class_labels": cond["class_labels"].tolist()} if "class_labels" in cond else {"batch_size": 2}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_untrained_student_gives_the_teachers_own_images(
    opened: Opened, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditions, call, time, kind, schedule, packing, decoding and the exported scheduler, all at once."""
    rule = Renoise() if opened.family.name == "edm" else Ddim()  # consistency models know no other
    student = new_student(opened, Sampler(trailing(steps), rule))
    noise, cond = torch.randn(2, *opened.sample_shape), conditions(opened)
    with torch.no_grad():
        ours = opened.decode(student.sampler.run(student, noise, cond, torch.Generator()))
    pipeline = opened.pipeline
    monkeypatch.setitem(pipeline.__dict__, "scheduler", stock_scheduler(student, opened))
    if opened.family.name in DRAWING:
        monkeypatch.setattr(f"{DRAWING[opened.family.name]}.randn_tensor", lambda *a, **k: noise.clone())
        latents: dict[str, object] = {}
    else:
        latents = {"latents": opened.family.pack(noise)}
    theirs = pipeline(
        **own_arguments(opened),
        **latents,
        generator=torch.Generator(),
        num_inference_steps=steps,
        output_type="np",
        **opened.family.sampling(pipeline),
    )
    theirs = torch.from_numpy(theirs.frames if hasattr(theirs, "frames") else theirs.images).movedim(-1, 1)
    if theirs.ndim == 5:  # (B, T, H, W, C) came as (B, C, T, H, W)
        assert ours.ndim == 5
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("make", [DMD2, CD], ids=["dmd2", "cd"])
def test_one_update_moves_the_student_and_nothing_else(opened: Opened, make: Callable[[], Objective]) -> None:
    nets = Nets()
    nets["teacher"] = Guided(opened.denoiser, 1.0, opened.null)
    nets["student"], nets["critic"] = new_student(opened, Sampler(trailing(1), Ddim())), new_critic(opened)
    nets["disc"] = Discriminator(nets.critic, opened.family.taps(opened.denoiser.net), 8)
    objective = make()
    movers = {name for turn in objective.turns() for name in turn.moves}
    optimizers = {name: AdamW(1e-3).build(nets[name].parameters()) for name in movers}
    cond, shape = conditions(opened), (2, *opened.sample_shape)
    batch = Batch(cond, shape, x0=torch.randn(shape))
    before = {name: [p.clone() for p in nets[name].parameters()] for name in ("teacher", "student")}
    Trainer(nets, objective, optimizers, lambda step: batch, Run(steps=1, batch=2)).step(0)
    assert any(not torch.equal(a, b) for a, b in zip(before["student"], nets.student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before["teacher"], nets.teacher.parameters(), strict=True))


def test_guidance_in_one_batch_equals_two_calls(opened: Opened) -> None:
    if opened.null is None:
        pytest.skip("this pipeline has no null condition, so it cannot be guided from outside")
    cond, x_t = conditions(opened), torch.randn(2, *opened.sample_shape)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64) * opened.denoiser.schedule.t_max
    null = {k: v.expand_as(cond[k]) for k, v in opened.null.items()}
    with torch.no_grad():
        one, two = opened.denoiser(x_t, t, cond), opened.denoiser(x_t, t, null)
        torch.testing.assert_close(
            Guided(opened.denoiser, 3.0, opened.null)(x_t, t, cond), two + 3 * (one - two), rtol=1e-3, atol=1e-3
        )
        assert not torch.allclose(one, two, atol=1e-6)


def test_adapters_start_as_the_teacher_and_learn(opened: Opened) -> None:
    x_t, cond = torch.randn(2, *opened.sample_shape), conditions(opened)
    t = torch.full((2,), 0.5 * opened.denoiser.schedule.t_max, dtype=torch.float64)
    with torch.no_grad():
        before = opened.denoiser(x_t, t, cond)
    fresh = open_pipeline(opened.pipeline, size=opened.size)
    student = new_student(fresh, Sampler(trailing(1), Ddim()))  # on a copy: other tests want the bare network
    student.net = Adapted(student.net, 2, 2.0, opened.family.lora_targets)
    after = student(x_t, t, cond)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    after.square().mean().backward()
    moved = [p for name, p in student.net.named_parameters() if name.endswith("lora_B.weight")]
    missing = [name for name, p in student.net.named_parameters() if p.grad is None]
    assert moved
    assert not missing, f"adapted and not reached: {missing[:3]}"
