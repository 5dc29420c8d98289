"""What the turns of a step share, what teacher and critic are asked, and where gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.models.denoiser import Denoiser
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.parts.critic import denoising_loss
from stepdistill.parts.game import eps_gap, fitted_critic, judged, new_samples, student_samples, timed_samples
from stepdistill.parts.rollout import BackwardSim, FromData, OneStep, Rollout
from stepdistill.parts.times import OnGrid, Uniform, renoise
from stepdistill.sampling import Renoise, Sampler, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, convert
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, mlp

BATCH = Batch({}, (6, 2), x0=torch.randn(6, 2))


@pytest.fixture
def nets() -> Nets:
    """Small networks on the straight path."""
    torch.manual_seed(0)
    made, schedule = Nets(), RectifiedFlow()
    made["teacher"] = GaussianTeacher(torch.tensor([0.3, -0.2]), torch.eye(2) * 0.5, schedule)
    made["student"] = Student(Sampler(trailing(4), Renoise()), mlp(2, 8, 2), schedule, "velocity")
    made["critic"] = Denoiser(mlp(2, 8, 2), schedule, "velocity")
    return made


def test_later_turns_get_the_samples_of_the_students_turn_without_its_graph(nets: Nets) -> None:
    shared: dict[str, Tensor] = {}
    x0 = new_samples(BackwardSim(), nets, BATCH, Step.at(0, 0, shared=shared))
    assert x0.requires_grad
    again = student_samples(BackwardSim(), nets, BATCH, Step.at(0, 1, shared=shared))
    assert torch.equal(again, x0) and not again.requires_grad


def test_where_it_was_not_the_students_turn_samples_are_made_once(nets: Nets) -> None:
    step = Step.at(0, 1)
    x0 = student_samples(BackwardSim(), nets, BATCH, step)
    assert not x0.requires_grad and student_samples(BackwardSim(), nets, BATCH, step) is x0
    assert_close(x0, BackwardSim()(nets.student, BATCH, Step.at(0, 1)).detach(), rtol=0, atol=0)


def test_the_critic_is_fitted_to_those_samples_alone(nets: Nets) -> None:
    shared: dict[str, Tensor] = {}
    x0 = new_samples(OneStep(), nets, BATCH, Step.at(0, 0, shared=shared))
    loss = fitted_critic(OneStep(), Uniform(), nets, BATCH, Step.at(0, 1, shared=shared)).total
    assert_close(loss, denoising_loss(nets.critic, x0, {}, Uniform(), Step.at(0, 1)), rtol=0, atol=0)
    loss.backward()
    assert all(p.grad is None for p in nets.student.parameters())
    assert all(p.grad is not None for p in nets.critic.parameters())


@pytest.mark.parametrize("rollout", [OneStep(), FromData(), BackwardSim(), BackwardSim(last_only=True)], ids=repr)
def test_the_times_of_the_students_last_call_come_with_its_samples(nets: Nets, rollout: Rollout) -> None:
    for index in range(5):
        x0, t = timed_samples(rollout, nets, BATCH, Step.at(index))
        assert_close(x0, rollout(nets.student, BATCH, Step.at(index)), rtol=0, atol=0)
        assert t.shape == (6,) and set(t.tolist()) <= {1.0, 0.75, 0.5, 0.25}
        if isinstance(rollout, BackwardSim):
            stop = 3 if rollout.last_only else int(Step.at(index).integers(4, 1))
            assert set(t.tolist()) == {trailing(4)[stop]}
    assert not nets.student._forward_pre_hooks


def test_teacher_and_critic_are_asked_at_the_same_freshly_noised_samples(nets: Nets) -> None:
    x0, law = torch.randn(6, 2), Uniform(0.1, 0.9)
    at = judged(nets, x0, {}, law, Step.at(3), want="eps")
    x_t, t, eps = renoise(RectifiedFlow(), x0, law, Step.at(3))
    for got, expected in zip(at, (x_t, t, eps, nets.teacher(x_t, t, want="eps"), None), strict=True):
        if expected is not None:
            assert_close(got, expected, rtol=0, atol=0)
    assert_close(at.critic, nets.critic(x_t, t, {}, want="eps"), rtol=0, atol=0)


def test_gradients_pass_through_both_where_they_are_enabled(nets: Nets) -> None:
    """A score identity needs them: of the teacher's Gaussian estimate, E[x0 | x_t] = m + a S / C (x_t - a m)."""
    x0 = torch.randn(6, 2, requires_grad=True)
    at = judged(nets, x0, {}, OnGrid((0.4,)), Step.at(0))
    (slope,) = torch.autograd.grad(at.teacher.sum(), x0, retain_graph=True)
    assert_close(slope, torch.full((6, 2), 0.6 * 0.6 * 0.5 / (0.36 * 0.5 + 0.16)), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(at.critic.sum(), x0)[0].abs().max() > 0
    with torch.no_grad():
        assert not judged(nets, x0, {}, Uniform(), Step.at(0)).critic.requires_grad


@pytest.mark.parametrize("schedule", [RectifiedFlow(), EDM(80.0), DiscreteVP.linear()], ids=["flow", "edm", "vp"])
def test_the_gap_of_noises_is_one_function_of_the_signal_to_noise_ratio(schedule) -> None:
    """At the log-SNR of alpha 0.8 and sigma 0.6: 0.36 (teacher - own), and 0.48 of the gap of clean estimates."""
    t = schedule.t_from_logsnr(torch.full((6,), 0.64 / 0.36, dtype=torch.float64).log())
    c = schedule.coeffs(t, torch.zeros(6, 2, dtype=torch.float64))
    x_t, teacher, own = torch.randn(3, 6, 2, dtype=torch.float64)
    gap = eps_gap(schedule, t, teacher.requires_grad_(True), own)
    assert not gap.requires_grad
    assert_close(gap, 0.36 * (teacher - own).detach(), rtol=1e-9, atol=1e-12)
    teacher_x0, own_x0 = (convert(p.detach(), x_t, c, "eps", "x0") for p in (teacher, own))
    assert_close(
        gap, 0.48 * (own_x0 - teacher_x0) * c.alpha / torch.hypot(c.alpha, c.sigma) / 0.8, rtol=1e-9, atol=1e-12
    )
