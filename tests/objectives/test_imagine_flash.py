"""Imagine Flash against naive loops, closed forms of its targets on Gaussian data, and the law it leads to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.data import DigitsData, Labels
from stepdistill.models.denoiser import Cond
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import ImagineFlash
from stepdistill.parts.gan import Gan
from stepdistill.recipe import Recipe, Teacher
from stepdistill.recipes import find
from stepdistill.sampling import Ddim, DpmPP2M, Renoise, Sampler, at, trailing
from stepdistill.schedule import EDM, DiscreteVP, Kind, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, MixtureTeacher, exact_student
from stepdistill.trainer import AdamW

from .conftest import VectorDisc, distilled, drawn, pretrained, student_like

BACKWARD = ImagineFlash(gamma=(0.0, 1.0), noise="own", teacher_steps=8)
"""Without the shift: the teacher's eight steps from the student's own state."""


class Asked(nn.Module):
    """A teacher that keeps the states and times it was asked at."""

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.teacher, self.schedule = teacher, teacher.schedule
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, want: Kind = "x0") -> Tensor:
        self.asked.append((x_t, t))
        return self.teacher(x_t, t, cond, want=want)


def gaussian_on(schedule: Schedule) -> GaussianTeacher:
    cov = torch.tensor([[0.8, 0.3], [0.3, 0.3]], dtype=torch.float64)
    return GaussianTeacher(torch.tensor([0.4, -0.3]), cov, schedule)


def shrunk(teacher: GaussianTeacher, sampler: Sampler) -> Student:
    """The exact map at 0.8 of its size, so that every loss has something to say."""
    student = exact_student(teacher, sampler).double()
    with torch.no_grad():
        student.net.scale.fill_(0.8)
    return student


def nothing(n: int) -> Batch:
    """No data at all."""
    return Batch({}, (n, 2))


def moments(schedule: Schedule, fraction: float) -> tuple[float, float]:
    c = schedule(torch.tensor(fraction * schedule.t_max, dtype=torch.float64))
    return float(c.alpha), float(c.sigma)


@pytest.mark.parametrize("noise", ["fresh", "own"])
@pytest.mark.parametrize("schedule", [DiscreteVP.linear(), RectifiedFlow(), EDM(80.0)], ids=["vp", "flow", "edm"])
def test_the_loss_equals_steps_written_out(schedule: Schedule, noise: str) -> None:
    """The student's own walk by DDIM down to the drawn stop, the re-noising and the teacher's two steps."""
    teacher, n = gaussian_on(schedule), 32
    student = shrunk(teacher, Sampler(trailing(3), Ddim()))
    gamma = (0.1, 0.7) if noise == "fresh" else (0.0, 0.7)
    objective = ImagineFlash(gamma=gamma, noise=noise, teacher_steps=2)
    stops = set()
    for index in range(6):
        got = objective.student_loss(Nets({"student": student, "teacher": teacher}), nothing(n), Step.at(index))
        step = Step.at(index)
        stop, start = int(step.integers(3, 1)), step.randn((n, 2))
        stops.add(stop)

        def ddim(who: nn.Module, x: Tensor, high: float, low: float) -> Tensor:
            (a, b), (c, d) = moments(schedule, high), moments(schedule, low)
            x0 = who(x, at(high * schedule.t_max, x), {})
            return c * x0 + d * (x - a * x0) / b

        x = schedule.prior_std * start
        for k in range(stop):
            x = ddim(student, x, 1 - k / 3, 1 - (k + 1) / 3)
        t = 1 - stop / 3
        x0 = student(x, at(t * schedule.t_max, x), {})
        tau = gamma[0] + (gamma[1] - gamma[0]) * t
        (a_t, s_t), (a_tau, s_tau) = moments(schedule, t), moments(schedule, tau)
        eps = step.randn((n, 2)) if noise == "fresh" else (x - a_t * x0) / s_t
        y = a_tau * x0 + s_tau * eps
        target = ddim(teacher, ddim(teacher, y, tau, tau / 2), tau / 2, 0.0)
        # the state is float32 up to its first call by a float64 network
        torch.testing.assert_close(got.total, (x0 - target).square().mean().detach(), rtol=1e-5, atol=0)
    assert stops == {0, 1, 2}


def test_the_gradient_passes_the_students_last_call_alone(gaussian: GaussianTeacher) -> None:
    """Neither through the rollout, nor through the re-noised sample and the teacher: the target is a constant."""
    student = shrunk(gaussian, Sampler(trailing(3), Ddim()))
    objective = ImagineFlash()
    for index in range(4):
        loss = objective.student_loss(Nets({"student": student, "teacher": gaussian}), nothing(16), Step.at(index))
        got = torch.autograd.grad(loss.total, list(student.parameters()))
        step = Step.at(index)
        with torch.no_grad():
            x_t, x0, fraction = objective.estimate(student, nothing(16), step)
            target = objective.target(Nets({"teacher": gaussian}), nothing(16), step, x_t, x0, fraction)
        by_hand = (student(x_t, at(fraction, x_t), {}) - target).square().mean()
        torch.testing.assert_close(got, torch.autograd.grad(by_hand, list(student.parameters())))
        assert got[0].abs() > 1e-4


def test_the_teacher_looks_at_levels_that_rise_with_the_students_time(gaussian: GaussianTeacher) -> None:
    student, levels = shrunk(gaussian, Sampler(trailing(4), Ddim())), {}
    for index in range(24):
        nets = Nets({"student": student, "teacher": Asked(gaussian)})
        ImagineFlash(gamma=(0.2, 0.6)).student_loss(nets, nothing(8), Step.at(index))
        ((_, t),) = nets.teacher.asked
        levels[1 - int(Step.at(index).integers(4, 1)) / 4] = float(t[0])
    assert levels == pytest.approx({1.0: 0.6, 0.75: 0.5, 0.5: 0.4, 0.25: 0.3})


def test_own_noise_without_shift_is_the_students_very_state(gaussian: GaussianTeacher) -> None:
    student = shrunk(gaussian, Sampler(trailing(2), Ddim()))
    for index in range(4):
        nets = Nets({"student": student, "teacher": Asked(gaussian)})
        BACKWARD.student_loss(nets, nothing(8), Step.at(index))
        x_t, _, fraction = BACKWARD.estimate(student, nothing(8), Step.at(index))
        torch.testing.assert_close(nets.teacher.asked[0], (x_t, at(fraction, x_t)))
        assert len(nets.teacher.asked) == 8


def test_fresh_noise_draws_samples_to_the_mean_by_a_known_factor() -> None:
    """The mean target of one sample, over noise, is m + alpha^2 c^2 / V (x0 - m): the limit that the docstring states.

    With alpha(gamma) near 0 nothing of the sample is left in it, which is why gamma may not reach 1.
    """
    teacher = gaussian_on(RectifiedFlow())
    sample = torch.tensor([1.3, 0.9], dtype=torch.float64)
    for gamma in (0.3, 0.9):
        n = 40_000
        objective = ImagineFlash(gamma=(gamma, gamma))
        x0 = sample.expand(n, 2)
        target = objective.target(Nets({"teacher": teacher}), nothing(n), Step.at(0), x0, x0, 1.0).mean(0)
        signal = (1 - gamma) ** 2 * teacher.variances
        shrink = teacher.axes @ torch.diag(signal / (signal + gamma**2)) @ teacher.axes.T
        expected = teacher.mean + shrink @ (sample - teacher.mean)
        torch.testing.assert_close(target, expected, rtol=0, atol=0.01)


def test_low_noise_sharpens_towards_the_nearest_mode(ring: MixtureTeacher) -> None:
    """What shifted reconstruction is for: samples off the modes are told to go there, and keep to their own."""
    rng = torch.Generator().manual_seed(1)
    modes = ring.means[torch.arange(4000) % 8]
    off = modes + 0.25 * torch.randn(4000, 2, generator=rng, dtype=torch.float64)
    near = (off - modes).norm(dim=1) < 0.35  # nearer to theirs than to the next
    objective = ImagineFlash(gamma=(0.03, 0.03))
    told = objective.target(Nets({"teacher": ring}), nothing(4000), Step.at(0), off, off, 0.25)
    before, after = ((x - modes).norm(dim=1)[near].mean() for x in (off, told))
    assert after < 0.7 * before


def test_no_data_are_needed_and_none_are_looked_at(gaussian: GaussianTeacher) -> None:
    assert ImagineFlash().data == frozenset() and [t.moves for t in ImagineFlash().turns()] == [("student",)]
    nets = Nets({"student": shrunk(gaussian, Sampler(trailing(2), Ddim())), "teacher": gaussian})
    bare, fed = (
        ImagineFlash().student_loss(nets, batch, Step.at(1)).total
        for batch in (nothing(8), Batch({}, (8, 2), x0=torch.full((8, 2), float("nan"))))
    )
    torch.testing.assert_close(bare, fed)


def test_the_adversarial_term_is_added_with_its_weight_and_fits_on_the_same_samples(gaussian: GaussianTeacher) -> None:
    objective = ImagineFlash(gan=Gan(weight=0.3))
    assert objective.data == {"x0"} and [t.moves for t in objective.turns()] == [("student",), ("disc",)]
    student = exact_student(gaussian, Sampler(trailing(2), Ddim()))
    nets = Nets({"student": student, "teacher": gaussian, "disc": VectorDisc(2)})
    batch = Batch({}, (16, 2), x0=gaussian.sample(16))
    step = Step.at(3)
    loss = objective.student_loss(nets, batch, step)
    torch.testing.assert_close(loss.total, loss.terms["reconstruction"] + 0.3 * loss.terms["adv"])
    plain = ImagineFlash().student_loss(nets, batch, Step.at(3))
    torch.testing.assert_close(plain.total, loss.terms["reconstruction"])
    _, x0, _ = objective.estimate(student, batch, Step.at(3))
    torch.testing.assert_close(step.shared["student_x0"], x0.detach())
    fitted = objective.disc_loss(nets, batch, Step.at(3, 1, shared=step.shared)).total
    fitted.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in nets.disc.parameters())
    assert all(p.grad is None for p in student.parameters())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"objective\.gamma must rise within \[0, 1\]; got \[0\.8, 0\.1\]"):
        ImagineFlash(gamma=(0.8, 0.1))
    with pytest.raises(ValueError, match="fresh noise leaves nothing of the student's sample"):
        ImagineFlash(gamma=(0.1, 1.0))
    with pytest.raises(ValueError, match="let gamma start at 0"):
        ImagineFlash(gamma=(0.1, 0.8), noise="own")
    with pytest.raises(ValueError, match=r"objective\.teacher_steps must be at least 1; got 0"):
        ImagineFlash(teacher_steps=0)
    with pytest.raises(ValueError, match="is no single step of the teacher's ODE"):
        ImagineFlash(solver=Renoise())
    ImagineFlash(teacher_steps=4, solver=DpmPP2M())  # whose memory is of the steps of one refinement
    recipe = find("digits_imagine_flash")
    assert isinstance(recipe.data, Labels)
    with pytest.raises(ValueError, match="needs data with"):
        Recipe(Teacher("x"), ImagineFlash(gan=Gan()), Labels(), recipe.optim | {"disc": AdamW()})
    Recipe(Teacher("x"), ImagineFlash(gan=Gan()), DigitsData(), recipe.optim | {"disc": AdamW()})


@pytest.mark.parametrize(("steps", "bar"), [(1, 0.16), (2, 0.03)])
def test_backward_distillation_reaches_the_teachers_law(gaussian: GaussianTeacher, steps: int, bar: float) -> None:
    """Without data, against the closed form: four DDIM steps of the teacher from noise; and, in two steps, four more
    from those samples re-noised to the middle. Variances along the principal axes."""

    def walked(times: tuple[float, ...]) -> Tensor:
        grid = torch.tensor([*times, 0.0], dtype=torch.float64)
        return gaussian.ddim_contraction(grid[:-1], grid[1:]).prod(0).square()

    variances = walked(trailing(4))
    if steps == 2:
        alpha, sigma = moments(gaussian.schedule, 0.5)
        variances = (alpha**2 * variances + sigma**2) * walked(tuple(u / 2 for u in trailing(4)))
    law = gaussian.axes @ variances.diag() @ gaussian.axes.T

    def error(student: Student) -> float:
        return float((torch.cov(drawn(student).T).double() - law).norm() / law.norm())

    sampler, start = Sampler(trailing(steps), Ddim() if steps == 1 else Renoise()), pretrained(gaussian, 300)
    objective = ImagineFlash(gamma=(0.0, 1.0), noise="own", teacher_steps=4)
    optim = {"student": AdamW(2e-3, decay="linear")}
    student = distilled(objective, gaussian, start, sampler, optim, 250, data=lambda step: nothing(256))
    assert error(student_like(start, sampler)) > 0.3
    assert error(student) < bar, error(student)


def test_the_recipe_serves_the_usual_steps() -> None:
    for steps in (1, 2, 4, 8):
        recipe = find(f"digits_imagine_flash@{steps}")
        assert recipe.sampler.steps == steps and recipe.objective.solver == DpmPP2M()
