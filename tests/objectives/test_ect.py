"""ECT against the mapping's golden numbers, plain denoising, and the exact consistency function."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from stepdistill.functional.distances import L2
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import ECT
from stepdistill.parts.discretisation import noise_level
from stepdistill.parts.neighbours import times_and_own
from stepdistill.parts.times import LogNormal
from stepdistill.sampling import Ddim, Renoise, Sampler, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher
from stepdistill.trainer import AdamW

from .conftest import distilled, pretrained
from .test_cd import error_of
from .test_ict import Affine

ONE_STEP = Sampler(trailing(1), Renoise())


@pytest.mark.parametrize(
    ("t", "expected"), [(1.0, (0.0, 0.2121, 0.8030, 0.9877)), (5.0, (2.3661, 3.6831, 4.6708, 4.9794))]
)
def test_r_closes_in_on_t_as_in_the_paper(t: float, expected: tuple[float, ...]) -> None:
    ect = ECT(stage_steps=100)
    got = [ect.lower(torch.tensor([t], dtype=torch.float64), 100 * stage + 99).item() for stage in (0, 1, 3, 7)]
    assert got == pytest.approx(expected, abs=6e-5)


def test_r_lies_between_the_data_and_t_and_starts_at_the_data_below_ln_7() -> None:
    """At stage 0 with q = 2 the bracket is negative where ``8 sigmoid(-t) > 1``, so t < ln 7."""
    t = torch.logspace(-3, 2, 400, dtype=torch.float64)
    for stage in range(12):
        r = ECT(stage_steps=1).lower(t, stage)
        assert bool((r >= 0).all() and (r < t).all())
        if stage == 0:
            assert torch.equal(r == 0, t < math.log(7))


@pytest.mark.parametrize("schedule", [EDM(80.0), DiscreteVP.linear(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_with_all_r_at_the_data_it_is_denoising(schedule: Schedule) -> None:
    student = Student(ONE_STEP, Affine(), schedule, "x0").double()
    x0 = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = Batch({}, (64, 3), x0=x0)
    objective = ECT(times=LogNormal(-2.0, 0.3), own=1e-9, distance=L2())
    got = objective.student_loss(Nets({"student": student}), batch, Step.at(0)).total

    step = Step.at(0)
    eps = step.randn((64, 3)).double()
    t = times_and_own(LogNormal(-2.0, 0.3), 1e-9, student, 64, step)
    c = schedule.coeffs(t, x0)
    error = (student(c.alpha * x0 + c.sigma * eps, t, {}) - x0).square().mean(1)
    assert_close(got, (error * (c.alpha / c.sigma)[:, 0]).mean())


@pytest.mark.parametrize("schedule", [EDM(80.0), DiscreteVP.linear(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_loss_and_gradient_equal_a_loop_that_holds_the_target_fixed(schedule: Schedule) -> None:
    """Among the times are the student's own, the first of which has no signal at all on a flow."""
    n, sampler = 40, Sampler(trailing(2), Renoise())
    student = Student(sampler, Affine(), schedule, "x0").double()
    x0 = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = ECT(stage_steps=10, own=0.5)
    loss = objective.student_loss(Nets({"student": student}), Batch({}, (n, 2), x0=x0), Step.at(25)).total
    loss.backward()

    step = Step.at(25)
    eps = step.randn((n, 2)).double()
    times = times_and_own(objective.times, 0.5, student, n, step)
    a, b = student.net.a.item(), student.net.b.item()
    expected = grad_a = 0.0
    for k in range(n):
        t = times[k : k + 1]
        level = min(noise_level(schedule, t).item(), 80.0)
        r = max(0.0, level * (1 - 2.0**-3 * (1 + 8 / (1 + math.exp(level)))))
        c = schedule(t)
        x_t = c.alpha * x0[k] + c.sigma * eps[k]
        moved, aim = a * x_t + b * t, x0[k]
        if r > 0:
            s = schedule.t_from_logsnr(torch.tensor([-2 * math.log(r)], dtype=torch.float64))
            e = schedule(s)
            aim = a * (e.alpha * x0[k] + e.sigma * eps[k]) + b * s
        root = math.sqrt((moved - aim).square().mean().item() + 0.00054**2)
        expected += (root - 0.00054) / (level - r) / n
        grad_a += ((moved - aim) * x_t).mean().item() / root / (level - r) / n
    assert (times == schedule.t_max).any()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert student.net.a.grad.item() == pytest.approx(grad_a, rel=1e-6)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"own must lie in \(0, 1\].*got 0"):
        ECT(own=0.0)
    with pytest.raises(ValueError, match=r"factor above 1.* got 1\.0"):
        ECT(factor=1.0)
    with pytest.raises(ValueError, match="ECT's student jumps to the data only"):
        ECT().check(Sampler(trailing(2), Ddim()))


def test_tuning_on_data_alone_reaches_the_exact_ode_map(gaussian: GaussianTeacher) -> None:
    start = pretrained(gaussian, 400)
    before = error_of(gaussian, Student(ONE_STEP, start.net, start.schedule, start.kind))
    objective = ECT(times=LogNormal(0.0, 1.6), own=0.1, stage_steps=75, sigma_max=160.0)
    student = distilled(objective, gaussian, start, ONE_STEP, {"student": AdamW(2e-3, decay="linear")}, 300, batch=256)
    after = error_of(gaussian, student)
    assert after < 0.35 < before / 2  # 0.22 over two seeds, from 0.72


def test_the_gap_shrinks_no_further_than_its_smallest() -> None:
    """From stage 6 on, 3^-7 < 1e-3: the lower level stays a thousandth (times 1 + k sigmoid(-b level)) below."""
    objective, level = ECT(factor=3.0, stage_steps=10, k=0.0), torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(objective.lower(level, 55), level * (1 - 3.0**-6))
    for index in (60, 10_000):
        torch.testing.assert_close(objective.lower(level, index), level * 0.999, rtol=1e-12, atol=0)
