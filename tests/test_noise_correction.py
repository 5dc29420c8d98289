"""The first step from pure noise: a rule against its closed form, and what export says of it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stepdistill.build import open_teacher
from stepdistill.export import check_exportable
from stepdistill.recipe import Teacher
from stepdistill.sampling import Ddim, Heun, Move, NoiseCorrected, Renoise, Sampler, Tcd, at, refuse_noise, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher

MEAN = torch.tensor([0.4, -0.3], dtype=torch.float64)
COV = torch.diag(torch.tensor([1.0, 0.04], dtype=torch.float64))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_state_after_the_first_step_holds_the_noise_itself(schedule: Schedule) -> None:
    """On Gaussian data, with every coefficient written out: x_s = alpha_s E[x0 | x_T] + sigma_s noise."""
    teacher = GaussianTeacher(MEAN, COV, schedule)
    noise = torch.randn(6, 2, dtype=torch.float64)
    sampler = Sampler(trailing(4), NoiseCorrected())
    states = sampler.run(teacher, noise, {}, rng(), path=True)

    top, low = (schedule(torch.tensor(f * schedule.t_max, dtype=torch.float64)) for f in (1.0, 0.75))
    x_t = schedule.prior_std * noise
    variance = top.alpha**2 * COV.diagonal() + top.sigma**2
    x0 = MEAN + top.alpha * COV.diagonal() / variance * (x_t - top.alpha * MEAN)
    # the noise of VP, flow and TrigFlow is eps itself (up to sigma_data); of EDM 80 eps
    assert_close(states[:, 1], low.alpha * x0 + low.sigma * noise, rtol=1e-9, atol=1e-9)

    after = Ddim()(teacher, states[:, 1], Move(*(at(f * schedule.t_max, noise) for f in (0.75, 0.5)), {}, rng()))[0]
    assert_close(states[:, 2], after)


def test_what_it_mends_is_the_signal_that_pure_noise_does_not_hold() -> None:
    """Stable Diffusion's table leaves alpha = 0.068 at t_max: a known x0 loses that much of itself to plain DDIM."""
    schedule = DiscreteVP.scaled_linear()
    teacher = GaussianTeacher(MEAN, 1e-12 * torch.eye(2), schedule)  # the data are one point
    noise = torch.randn(64, 2, dtype=torch.float64)
    c = schedule(torch.tensor([1.0, 0.75], dtype=torch.float64))
    for rule, expected in (
        (NoiseCorrected(), c.alpha[1] * MEAN + c.sigma[1] * noise),
        (Ddim(), c.alpha[1] * MEAN + c.sigma[1] * (noise - c.alpha[0] * MEAN) / c.sigma[0]),
    ):
        assert_close(Sampler(trailing(4), rule).run(teacher, noise, {}, rng(), stop=1), expected)
    assert float(c.alpha[0]) == pytest.approx(0.068, abs=1e-3)


@pytest.mark.parametrize(
    "schedule",
    [RectifiedFlow(), TrigFlow(0.5), DiscreteVP(torch.linspace(0.99, 0.0, 50))],
    ids=["flow", "trig", "zsnr"],
)
def test_without_signal_at_the_top_it_is_ddim(schedule: Schedule) -> None:
    teacher, noise = GaussianTeacher(MEAN, COV, schedule), torch.randn(5, 2, dtype=torch.float64)
    mine, plain = (Sampler(trailing(3), rule).run(teacher, noise, {}, rng()) for rule in (NoiseCorrected(), Ddim()))
    assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def test_in_one_step_it_is_the_clean_estimate() -> None:
    teacher, noise = GaussianTeacher(MEAN, COV, EDM(10.0)), torch.randn(5, 2, dtype=torch.float64)
    mine, plain = (Sampler((1.0,), rule).run(teacher, noise, {}, rng()) for rule in (NoiseCorrected(), Ddim()))
    assert_close(mine, plain)


def test_a_grid_that_starts_below_the_top_has_nothing_to_correct() -> None:
    with pytest.raises(ValueError, match=r"corrects the step from time 1; times start at 0\.9, use Ddim"):
        Sampler((0.9, 0.5), NoiseCorrected())


def test_students_that_jump_are_not_sampled_by_rules_that_do_not() -> None:
    for rule in (Ddim(), NoiseCorrected(), Tcd(0.0)):
        refuse_noise(Sampler(trailing(4), rule))
    refuse_noise(Sampler((1.0,), Renoise()))
    for rule in (Renoise(), Heun(), Tcd(0.3)):
        with pytest.raises(ValueError, match="trained to jump from time to time; use Ddim"):
            refuse_noise(Sampler(trailing(4), rule))


def test_export_refuses_it_and_says_what_to_do() -> None:
    opened = open_teacher(Teacher("bundled:digits"))
    d = opened.denoiser
    check_exportable(Student(Sampler(trailing(4), Ddim()), d.net, d.schedule, d.kind, d.call), opened)
    student = Student(Sampler(trailing(4), NoiseCorrected()), d.net, d.schedule, d.kind, d.call)
    with pytest.raises(ValueError, match=r"rule NoiseCorrected\(\): no stock scheduler takes the first state"):
        check_exportable(student, opened)
