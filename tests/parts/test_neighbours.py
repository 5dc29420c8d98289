"""Pairs without a teacher, and the times at which they are made."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stepdistill.objective import Step
from stepdistill.parts.neighbours import refuse_jumps, same_noise, times_and_own
from stepdistill.parts.times import Uniform
from stepdistill.sampling import Ddim, Renoise, Sampler, Tcd, trailing
from stepdistill.schedule import DiscreteVP, RectifiedFlow
from stepdistill.testing import GaussianTeacher, exact_student


def test_both_estimates_are_made_from_one_sample_and_one_noise() -> None:
    teacher = GaussianTeacher(torch.tensor([0.4, -0.3]), torch.diag(torch.tensor([1.0, 0.04])), DiscreteVP.linear())
    student, target = (exact_student(teacher, Sampler(trailing(1), Renoise())).double() for _ in range(2))
    with torch.no_grad():
        target.net.shift.fill_(0.25)
    x0, eps = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 0.7, 0.5, 0.2, 0.1], dtype=torch.float64)
    s = torch.tensor([0.5, 0.0, 0.4, 0.1, 0.0], dtype=torch.float64)
    got, aim = same_noise(student, target, x0, eps, t, s, {})
    for k in range(5):
        a, b = (teacher.schedule(u[k : k + 1]) for u in (t, s))
        assert_close(got[k], teacher.consistency((a.alpha * x0[k] + a.sigma * eps[k])[None], t[k : k + 1])[0])
        lower = (b.alpha * x0[k] + b.sigma * eps[k])[None]
        expected = x0[k] if s[k] == 0 else teacher.consistency(lower, s[k : k + 1])[0] + 0.25
        assert_close(aim[k], expected, rtol=0, atol=0 if s[k] == 0 else 1e-12)
    assert got.requires_grad and not aim.requires_grad


def test_a_share_of_the_times_is_the_students_own() -> None:
    teacher = GaussianTeacher(torch.zeros(1), torch.eye(1), RectifiedFlow())
    student = exact_student(teacher, Sampler((1.0, 0.25), Renoise()))
    t = times_and_own(Uniform(0.4, 0.6), 0.3, student, 4000, Step.at(0))
    counts = [(t == u).double().mean().item() for u in (1.0, 0.25)]
    assert counts == pytest.approx([0.15, 0.15], abs=0.03)
    rest = t[(t != 1) & (t != 0.25)]
    assert rest.min() > 0.4 and rest.max() < 0.6 and abs(rest.mean() - 0.5) < 0.01
    assert set(times_and_own(Uniform(), 1.0, student, 50, Step.at(1)).tolist()) == {1.0, 0.25}


@pytest.mark.parametrize("rule", [Ddim(), Tcd(0.3)])
def test_jumps_between_steps_are_refused(rule: Ddim | Tcd) -> None:
    with pytest.raises(ValueError, match="CT's student jumps to the data only; use Renoise"):
        refuse_jumps("CT", Sampler(trailing(2), rule))
    refuse_jumps("CT", Sampler(trailing(1), rule))
    refuse_jumps("CT", Sampler(trailing(4), Renoise()))
