"""Reflow against straight couplings, whose velocity is known, and against a naive loop on the straight line."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stepdistill.functional.distances import L2, Huber
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import Reflow
from stepdistill.parts.times import OnGrid, Uniform, UShaped
from stepdistill.sampling import Ddim, NoiseCorrected, Renoise, Sampler, at, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule, convert
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained

MEAN = torch.tensor([0.4, -0.3], dtype=torch.float64)
STD = torch.tensor([1.0, 0.2], dtype=torch.float64)


class Straight(nn.Module):
    """The clean estimate when every image is ``MEAN + STD noise``: solve the state for the noise (closed form)."""

    def __init__(self, schedule: Schedule, kind: str = "x0"):
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        c = self.schedule.coeffs(t, x_t)
        # noise alone, that sampling starts from, stands for a state without signal
        top = (t >= self.schedule.t_max).view(-1, 1)
        noise = torch.where(top, x_t / self.schedule.prior_std, (x_t - c.alpha * MEAN) / (c.alpha * STD + c.sigma))
        return self.gain * convert(MEAN + STD * noise, x_t, c, "x0", self.kind)


def coupled(schedule: Schedule, n: int) -> Batch:
    noise = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return Batch({}, (n, 2), path=torch.stack([schedule.prior_std * noise, MEAN + STD * noise], 1))


def student_on(schedule: Schedule, sampler: Sampler | None = None, kind: str = "x0") -> Student:
    return Student(sampler or Sampler(trailing(4), Ddim()), Straight(schedule, kind), schedule, kind)


def test_the_flow_of_a_straight_coupling_has_no_loss_on_any_schedule(schedule: Schedule) -> None:
    nets = Nets({"student": student_on(schedule)})
    batch = coupled(schedule, 256)
    assert Reflow(distance=L2()).student_loss(nets, batch, Step.at(0)).total.item() < 1e-15
    with torch.no_grad():
        nets.student.net.gain.fill_(0.9)
    assert Reflow(distance=L2()).student_loss(nets, batch, Step.at(0)).total.item() > 1e-3


def test_a_v_predictor_and_a_flow_are_trained_alike() -> None:
    """The straight line is rectified flow's; at equal SNR a VP network is asked for the same velocity."""
    losses = []
    for schedule, kind in ((DiscreteVP.linear(), "v"), (DiscreteVP.linear(), "eps"), (RectifiedFlow(), "velocity")):
        student = student_on(schedule, kind="x0")
        with torch.no_grad():
            student.net.gain.fill_(0.9)

        class Native(nn.Module):  # the same function, spoken in another kind
            def __init__(self, inner: Student, kind: str):
                super().__init__()
                self.inner, self.kind = inner, kind

            def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
                return self.inner(x_t, t, {}, want=self.kind)

        nets = Nets({"student": Student(Sampler(trailing(4), Ddim()), Native(student, kind), schedule, kind)})
        inside = OnGrid((0.1, 0.5, 0.9))  # below where the table ends
        losses.append(Reflow(distance=L2(), times=inside).student_loss(nets, coupled(schedule, 64), Step.at(0)).total)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_the_loss_equals_a_loop_over_points_of_the_line(name: str) -> None:
    """x_tau = (1 - tau) image + tau noise, rescaled by hand to the student's path; Huber on the velocities."""
    schedule = {"vp": DiscreteVP.scaled_linear(), "flow": RectifiedFlow(), "edm": EDM(10.0)}[name]
    student, n = student_on(schedule), 48
    with torch.no_grad():
        student.net.gain.fill_(0.8)
    batch = coupled(schedule, n)
    got = Reflow().student_loss(Nets({"student": student}), batch, Step.at(7)).total.item()

    taus = UShaped(4.0)(RectifiedFlow(), n, Step.at(7))
    c_max = schedule(torch.tensor([schedule.t_max], dtype=torch.float64))
    tau_max = float(c_max.sigma / (c_max.alpha + c_max.sigma))
    expected, outside = 0.0, 0
    for k, tau in enumerate(taus.tolist()):
        noise, image = batch.path[k, 0] / schedule.prior_std, batch.path[k, 1]
        point = (1 - tau) * image + tau * noise
        if tau > tau_max:  # beyond the student's noisiest time: what it starts from
            t, state, outside = schedule.t_max, schedule.prior_std * noise, outside + 1
        else:
            logsnr = torch.tensor([2 * math.log((1 - tau) / tau)], dtype=torch.float64)
            t = float(schedule.t_from_logsnr(logsnr))
            c = schedule(torch.tensor([t], dtype=torch.float64))
            state = point * float(c.alpha) / (1 - tau)
        x0 = student(state[None], torch.tensor([t], dtype=torch.float64), {})[0]
        delta = (point - x0) / tau - (noise - image)
        expected += (math.sqrt(delta.square().mean().item() + 0.03**2) - 0.03) / n
    assert got == pytest.approx(expected, rel=1e-6)
    assert (outside > 0) == (name != "flow")


def test_unrelated_pairs_lead_to_the_teacher_itself() -> None:
    """Independent noise and images: the optimum is E[x0 | x_t]. The pairs are all of {m +- c} x {-1, 1}, whose first
    and second moments are a Gaussian's, and an affine fit depends on nothing else."""
    schedule, tau, mean, std = RectifiedFlow(), 0.6, 0.7, 0.5
    noise = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    image = mean + std * torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    batch = Batch({}, (4, 1), path=torch.stack([noise, image], 1))

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.a * x_t + self.b

    teacher = GaussianTeacher(image.mean(0), torch.cov(image.T, correction=0)[None, None], schedule)
    alone = {p: teacher(torch.tensor([[p]], dtype=torch.float64), at(tau, noise[:1])).item() for p in (0.0, 1.0)}
    student = Student(Sampler(trailing(1), Ddim()), Affine(), schedule, "x0")
    with torch.no_grad():
        student.net.a.fill_(alone[1.0] - alone[0.0])
        student.net.b.fill_(alone[0.0])
    objective = Reflow(distance=L2(), times=OnGrid((tau,)))
    objective.student_loss(Nets({"student": student}), batch, Step.at(0)).total.backward()
    assert student.net.a.grad.abs() < 1e-12 and student.net.b.grad.abs() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_jumps_of_a_straight_flow_are_exact_on_every_grid(schedule: Schedule, steps: int) -> None:
    """On any schedule the noise-corrected walk ends on its own pair's image, in as many steps as one likes."""
    student = student_on(schedule, Sampler(trailing(steps), NoiseCorrected()))
    noise = torch.randn(8, 2, dtype=torch.float64)
    got = student.sampler.run(student, noise, {}, torch.Generator())
    torch.testing.assert_close(got, MEAN + STD * noise, rtol=1e-8, atol=1e-8)


def test_plain_jumps_are_off_by_the_signal_left_at_the_top() -> None:
    """Not at all on a flow, and on Stable Diffusion's table, alpha = 0.07, by as much: why the docstring warns."""
    noise, off = torch.randn(256, 2, dtype=torch.float64), {}
    for name, schedule in (("flow", RectifiedFlow()), ("sd", DiscreteVP.scaled_linear())):
        student = student_on(schedule, Sampler(trailing(4), Ddim()))
        got = student.sampler.run(student, noise, {}, torch.Generator())
        off[name] = (got - MEAN - STD * noise).square().mean().sqrt().item()
    assert off["flow"] < 1e-12 and 0.01 < off["sd"] < 0.1


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"objective\.shortest must lie in \(0, 0\.5\); got 0"):
        Reflow(shortest=0.0)
    with pytest.raises(ValueError, match=r"sampler\.times starts at 0\.9; reflow's pairs begin with pure noise"):
        Reflow().check(Sampler((0.9, 0.5), Ddim()))
    with pytest.raises(ValueError, match="trained to jump from time to time"):
        Reflow().check(Sampler(trailing(4), Renoise()))


def test_one_round_on_the_teachers_pairs_straightens_the_flow(gaussian: GaussianTeacher) -> None:
    """One student for one step and for four, against the exact map's law; the teacher's one step is far from it."""

    def pairs(step: Step) -> Batch:
        noise = step.randn((256, 2))
        return Batch({}, (256, 2), path=torch.stack([noise, gaussian.consistency(noise, at(1.0, noise))], 1))

    optim = {"student": AdamW(2e-3, decay="linear")}
    one = Sampler(trailing(1), Ddim())
    student = distilled(Reflow(distance=Huber(0.03)), gaussian, pretrained(gaussian, 300), one, optim, 600, data=pairs)
    errors = {}
    for steps in (1, 4):
        student.sampler = Sampler(trailing(steps), Ddim())
        got = torch.cov(drawn(student).T).double()
        errors[steps] = float((got - gaussian.cov).norm() / gaussian.cov.norm())
    _, coarse = gaussian.ddim_law((1.0,))
    assert float((coarse - gaussian.cov).norm() / gaussian.cov.norm()) > 0.9
    assert errors[1] < 0.11 and errors[4] < 0.03, errors  # 0.041 to 0.054 and 0.013 to 0.015 in three seeds


def test_the_original_is_uniform_times_and_squared_error() -> None:
    nets = Nets({"student": student_on(RectifiedFlow())})
    with torch.no_grad():
        nets.student.net.gain.fill_(0.9)
    batch, tau = coupled(RectifiedFlow(), 32), Uniform()(RectifiedFlow(), 32, Step.at(2))[:, None]
    noise, image = batch.path[:, 0], batch.path[:, 1]
    point = (1 - tau) * image + tau * noise
    velocity = nets.student(point, tau[:, 0], {}, want="velocity")
    expected = (velocity - (noise - image)).square().mean()
    got = Reflow(times=Uniform(), distance=L2()).student_loss(nets, batch, Step.at(2)).total
    torch.testing.assert_close(got, expected)
