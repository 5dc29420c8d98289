"""PD against compositions of DDIM steps, which its rounds must reproduce exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepdistill.build import build, open_teacher
from stepdistill.functional.weights import Even, SnrPlusOne
from stepdistill.models.denoiser import Cond
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import PD
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.recipes import find
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Move, NoiseCorrected, Renoise, Sampler, at, trailing
from stepdistill.schedule import EDM, DiscreteVP, Kind, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student
from stepdistill.trainer import AdamW, Run, Trainer

from .conftest import drawn, pretrained, student_like

SCHEDULES: list[Schedule] = [DiscreteVP.linear(), RectifiedFlow(), EDM(80.0)]
NAMES = ["vp", "flow", "edm"]


def gaussian_on(schedule: Schedule) -> GaussianTeacher:
    cov = torch.tensor([[0.8, 0.3], [0.3, 0.3]], dtype=torch.float64)
    return GaussianTeacher(torch.tensor([0.4, -0.3]), cov, schedule)


def batch_of(teacher: GaussianTeacher, n: int) -> Batch:
    rng = torch.Generator().manual_seed(5)
    return Batch({}, (n, 2), x0=teacher.sample(n, rng, dtype=torch.float64))


class AffineAtTimes(nn.Module):
    """One affine map of the state for each of ``count`` even times: the model class that holds DDIM on Gaussians."""

    def __init__(self, count: int, t_max: float):
        super().__init__()
        self.count, self.t_max = count, t_max
        self.theta = nn.Parameter(torch.zeros(count, 2, 3, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        index = t / self.t_max * self.count
        assert bool((index - index.round()).abs().max() < 1e-6), "called at a time that it was not made for"
        maps = self.theta[index.round().long() - 1]
        return (maps[:, :, :2] @ x_t[..., None])[..., 0] + maps[:, :, 2]


def minimise(loss: Callable[[], Tensor], theta: nn.Parameter) -> None:
    """Put the minimum of a quadratic into ``theta``: its gradient is affine, so unit vectors give all of it."""

    def gradient(at_theta: Tensor) -> Tensor:
        theta.data.copy_(at_theta.view_as(theta))
        return torch.autograd.grad(loss(), theta)[0].flatten()

    g0 = gradient(torch.zeros(theta.numel()))
    hessian = torch.stack([gradient(e) - g0 for e in torch.eye(theta.numel(), dtype=torch.float64)], 1)
    theta.data.copy_((-torch.linalg.pinv(hessian, hermitian=True) @ g0).view_as(theta))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_rounds_to_one_step_are_the_teachers_own_eight_ddim_steps(schedule: Schedule) -> None:
    """Three rounds, 8 -> 4 -> 2 -> 1, each solved exactly: the last map is the product of the eight contractions."""
    teacher = gaussian_on(schedule)
    net = AffineAtTimes(8, schedule.t_max)
    batch = batch_of(teacher, 64)
    for steps in (4, 2, 1):
        student = Student(Sampler(trailing(steps), Ddim()), net, schedule, "x0")
        pd = PD(follow="teacher" if steps == 4 else "previous")
        nets = Nets({"teacher": teacher if steps == 4 else Silent(), "student": student, **pd.extras(student)})
        minimise(lambda: pd.student_loss(nets, batch, Step.at(steps)).total, net.theta)  # noqa: B023 (called at once)
        assert pd.student_loss(nets, batch, Step.at(steps)).total.item() < 1e-12

    noise = schedule.prior_std * torch.randn(16, 2, dtype=torch.float64)
    got = student(noise, at(schedule.t_max, noise), {})
    grid = torch.tensor([*trailing(8), 0.0], dtype=torch.float64) * schedule.t_max
    factor = teacher.ddim_contraction(grid[:-1], grid[1:]).prod(0)
    centred = (noise - schedule(grid[:1]).alpha * teacher.mean) @ teacher.axes
    torch.testing.assert_close(got, teacher.mean + (factor * centred) @ teacher.axes.T, rtol=1e-6, atol=1e-6)


class Silent(nn.Module):
    """A teacher that must not be asked."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        raise AssertionError("later rounds follow the previous student, not the teacher")


@pytest.mark.parametrize(("schedule", "jumps"), [(s, j) for s in SCHEDULES for j in (2, 3)])
def test_the_loss_equals_a_loop_over_samples(schedule: Schedule, jumps: int) -> None:
    """Times, DDIM steps, target and weight written out for each sample."""
    teacher, n, steps = gaussian_on(schedule), 16, 4
    student = exact_student(teacher, Sampler(trailing(steps), Ddim())).double()
    with torch.no_grad():
        student.net.scale.fill_(0.8)
    nets, batch = Nets({"student": student, "teacher": teacher}), batch_of(teacher, n)
    objective = PD(jumps=jumps, weight=SnrPlusOne())
    got = objective.student_loss(nets, batch, Step.at(5)).total.item()

    step, expected = Step.at(5), 0.0
    interval, eps = step.integers(steps, n), step.randn((n, 2))

    def moments(u: float) -> tuple[float, float]:
        c = schedule(torch.tensor(u, dtype=torch.float64))
        return float(c.alpha), float(c.sigma)

    for k in range(n):
        high, low = (1 - (interval[k].item() + i) / steps for i in (0, 1))
        alpha_t, sigma_t = moments(high * schedule.t_max)
        x_t = alpha_t * batch.x0[k] + sigma_t * eps[k].double()
        x, ends = x_t, [(high + (low - high) * i / jumps) * schedule.t_max for i in range(jumps + 1)]
        for u, v in pairwise(ends):
            (a, b), (c, d) = moments(u), moments(max(v, 0.0))
            x0 = teacher(x[None], torch.tensor([u], dtype=torch.float64), {})[0]
            x = c * x0 + d * (x - a * x0) / b
        alpha_s, sigma_s = moments(max(low, 0.0) * schedule.t_max)
        target = (x - sigma_s / sigma_t * x_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
        guess = student(x_t[None], torch.tensor([high * schedule.t_max], dtype=torch.float64), {})[0]
        expected += (1 + alpha_t**2 / sigma_t**2) * (guess - target).square().mean().item() / n
    assert got == pytest.approx(expected, rel=1e-6)


def test_small_samples_count_by_the_truncated_snr_unless_told_otherwise(gaussian: GaussianTeacher) -> None:
    student = exact_student(gaussian, Sampler(trailing(4), Ddim())).double()
    nets, batch = Nets({"student": student, "teacher": gaussian}), batch_of(gaussian, 64)
    weighted, even = (PD(weight=w).student_loss(nets, batch, Step.at(0)) for w in (PD().weight, Even()))
    assert even.total.item() == pytest.approx(even.terms["error"].item())
    assert weighted.terms["error"].item() == pytest.approx(even.total.item())
    assert weighted.total > even.total  # t = 1/4 has an SNR of about 3


def test_no_gradient_reaches_the_student_through_whom_it_follows(gaussian: GaussianTeacher) -> None:
    """Were the followed student not frozen, its two jumps would add to the gradient."""
    student = exact_student(gaussian, Sampler(trailing(2), Ddim())).double()
    with torch.no_grad():
        student.net.scale.fill_(0.7)
    objective, grads = PD(follow="previous"), []
    copied = objective.extras(student)
    assert all(not p.requires_grad for p in copied["previous"].parameters()) and not copied["previous"].training
    for previous in (copied["previous"], student):
        nets = Nets({"teacher": Silent(), "student": student, "previous": previous})
        student.requires_grad_(True)
        loss = objective.student_loss(nets, batch_of(gaussian, 32), Step.at(0)).total
        grads.append(torch.autograd.grad(loss, list(student.parameters())))
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0][0].abs() > 1e-3


def test_a_multistep_solver_is_given_its_last_estimate(gaussian: GaussianTeacher) -> None:
    seen: list[Move] = []

    class Watching(Ddim):
        def __call__(self, predict: object, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
            seen.append(move)
            return super().__call__(predict, x_t, move)

    student = exact_student(gaussian, Sampler(trailing(2), Ddim())).double()
    nets = Nets({"student": student, "teacher": gaussian})
    PD(solver=Watching(), jumps=3).student_loss(nets, batch_of(gaussian, 8), Step.at(0))
    assert seen[0].previous is None
    for before, move in pairwise(seen):
        torch.testing.assert_close(move.previous[1], before.t)
        torch.testing.assert_close(move.t, before.s)


def test_a_multistep_solvers_jump_to_the_data_is_plain(schedule: Schedule) -> None:
    """One step of the student over two of DPM-Solver++(2M), the second onto t = 0: two jumps of DDIM."""
    teacher = GaussianTeacher(torch.tensor([0.4, -0.3]).double(), 0.3 * torch.eye(2).double(), schedule)
    x = schedule.prior_std * torch.randn(6, 2, dtype=torch.float64)
    t = torch.full((6,), schedule.t_max, dtype=torch.float64)
    s, rng = torch.zeros_like(t), torch.Generator()
    got = PD(solver=DpmPP2M()).walk(teacher, x, t, s, {}, rng)
    torch.testing.assert_close(got, PD().walk(teacher, x, t, s, {}, rng))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"objective\.jumps must be at least 2; got 1"):
        PD(jumps=1)
    with pytest.raises(ValueError, match=r"objective\.solver Heun\(\): a followed student jumps by DDIM"):
        PD(follow="previous", solver=Heun())
    with pytest.raises(ValueError, match="trained to jump from time to time"):
        PD().check(Sampler(trailing(4), Renoise()))
    PD().check(Sampler(trailing(4), NoiseCorrected()))
    with pytest.raises(ValueError, match=r"objective\.solver Renoise\(\) is no single step of the teacher's ODE"):
        PD(solver=Renoise()).check(Sampler(trailing(4), Ddim()))
    for steps in (3, 16, 0):
        with pytest.raises(ValueError, match=f"steps must be 1, 2, 4 or 8; got {steps}"):
            find(f"digits_pd@{steps}")


def test_the_recipe_halves_and_follows_the_teacher_in_its_first_stage_alone() -> None:
    stages = find("digits_pd@2").stages()
    assert [stage.sampler.steps for stage in stages] == [8, 4, 2]
    assert [stage.objective.follow for stage in stages] == ["teacher", "previous", "previous"]


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_round_follows_its_warm_start_and_a_resumed_one_does_too(form: str, tmp_path: Path) -> None:
    """Through ``build``: the copy is taken behind the warm start, stays while the student moves, and is stored."""
    weights = Weights(form=form, targets=("conv1", "conv2") if form == "lora" else ())

    def short(stage: Recipe) -> Recipe:
        start = stage.warm_start and short(stage.warm_start)
        return replace(stage, student=weights, run=Run(steps=3, batch=4, threads=1), warm_start=start)

    recipe = short(find("digits_pd@4"))
    opened = open_teacher(Teacher("bundled:digits"))

    def made(start: Student | None, out: Path | None) -> Trainer:
        return build(recipe, opened=opened, start=start, out=out).trainer

    start = made(None, None).nets.student
    with torch.no_grad():
        for p in start.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 1.0]).double(), recipe.data.examples(opened, 2)
    with torch.no_grad():
        expected = start.eval()(x, t, cond)
        first = made(start, tmp_path)
        torch.testing.assert_close(first.nets.previous(x, t, cond), expected)
        assert (first.nets.teacher(x, t, cond) - expected).abs().max() > 1e-3
    first.fit()
    with torch.no_grad():
        torch.testing.assert_close(first.nets.previous(x, t, cond), expected)
        assert (first.nets.student.eval()(x, t, cond) - expected).abs().max() > 1e-4
        again = made(None, tmp_path)
        assert again.resume()
        torch.testing.assert_close(again.nets.previous(x, t, cond), expected)


def test_a_followed_student_must_have_been_trained_for_the_jumps() -> None:
    recipe = find("digits_pd@2")
    with pytest.raises(ValueError, match=r"warm_start is missing: objective.follow 'previous' needs one .* 2 times"):
        replace(recipe, warm_start=None)
    with pytest.raises(ValueError, match=r"warm_start is of 8 steps: .* 2 times the 2 steps"):
        replace(recipe, warm_start=find("digits_pd@8"))
    assert replace(recipe, warm_start=None, objective=PD()).warm_start is None


def test_two_rounds_of_training_beat_the_teachers_own_steps(gaussian: GaussianTeacher) -> None:
    """8 -> 4 -> 2 with a small network, against the law of eight DDIM steps and of two, both in closed form."""
    start, optim = pretrained(gaussian, 300), AdamW(2e-3, decay="linear")
    follow = "teacher"
    for steps in (4, 2):
        objective = PD(follow=follow)
        nets = Nets({"teacher": gaussian, "student": student_like(start, Sampler(trailing(steps), Ddim()))})
        nets.update(objective.extras(nets.student))

        def real(step: Step) -> Batch:
            return Batch({}, (256, 2), x0=gaussian.sample(256, step.rng))

        moved = {"student": optim.build(nets.student.parameters())}
        trainer = Trainer(nets, objective, moved, real, Run(steps=200, ema=0.97), specs={"student": optim})
        for index in range(200):
            trainer.step(index)
        start, follow = trainer.nets.ema, "previous"
    got = torch.cov(drawn(start).T).double()
    _, eight = gaussian.ddim_law(trailing(8))
    _, two = gaussian.ddim_law(trailing(2))
    error = (got - eight).norm() / eight.norm()
    assert (two - eight).norm() / eight.norm() > 0.3
    assert error < 0.01, float(error)  # 0.0035 in three seeds
