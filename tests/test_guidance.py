"""Guidance: per sample, within an interval, told to the network, and kept for inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.build import build, guided, new_student, start_from, with_guidance
from stepdistill.data import TeacherPairs
from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.families import open_pipeline
from stepdistill.objective import Batch, Step
from stepdistill.objectives import CD, KD
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.recipes import find
from stepdistill.sampling import Sampler
from stepdistill.schedule import RectifiedFlow
from tests.tiny import sd

X, T = torch.randn(3, 1, 2, 2), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
COND, NULL = {"c": torch.tensor([1.0, 2.0, 3.0])}, {"c": torch.zeros(1)}


class Counting(nn.Module):
    """Answers with its condition, and with what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Mapping[str, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.seen.append(cond)
        value = cond["c"] + 10 * cond.get("guidance", torch.zeros(()))
        return x_t * 0 + value.view(-1, 1, 1, 1)


def denoiser() -> Denoiser:
    return Denoiser(Counting(), RectifiedFlow(), "velocity")


def values(out: Tensor) -> list[float]:
    return out[:, 0, 0, 0].tolist()


def test_a_scale_for_each_sample_is_used_and_not_passed_on() -> None:
    teacher = Guided(denoiser(), 1.0, NULL)
    scales = torch.tensor([1.0, 2.0, 0.5])
    out = teacher(X, T, COND | {"guidance": scales}, want="velocity")
    assert values(out) == [1.0, 4.0, 1.5]
    assert [set(c) for c in teacher.denoiser.net.seen] == [{"c"}]


def test_outside_the_interval_a_sample_is_not_guided() -> None:
    teacher = Guided(denoiser(), 3.0, NULL, interval=(0.3, 0.7))
    assert values(teacher(X, T, COND, want="velocity")) == [1.0, 6.0, 3.0]


def test_a_told_network_is_told_and_evaluated_once() -> None:
    teacher = Guided(denoiser(), 4.0, told=True)
    assert values(teacher(X, T, COND, want="velocity")) == [41.0, 42.0, 43.0]
    assert values(teacher(X, T, COND | {"guidance": torch.tensor([1.0, 2.0, 3.0])}, want="velocity")) == [11, 22, 33]
    assert len(teacher.denoiser.net.seen) == 2


def test_scales_without_a_null_condition_are_refused() -> None:
    with pytest.raises(ValueError, match="guidance needs conditions and a null one"):
        Guided(denoiser())(X, T, COND | {"guidance": torch.ones(3)})


# In a recipe


def recipe(**changes: object) -> Recipe:
    return replace(find("digits_cd"), evaluation=None, **changes)


def test_each_sample_of_a_batch_gets_its_scale_and_the_same_again_on_resume() -> None:
    ranged = recipe(teacher=Teacher("bundled:digits", guidance_range=(1.5, 4.0)))
    source = build(ranged).trainer.data
    scales = torch.cat([source(Step.at(i, 0)).cond["guidance"] for i in range(20)])
    assert 1.5 <= float(scales.min()) < 1.7 and 3.8 < float(scales.max()) <= 4.0
    assert torch.equal(source(Step.at(3, 0)).cond["guidance"], source(Step.at(3, 0)).cond["guidance"])


def test_conditions_are_dropped_at_the_rate_asked_for() -> None:
    source = build(recipe(null_rate=0.25)).trainer.data
    labels = torch.cat([source(Step.at(i, 0)).cond["class_labels"] for i in range(50)])
    assert 0.2 < float((labels == 10).double().mean()) < 0.3


def test_text_conditions_are_dropped_whole() -> None:
    opened = open_pipeline(sd.pipeline(), negative="blurry")
    cond = opened.encode(["a", "b"] * 8)
    given = Batch(cond, (16, 4, 8, 8))
    source = with_guidance(lambda step: given, recipe(null_rate=0.5), opened)
    out = source(Step.at(0, 0)).cond["prompt"]
    dropped = [bool(torch.equal(row, opened.null["prompt"][0])) for row in out]
    assert 2 < sum(dropped) < 14
    for row, before, gone in zip(out, cond["prompt"], dropped, strict=True):
        assert gone or torch.equal(row, before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"null_rate": 1.0}, "null_rate must lie in"),
        ({"null_rate": 0.1, "teacher": Teacher("bundled:digits", guidance=2.0)}, "teacher.guidance must be 1"),
        ({"objective": KD(), "data": TeacherPairs(), "sampler": Sampler(), "null_rate": 0.1}, "put empty prompts"),
        (
            {
                "objective": KD(),
                "data": TeacherPairs(),
                "sampler": Sampler(),
                "teacher": Teacher("x", guidance_range=(1, 2)),
            },
            "made under one scale",
        ),
        ({"student": Weights(told_guidance=True)}, "needs teacher.guidance_range"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        recipe(**changes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Teacher("x", guidance_range=(3.0, 1.0)), "guidance_range must be two scales"),
        (lambda: Teacher("x", size=(0, 8)), "size must be pixels"),
        (lambda: Weights(rank=0), "rank must be at least 1"),
        (lambda: Weights(alpha=-1.0), "alpha must be above 0"),
        (lambda: Weights(layers=-1), "layers must be at least 1"),
        (lambda: Weights(form="lora", layers=2), "need form 'full'"),
    ],
)
def test_values_out_of_range_are_named(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_a_student_told_its_guidance_and_its_critic_train_on_the_scale() -> None:
    opened = open_pipeline(sd.pipeline())
    told = replace(recipe(), teacher=Teacher("x", guidance_range=(1.0, 8.0)), student=Weights(told_guidance=True))
    cond = opened.encode(["a", "b"])
    source = with_guidance(lambda step: Batch(cond, (2, 4, 8, 8), x0=torch.randn(2, 4, 8, 8)), told, opened)

    student = new_student(opened, told.sampler, told.student)
    batch = source(Step.at(0, 0))
    t = torch.tensor([0.4, 0.8], dtype=torch.float64)
    with torch.no_grad():
        assert_close(student(batch.x0, t, batch.cond), opened.denoiser(batch.x0, t, cond), rtol=0, atol=0)
    assert guided(opened, told.teacher)(batch.x0, t, batch.cond).shape == batch.x0.shape
    with pytest.raises(ValueError, match="told the guidance scale"):
        student(batch.x0, t, cond)
    assert isinstance(told.objective, CD)


def test_a_warm_start_of_another_shape_is_named_in_one_line() -> None:
    opened = open_pipeline(sd.pipeline())
    small, whole = (new_student(opened, Sampler(), Weights(layers=n)) for n in (1, 0))
    with pytest.raises(ValueError, match=r"warm_start: its student's network differs from this one's; ") as caught:
        start_from(whole, small, opened)
    assert len(str(caught.value)) < 200
