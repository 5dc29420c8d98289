"""Guidance as a function: of any predictor, in halves, and as a teacher guides somebody else."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stepdistill.models.denoiser import Guided, both_predictions, guided_prediction, unscaled, with_null
from stepdistill.schedule import KINDS, DiscreteVP
from stepdistill.testing import GaussianTeacher

TEACHER = GaussianTeacher(torch.tensor([0.1, 0.0]), torch.eye(2), DiscreteVP.linear(), torch.tensor([[1.0, 0], [0, 2]]))
OTHER = GaussianTeacher(torch.zeros(2), 2 * torch.eye(2), TEACHER.schedule, torch.tensor([[3.0, 0], [0, 4]]))
NULL = {"labels": torch.tensor([2])}
COND = {"labels": torch.tensor([0, 1, 0, 1])}
X, T = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("want", KINDS)
def test_both_halves_are_the_two_predictions(want: str) -> None:
    conditional, null = both_predictions(TEACHER, NULL, X, T, COND, want=want)
    assert_close(conditional, TEACHER(X, T, COND, want=want), rtol=0, atol=1e-14)
    assert_close(null, TEACHER(X, T, {}, want=want), rtol=0, atol=1e-14)


def test_each_sample_has_its_scale_and_one_of_them_is_the_guided_gaussian() -> None:
    scale = torch.tensor([0.0, 1.0, 2.5, 4.0])
    got = guided_prediction(TEACHER, NULL, scale, X, T, COND)
    for i, label in enumerate(COND["labels"].tolist()):
        exact = TEACHER.given(label, float(scale[i]))(X[i : i + 1], T[i : i + 1], {})
        assert_close(got[i : i + 1], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_teacher_guides_another_as_itself_within_its_interval(scale: float) -> None:
    teacher = Guided(TEACHER, scale, NULL, interval=(0.3, 0.8))
    got = teacher.guide(OTHER, X, T, COND, want="eps")
    assert_close(got, Guided(OTHER, scale, NULL, interval=(0.3, 0.8))(X, T, COND, want="eps"), rtol=0, atol=0)
    assert_close(teacher.scales(T, COND), torch.tensor([1.0, scale, scale, 1.0]).double(), rtol=0, atol=0)
    told = teacher.scales(T, COND | {"guidance": torch.tensor([5.0, 6.0, 7.0, 8.0])})
    assert told.tolist() == [1.0, 6.0, 7.0, 1.0]


def test_conditions_are_dropped_where_asked_and_scales_stay() -> None:
    cond = COND | {"guidance": torch.arange(4.0)}
    got = with_null(cond, NULL, torch.tensor([True, False, False, True]))
    assert got["labels"].tolist() == [2, 1, 0, 2] and got["guidance"].tolist() == [0, 1, 2, 3]
    assert COND["labels"].tolist() == [0, 1, 0, 1] and list(unscaled(cond)) == ["labels"]
    with pytest.raises(ValueError, match="no null condition"):
        with_null(COND, {}, torch.zeros(4, dtype=torch.bool))
