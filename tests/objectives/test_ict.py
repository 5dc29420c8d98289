"""iCT against the paper's formulas written out, and the exact consistency function."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import ICT
from stepdistill.parts.discretisation import Doubling, Karras
from stepdistill.parts.times import LogNormal
from stepdistill.sampling import Renoise, Sampler, Tcd, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher
from stepdistill.trainer import AdamW

from .conftest import distilled, pretrained
from .test_cd import batch_of, error_of

ONE_STEP = Sampler(trailing(1), Renoise())


class Affine(nn.Module):
    """``a x_t + b t``, two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.a * x_t + self.b * t[:, None]


def test_intervals_are_drawn_as_the_papers_error_functions_say() -> None:
    ict = ICT()
    u = [(0.002 ** (1 / 7) + i / 20 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(21)]
    erf = [math.erf((math.log(x) + 1.1) / (2 * math.sqrt(2))) for x in u]
    expected = torch.tensor([b - a for a, b in pairwise(erf)], dtype=torch.float64)
    got = ict.shares(torch.tensor(u, dtype=torch.float64))
    assert_close(got, expected / expected.sum())
    assert got.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("schedule", [EDM(80.0), DiscreteVP.linear(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_loss_and_gradient_equal_a_loop_that_holds_the_target_fixed(schedule: Schedule) -> None:
    """Interval by inverse distribution, one noise, pseudo-Huber of the norm with c = .00054 sqrt(d), weight 1 / gap."""
    n, d = 40, 2
    student = Student(ONE_STEP, Affine(), schedule, "x0").double()
    x0 = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = ICT(intervals=Doubling(10, 10, 1))
    loss = objective.student_loss(Nets({"student": student}), Batch({}, (n, d), x0=x0), Step.at(2)).total
    loss.backward()

    step = Step.at(2)
    eps, share = step.randn((n, d)).double(), step.rand(n)
    level = [(0.002 ** (1 / 7) + i / 10 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(11)]
    normal = [0.5 + 0.5 * math.erf((math.log(x) + 1.1) / (2 * math.sqrt(2))) for x in level]
    a, b = student.net.a.item(), student.net.b.item()
    expected = grad_a = 0.0
    for k in range(n):
        mass = [(x - normal[0]) / (normal[-1] - normal[0]) for x in normal]
        i = max(j for j in range(10) if mass[j] < share[k].item())
        t, s = (schedule.t_from_logsnr(torch.tensor([-2 * math.log(level[j])])) for j in (i + 1, i))
        t = torch.tensor([schedule.t_max]) if i == 9 else t
        c_t = [c.double() for c in schedule(t)]
        x_t = c_t[0] * x0[k] + c_t[1] * eps[k]
        moved, aim = a * x_t + b * t, x0[k]
        if i > 0:
            c_s = schedule(s)
            aim = a * (c_s.alpha * x0[k] + c_s.sigma * eps[k]) + b * s
        gap, c = level[i + 1] - level[i], 0.00054 * math.sqrt(d)
        huber = math.sqrt((moved - aim).square().sum().item() + c**2)
        expected += (huber - c) / gap / math.sqrt(d) / n  # the library divides by sqrt(d)
        grad_a += ((moved - aim) * x_t).sum().item() / huber / gap / math.sqrt(d) / n
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert student.net.a.grad.item() == pytest.approx(grad_a, rel=1e-5)


def test_the_target_is_the_student_itself() -> None:
    assert ICT().averages() == {} and ICT().needs == {"student"}


def test_a_student_that_would_be_called_off_its_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"intervals.start 2 leaves no room for the sampler's 4 times"):
        ICT(intervals=Doubling(2, 64, 100)).check(Sampler(trailing(4), Renoise()))
    with pytest.raises(ValueError, match="iCT's student jumps to the data only"):
        ICT().check(Sampler(trailing(2), Tcd(0.3)))


def test_every_time_of_the_student_gets_weight(gaussian: GaussianTeacher) -> None:
    """The gradient reaches a network that answers at the student's own four times only."""

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(torch.arange(1, 5).double())  # all different, or there would be nothing to learn

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return x_t * ((t[:, None] * 4 - torch.arange(1, 5)).abs() < 1e-9).double() @ self.at[:, None]

    student = Student(Sampler(trailing(4), Renoise()), Only(), RectifiedFlow(), "x0")
    nets = Nets({"student": student})
    data = batch_of(gaussian, 4000)
    batch = Batch({}, (8000, 1), x0=data.x0.reshape(-1, 1))
    ICT(times=LogNormal(0.0, 2.0)).student_loss(nets, batch, Step.at(0)).total.backward()
    assert bool((student.net.at.grad.abs() > 1e-4).all())


def test_training_on_data_alone_reaches_the_exact_ode_map(gaussian: GaussianTeacher) -> None:
    start = pretrained(gaussian, 400)
    before = error_of(gaussian, Student(ONE_STEP, start.net, start.schedule, start.kind))
    objective = ICT(intervals=Doubling(4, 32, 400), spacing=Karras(0.02, 160.0), times=LogNormal(0.5, 2.0))
    student = distilled(objective, gaussian, start, ONE_STEP, {"student": AdamW(2e-3, decay="linear")}, 600, batch=256)
    after = error_of(gaussian, student)
    assert after < 0.35 < before / 2  # 0.17 to 0.20 over three seeds, from 0.72
