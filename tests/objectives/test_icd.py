"""iCD against exact flow maps in both directions, naive re-derivations, and DDIM inversion's own round trip."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stepdistill.editing import Inverter, edit, invert
from stepdistill.functional.distances import L2
from stepdistill.functional.ode import jump_target
from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import ICD
from stepdistill.parts.segments import Boundaries
from stepdistill.sampling import Ddim, Renoise, Sampler, Tcd, trailing
from stepdistill.schedule import DiscreteVP, Kind, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student, fit_network, mlp
from stepdistill.trainer import AdamW, Run, Trainer

from .test_cd import ExactOde, batch_of

EDGES = (1.0, 0.7, 0.3)
LOSSES = ("reverse_loss", "forward_loss", "forward_preservation", "reverse_preservation")
SCHEDULES = (DiscreteVP.linear(), RectifiedFlow())


class ExactJumps(nn.Module):
    """The clean estimate whose jump to the next edge, down or up, is the exact flow map's; a parameter spoils it."""

    def __init__(self, teacher: GaussianTeacher, up: bool):
        super().__init__()
        self._teacher, self.up = (teacher,), up
        self.spoil = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def edge(self, t: float) -> float:
        edges = (0.0, *reversed(EDGES))
        return edges[
            min(bisect.bisect_right(edges, t + 1e-9), 3) if self.up else bisect.bisect_left(edges, t - 1e-9) - 1
        ]

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        (teacher,) = self._teacher
        end = torch.tensor([self.edge(u) for u in t.tolist()], dtype=torch.float64)
        x_end = teacher.flow_map(x_t, t, end)
        return jump_target(x_t, x_end, teacher.schedule.coeffs(t, x_t), teacher.schedule.coeffs(end, x_t)) + self.spoil


def exact_pair(teacher: GaussianTeacher, start: float) -> Nets:
    """Teacher, student and inverter that follow the exact ODE from edge to edge."""
    student = Student(Sampler(EDGES, Ddim()), ExactJumps(teacher, False), teacher.schedule, "x0")
    inverter = Inverter(tuple(reversed(EDGES)), start, ExactJumps(teacher, True), teacher.schedule, "x0")
    return Nets({"teacher": teacher, "student": student, "inverter": inverter})


@pytest.fixture(params=SCHEDULES, ids=["vp", "flow"])
def teacher(request: pytest.FixtureRequest, gaussian: GaussianTeacher) -> GaussianTeacher:
    """The rotated Gaussian on either kind of path."""
    return GaussianTeacher(gaussian.mean, gaussian.cov, request.param)


def objective(start: float = 1e-4, **changes: object) -> ICD:
    """Three uneven segments under the exact solver."""
    return ICD(
        **{"boundaries": Boundaries(EDGES, 20), "start": start, "solver": ExactOde(), "distance": L2()} | changes
    )


@pytest.mark.parametrize("name", LOSSES)
def test_exact_flow_maps_have_no_loss_in_either_direction(teacher: GaussianTeacher, name: str) -> None:
    """But for the start: data stand for the state there, which leaves a square of its variance over the data's."""
    nets, icd, batch = exact_pair(teacher, 1e-4), objective(), batch_of(teacher, 256)
    right = getattr(icd, name)(nets, batch, Step.at(0)).total.item()
    moved = nets.inverter if name.startswith("forward") else nets.student
    with torch.no_grad():
        moved.net.spoil.fill_(0.05)
    wrong = getattr(icd, name)(nets, batch, Step.at(0)).total.item()
    assert right < (1e-14 if name.endswith("_loss") else 1e-6)
    assert wrong > 1e-5 and wrong > 100 * right


def test_what_the_start_costs_falls_with_its_variance(teacher: GaussianTeacher) -> None:
    icds = [objective(start) for start in (0.02, 0.01)]
    batch = batch_of(teacher, 256)
    cost = [icd.reverse_preservation(exact_pair(teacher, icd.start), batch, Step.at(0)).total.item() for icd in icds]
    assert 0 < cost[1] < cost[0] / 4 < 1e-3


# Against plain loops


@dataclass
class Line:
    """A path, two networks and a teacher on it, for single samples and plain floats."""

    nets: Nets

    def coeffs(self, t: float) -> tuple[float, float]:
        c = self.nets.teacher.schedule(torch.tensor([t], dtype=torch.float64))
        return c.alpha.item(), c.sigma.item()

    def jump(self, who: str, x: Tensor, t: float, s: float) -> Tensor:
        (a_t, b_t), (a_s, b_s) = self.coeffs(t), self.coeffs(s)
        x0 = self.nets[who](x[None], torch.tensor([t], dtype=torch.float64), {})[0]
        return a_s * x0 + b_s * (x - a_t * x0) / b_t

    def noised(self, x0: Tensor, eps: Tensor, t: float) -> Tensor:
        a, b = self.coeffs(t)
        return a * x0 + b * eps.double()


@pytest.fixture
def line(teacher: GaussianTeacher) -> Line:
    """Students that are both a little off, in different ways."""
    nets = exact_pair(teacher, 0.02)
    with torch.no_grad():
        nets.student.net.spoil.fill_(0.1)
        nets.inverter.net.spoil.fill_(-0.2)
    return Line(nets)


def test_both_distillation_losses_equal_loops_over_samples(line: Line) -> None:
    n, icd, edges = 40, objective(0.02, solver=Ddim()), (0.0, *reversed(EDGES))
    batch = batch_of(line.nets.teacher, n)
    for name, who in (("reverse_loss", "student"), ("forward_loss", "inverter")):
        step = Step.at(3)
        eps, i = step.randn((n, 2)), step.integers(20, n)
        expected = 0.0
        for k in range(n):
            low, high = i[k].item() / 20, (i[k].item() + 1) / 20
            t, s = (high, low) if who == "student" else (max(low, 0.02), high)
            end = max(e for e in edges if e <= low) if who == "student" else min(e for e in edges if e >= high)
            x_t = line.noised(batch.x0[k], eps[k], t)
            x_s = line.jump("teacher", x_t, t, s)
            aim = x_s if s == end else line.jump(who, x_s, s, end)
            expected += (line.jump(who, x_t, t, end) - aim).square().mean().item() / n
        assert getattr(icd, name)(line.nets, batch, Step.at(3)).total.item() == pytest.approx(expected, rel=1e-9)


def test_both_preservation_losses_equal_loops_over_samples(line: Line) -> None:
    n, icd, edges = 40, objective(0.02), (0.0, *reversed(EDGES))
    batch, (scale, _) = batch_of(line.nets.teacher, n), line.coeffs(0.02)
    step = Step.at(3)
    k, eps = step.integers(3, n), step.randn((n, 2))

    def rise(x: Tensor, low: float, high: float) -> Tensor:
        return line.jump("inverter", x, low, high) if low else line.jump("inverter", scale * x, 0.02, high)

    forward = reverse = 0.0
    for j in range(n):
        low, high = edges[k[j]], edges[k[j] + 1]
        top, bottom = (line.noised(batch.x0[j], eps[j], u) for u in (high, low))
        forward += (rise(line.jump("student", top, high, low), low, high) - top).square().mean().item() / n
        reverse += (line.jump("student", rise(bottom, low, high), high, low) - bottom).square().mean().item() / n
    got = [getattr(icd, name)(line.nets, batch, Step.at(3)).total.item() for name in LOSSES[2:]]
    assert got == pytest.approx([1.5 * forward, 1.5 * reverse], rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_network_that_moves_gets_a_gradient(line: Line, name: str) -> None:
    """Through its first jump alone: the target and the round trip's first half are fixed."""
    icd, batch = objective(0.02, distance=L2()), batch_of(line.nets.teacher, 8)
    getattr(icd, name)(line.nets, batch, Step.at(0)).total.backward()
    moved, still = ("inverter", "student") if name.startswith("forward") else ("student", "inverter")
    assert line.nets[moved].net.spoil.grad.abs() > 0 and line.nets[still].net.spoil.grad is None


# Guidance


class Told(nn.Module):
    """A network that writes down the scales it is told, and predicts the same for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[Tensor] = []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None = None) -> Tensor:
        self.scales.append(guidance)
        return self.weight * x_t


def test_guidance_is_the_students_alone() -> None:
    """The student is told the batch's scales and now and then none; the inverter, its teacher and round trips none."""
    schedule, n = RectifiedFlow(), 400
    nets = Nets({"student": Student(Sampler(EDGES, Ddim()), Told(), schedule, "x0")})
    nets["inverter"] = Inverter.beside(nets.student, 0.02)
    inner = Denoiser(Told(), schedule, "x0")
    nets["teacher"] = Guided(inner, 3.0, {"labels": torch.tensor([2])})
    cond = {"labels": torch.zeros(n, dtype=torch.long), "guidance": torch.linspace(2, 8, n)}
    batch = Batch(cond, (n, 2), x0=torch.randn(n, 2, generator=torch.Generator().manual_seed(0)))
    icd, ones = ICD(boundaries=Boundaries(EDGES, 20)), torch.ones(n)

    icd.reverse_loss(nets, batch, Step.at(0))
    (first, second), (told,) = nets.student.net.scales, inner.net.scales
    off = first == 1
    assert torch.equal(first, second) and torch.equal(first[~off], cond["guidance"][~off])
    assert 0.1 < off.float().mean() < 0.3
    assert told is None  # the teacher is guided by two halves of one evaluation, of twice the batch

    nets.student.net.scales.clear()
    inner.net.scales.clear()
    for name in LOSSES[1:]:
        getattr(icd, name)(nets, batch, Step.at(0))
    assert len(nets.inverter.net.scales) == 4 and len(nets.student.net.scales) == 2 and len(inner.net.scales) == 1
    assert all(torch.equal(s, ones) for s in (*nets.inverter.net.scales, *nets.student.net.scales, *inner.net.scales))


# Roles, turns, bad input


def test_the_inverter_starts_as_the_student_and_moves_by_itself(gaussian: GaussianTeacher) -> None:
    student = exact_student(gaussian, Sampler(EDGES, Ddim()))
    inverter = objective(0.02).extras(student)["inverter"]
    assert inverter.net is not student.net and inverter.edges == (0.3, 0.7, 1.0) and inverter.start == 0.02
    assert {k: v.tolist() for k, v in inverter.net.state_dict().items()} == {
        k: v.tolist() for k, v in student.net.state_dict().items()
    }
    assert [(t.name, t.moves) for t in ICD().turns()] == [
        ("reverse", ("student",)),
        ("forward", ("inverter",)),
        ("forward_preservation", ("inverter",)),
        ("reverse_preservation", ("student",)),
    ]
    assert [t.name for t in ICD(preserve=0.0).turns()] == ["reverse", "forward"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"start": 0.0}, "start must lie between 0 and the first edge, 0.3; got 0.0"),
        ({"start": 0.3}, "start must lie between"),
        ({"preserve": -1.0}, "preserve of at least 0"),
        ({"preserve": math.nan}, "preserve of at least 0"),
        ({"unguided": 1.5}, r"unguided in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        objective(**{"start": 0.02} | changes)


def test_the_student_must_jump_between_the_edges_without_noise() -> None:
    icd = objective()
    icd.check(Sampler(EDGES, Ddim()))
    icd.check(Sampler(EDGES, Tcd(0.0)))
    with pytest.raises(ValueError, match=r"sampler.times \[1.0, 0.5\] are not objective.boundaries.edges"):
        icd.check(Sampler((1.0, 0.5), Ddim()))
    for rule in (Renoise(), Tcd(0.3)):
        with pytest.raises(ValueError, match="does not invert"):
            icd.check(Sampler(EDGES, rule))


# Training


def trained(schedule: Schedule, kind: Kind, icd: ICD, seed: int = 0, steps: int = 150) -> tuple[GaussianTeacher, Nets]:
    """Two classes of one covariance, a pretrained network, and the production trainer."""
    cov = torch.tensor([[0.78, 0.4], [0.4, 0.26]])  # standard deviations of 1 and 0.2 along its axes
    teacher = GaussianTeacher(torch.tensor([0.4, -0.3]), cov, schedule, torch.tensor([[1.0, 0.5], [-0.6, -0.8]]))
    torch.manual_seed(seed)
    start = Denoiser(mlp(2, classes=2), schedule, kind)
    fit_network(start, teacher, 300, labelled=True, batch=256)
    nets = Nets(
        {"teacher": teacher, "student": Student(Sampler(icd.boundaries.edges, Ddim()), start.net, schedule, kind)}
    )
    nets.update(icd.extras(nets.student))

    def data(step: Step) -> Batch:
        cond = {"labels": step.integers(2, 256)}
        return Batch(cond, (256, 2), x0=teacher.sample(256, step.rng, cond))

    specs = {name: AdamW(3e-3, decay="linear") for name in ("student", "inverter")}
    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in specs.items()}
    run = Run(steps=steps, batch=256, ema=0.98, clip=10.0, seed=seed)
    trainer = Trainer(nets, icd, optimizers, data, run, specs=specs)
    for index in range(steps):
        trainer.step(index)
    return teacher, nets


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square difference."""
    return (a - b).double().square().mean().sqrt().item()


@pytest.mark.parametrize(("schedule", "kind"), zip(SCHEDULES, ("v", "velocity"), strict=True), ids=["vp", "flow"])
def test_four_calls_up_and_four_down_bring_samples_back_and_move_them_to_another_class(
    schedule: Schedule, kind: Kind
) -> None:
    """Where DDIM inversion at as many calls is off by 0.46 (VP) and 0.36 (flow), in closed form. Worst of three seeds
    and both paths: round trip 0.020, noise 0.12, edit 0.067, its mean 0.09."""
    icd = ICD(boundaries=Boundaries(trailing(4), 16), start=0.01 if kind == "v" else 0.02, distance=L2())
    teacher, nets = trained(schedule, kind, icd)
    n, end = 4000, torch.ones(4000, dtype=torch.float64)
    a = {"labels": torch.arange(n) % 2}
    b = {"labels": 1 - a["labels"]}
    x0 = teacher.sample(n, torch.Generator().manual_seed(5), a)

    up = torch.tensor([icd.start, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    down = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    both = [teacher.ddim_contraction(grid[:-1], grid[1:]).prod(0) for grid in (up, down)]
    kept = both[0] * both[1] * schedule(up[:1]).alpha  # of each principal axis
    ddim = (((1 - kept).square() * teacher.variances).mean()).sqrt().item()

    there_and_back = rms(edit(nets.ema, nets.inverter, x0, a, a), x0)
    assert there_and_back < 0.04 < 0.15 * ddim

    noise = invert(nets.inverter, x0, a)
    exact = teacher.flow_map(x0.double(), 0 * end, end, a)
    assert rms(noise, exact) < 0.25
    edited = edit(nets.ema, nets.inverter, x0, a, b)
    aim = teacher.flow_map(exact, end, 0 * end, b)  # the same noise, of the other class
    assert rms(edited, aim) < 0.14 and rms(x0, aim) > 1.3
    shift = teacher.means[b["labels"]] - teacher.means[a["labels"]]
    one = a["labels"] == 0
    assert ((edited - x0 - shift)[one].mean(0)).abs().max() < 0.18
