"""PCM against exact fixed points, against LCM and TSCD where they coincide, and naive re-derivations of all losses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stepdistill.functional.distances import L2
from stepdistill.functional.ode import jump_target
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.nets import Nets
from stepdistill.objective import Step
from stepdistill.objectives import LCM, PCM, TSCD
from stepdistill.parts.gan import Gan
from stepdistill.parts.segments import Segments
from stepdistill.parts.times import Uniform
from stepdistill.sampling import Ddim, Renoise, Sampler, Tcd, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule, TrigFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained
from .test_cd import batch_of

SCHEDULES = [DiscreteVP.linear(), RectifiedFlow(), TrigFlow(), EDM(5.0)]
ADVERSARIAL = Gan(weight=0.1, loss="hinge_both", times=Uniform())


class StepsToEdge(nn.Module):
    """The clean estimate whose jump lands where single DDIM steps of the teacher arrive at the segment's lower edge."""

    def __init__(self, teacher: GaussianTeacher, segments: Segments):
        super().__init__()
        self._teacher, self.segments = (teacher,), segments

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        (teacher,) = self._teacher
        n, t_max, out = self.segments.solver_steps, teacher.schedule.t_max, []
        for x, u in zip(x_t, t.tolist(), strict=True):
            per, i = n // self.segments.count, round(u / t_max * n)
            edge, state = max(i - 1, 0) // per * per, x[None]
            for k in range(i, edge, -1):
                here, there = (torch.tensor([j / n * t_max], dtype=torch.float64) for j in (k, k - 1))
                x0, eps = (teacher(state, here, want=want) for want in ("x0", "eps"))
                c = teacher.schedule(there)
                state = c.alpha * x0 + c.sigma * eps
            a, b = (teacher.schedule.coeffs(torch.tensor([j / n * t_max]), x[None]) for j in (i, edge))
            out.append(jump_target(x[None], state, a, b) if i > edge else state)
        return torch.cat(out)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_solvers_composition_down_to_each_edge_has_no_loss(gaussian: GaussianTeacher, schedule: Schedule) -> None:
    teacher = GaussianTeacher(gaussian.mean, gaussian.cov, schedule)
    segments = Segments(4, 12)
    student = Student(Sampler(trailing(4), Ddim()), StepsToEdge(teacher, segments), schedule, "x0")
    nets = Nets({"student": student, "teacher": teacher})
    assert PCM(segments=segments, distance=L2()).student_loss(nets, batch_of(teacher, 128), Step.at(0)).total < 1e-14
    fewer = PCM(segments=Segments(2, 12), distance=L2())
    assert fewer.student_loss(nets, batch_of(teacher, 128), Step.at(0)).total > 1e-6


def players(teacher: GaussianTeacher, count: int) -> Nets:
    """A student and a target that are both wrong, and differ."""
    student, target = (exact_student(teacher, Sampler(trailing(count), Ddim())).double() for _ in range(2))
    with torch.no_grad():
        student.net.scale.fill_(0.8)
        target.net.shift.fill_(0.3)
    return Nets({"student": student, "target": target, "teacher": teacher})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_with_a_running_average_it_is_tscd_with_every_end_at_the_edge(gaussian: GaussianTeacher, count: int) -> None:
    nets, batch, cut = players(gaussian, count), batch_of(gaussian, 64), Segments(count, 8)
    pcm = PCM(segments=cut, target_decay=0.95, distance=L2()).student_loss(nets, batch, Step.at(5)).total
    assert torch.equal(pcm, TSCD(segments=cut, to_edge=1.0).student_loss(nets, batch, Step.at(5)).total)
    assert not torch.equal(pcm, TSCD(segments=cut, to_edge=0.0).student_loss(nets, batch, Step.at(5)).total)


def test_with_one_segment_it_is_lcm(gaussian: GaussianTeacher) -> None:
    nets, batch = players(gaussian, 1), batch_of(gaussian, 64)
    for decay in (None, 0.95):
        pcm = PCM(segments=Segments(1, 8), target_decay=decay).student_loss(nets, batch, Step.at(5)).total
        assert torch.equal(pcm, LCM(intervals=8, target_decay=decay).student_loss(nets, batch, Step.at(5)).total)


class Watching(nn.Module):
    """Logits that a hand can check, of the state and the time; remembers both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.x_t, self.t = x_t.detach(), t
        return self.weight * x_t.sum(1, keepdim=True) + t[:, None] - 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_all_losses_equal_loops_over_samples(gaussian: GaussianTeacher, schedule: Schedule) -> None:
    """Jumps, noising from the edge's level up into the segment, and both hinges, in plain floats."""
    n, t_max = 24, schedule.t_max
    teacher = GaussianTeacher(gaussian.mean, gaussian.cov, schedule)
    nets = players(teacher, 4)
    nets["disc"] = Watching()
    objective = PCM(segments=Segments(4, 16), gan=replace(PCM().gan, weight=0.1))
    batch, step = batch_of(teacher, n), Step.at(3)
    student_total = objective.student_loss(nets, batch, step).total.item()
    disc_total = objective.disc_loss(nets, batch, step).total.item()

    replay = Step.at(3)
    eps, i = replay.randn((n, 2)).double(), replay.integers(16, n) + 1
    states = []
    for k in range(n):
        edges = math.floor((i[k].item() - 1) / 4) / 4
        t, s, e = (torch.tensor([u * t_max], dtype=torch.float64) for u in (i[k] / 16, (i[k] - 1) / 16, edges))
        a, b, c = (schedule(u) for u in (t, s, e))
        x_t = a.alpha * batch.x0[k] + a.sigma * eps[k]
        x_s = b.alpha * teacher(x_t[None], t)[0] + b.sigma * teacher(x_t[None], t, want="eps")[0]
        moved, aim = nets.student(x_t[None], t, {})[0], x_s
        moved = c.alpha * moved + c.sigma * (x_t - a.alpha * moved) / a.sigma
        if s > e:
            aim = nets.student(x_s[None], s, {})[0]
            aim = c.alpha * aim + c.sigma * (x_s - b.alpha * aim) / b.sigma
        states.append((moved.detach(), aim.detach(), e))

    def noised(parts: tuple[int, ...]) -> list[list[float]]:
        """Logits of each part of the states, from the next draws."""
        share = Uniform().fractions(schedule, n, replay)
        logits = []
        for part in parts:
            z = replay.randn((n, 2)).double()
            logits.append([])
            for k, state in enumerate(states):
                t = state[2] + share[k] * t_max / 4
                high, low = schedule(t), schedule(state[2])
                ratio = high.alpha / low.alpha
                x = ratio * state[part] + (high.sigma**2 - ratio**2 * low.sigma**2).sqrt() * z[k]
                logits[-1].append((x.sum() + t - 1).item())
        return logits

    huber = sum(((m - a).square() + 1e-6).sqrt().sub(1e-3).mean().item() for m, a, _ in states) / n
    (fake,) = noised((0,))
    assert student_total == pytest.approx(huber + 0.1 * sum(max(0.0, 1 - f) for f in fake) / n, rel=1e-6)
    real, fake = noised((1, 0))
    by_hand = sum(max(0.0, 1 - r) for r in real) / n + sum(max(0.0, 1 + f) for f in fake) / n
    assert disc_total == pytest.approx(by_hand, rel=1e-6)
    edge = torch.tensor([e.item() for _, _, e in states]).repeat(2)
    seen = nets.disc.t
    assert bool(((seen >= edge) & (seen < edge + t_max / 4)).all())


def test_states_noised_into_the_segment_follow_the_path(gaussian: GaussianTeacher) -> None:
    """What has the right law at the edge has it above: mean and variance of the noised data, in closed form."""
    n, schedule = 200_000, gaussian.schedule
    objective = PCM(gan=Gan(weight=1.0, times=Uniform(0.6, 0.6001)))
    rng = torch.Generator().manual_seed(0)
    edge = torch.full((n,), 0.25, dtype=torch.float64)
    x0, eps = gaussian.sample(n, rng), torch.randn(n, 2, generator=rng)
    nets = Nets({"teacher": gaussian})
    x_t, t = objective.into_segment(nets, edge, Step.at(1), schedule.add_noise(x0, eps, edge))
    c = schedule(t[:1])
    assert t[0].item() == pytest.approx(0.25 + 0.6 / 4, abs=1e-4)
    torch.testing.assert_close(x_t.mean(0).double(), c.alpha * gaussian.mean, atol=0.01, rtol=0)
    expected = c.alpha**2 * gaussian.cov + c.sigma**2 * torch.eye(2)
    torch.testing.assert_close(torch.cov(x_t.double().T), expected, atol=0.015, rtol=0)


def test_each_players_gradient_stays_its_own(gaussian: GaussianTeacher) -> None:
    nets, batch, step = players(gaussian, 4), batch_of(gaussian, 32), Step.at(0)
    nets["disc"] = Watching()
    objective = PCM(segments=Segments(4, 16), gan=ADVERSARIAL)
    objective.student_loss(nets, batch, step).total.backward()
    assert nets.student.net.scale.grad is not None and nets.target.net.scale.grad is None
    with_gan, nets.student.net.scale.grad = nets.student.net.scale.grad.clone(), None
    PCM(segments=Segments(4, 16)).student_loss(nets, batch, Step.at(0)).total.backward()
    assert (with_gan - nets.student.net.scale.grad).abs() > 1e-4  # it flows through the discriminator

    nets.student.net.scale.grad = nets.disc.weight.grad = None
    objective.disc_loss(nets, batch, step).total.backward()
    assert nets.student.net.scale.grad is None and nets.disc.weight.grad is not None
    lone = objective.disc_loss(nets, batch, Step.at(0, 9))  # no turn of the student's before it
    assert torch.isfinite(lone.total) and lone.total.grad_fn is not None


def test_without_a_weight_there_is_no_discriminator() -> None:
    assert [turn.moves for turn in PCM().turns()] == [("student",)]
    assert [turn.moves for turn in PCM(gan=ADVERSARIAL).turns()] == [("student",), ("disc",)]
    assert PCM().averages() == {} and PCM(target_decay=0.9).averages() == {"target": 0.9}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda: PCM(target_decay=1.0), r"target_decay must lie in \[0, 1\)"),
        (lambda: PCM(gan=Gan(r1=1.0)), "sees no real data: objective.gan.r1 must be 0"),
        (lambda: PCM(gan=Gan(loss="relativistic")), "not 'relativistic'; got 0.0 and 'relativistic'"),
        (lambda: PCM().check(Sampler(trailing(2), Ddim())), "are not the upper edges of 4 segments"),
        (lambda: PCM().check(Sampler(trailing(4), Tcd(0.3))), "leaves the edges"),
        (lambda: PCM().check(Sampler(trailing(4), Renoise())), "leaves the edges"),
    ],
)
def test_what_cannot_work_is_refused(bad: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bad()


@pytest.fixture(scope="module")
def start(gaussian: GaussianTeacher) -> Denoiser:
    return pretrained(gaussian, 400)


@pytest.mark.parametrize("gan", [Gan(weight=0.0), ADVERSARIAL], ids=["plain", "adversarial"])
def test_four_phases_reach_the_teachers_sixteen_steps(gaussian: GaussianTeacher, start: Denoiser, gan: Gan) -> None:
    """Four jumps have the law that sixteen DDIM steps have in closed form, far from that of four; a game sways."""
    optim = {"student": AdamW(2e-3, decay="linear")}
    if gan.weight:
        optim["disc"] = AdamW(1e-3, (0.0, 0.99))
    objective = PCM(segments=Segments(4, 16), target_decay=0.95, distance=L2(), gan=gan)
    sampler = Sampler(trailing(4), Ddim())
    got = drawn(distilled(objective, gaussian, start, sampler, optim, 300, batch=256))
    (mean, fine), (_, coarse) = (gaussian.ddim_law(trailing(k)) for k in (16, 4))
    error, far = (torch.cov(got.T) - fine).norm() / fine.norm(), (coarse - fine).norm() / fine.norm()
    assert far > 0.5 and error < (0.15 if gan.weight else 0.05)
    assert (got.mean(0) - mean).abs().max() < (0.15 if gan.weight else 0.01)
