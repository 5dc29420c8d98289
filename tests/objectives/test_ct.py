"""CT against its exact fixed point, a loop over samples, and the exact consistency function."""

from __future__ import annotations

import pytest
import torch

from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import CT
from stepdistill.parts.discretisation import Doubling, Even, Karras
from stepdistill.sampling import Ddim, Renoise, Sampler, trailing
from stepdistill.schedule import RectifiedFlow
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student
from stepdistill.trainer import AdamW

from .conftest import distilled, pretrained
from .test_cd import PerTime, batch_of, error_of

ONE_STEP = Sampler(trailing(1), Renoise())


def test_the_loss_equals_a_loop_over_samples(gaussian: GaussianTeacher) -> None:
    student, target = (exact_student(gaussian, ONE_STEP).double() for _ in range(2))
    with torch.no_grad():
        student.net.scale.fill_(0.9)
        target.net.shift.fill_(0.1)
    batch = batch_of(gaussian, 32)
    nets = Nets({"student": student, "target": target})
    got = CT(intervals=Doubling(2, 8, 30), spacing=Even()).student_loss(nets, batch, Step.at(12)).total.item()

    step = Step.at(12)  # second of three stages: four intervals
    eps, i = step.randn((32, 2)).double(), step.integers(4, 32)
    expected = 0.0
    for k in range(32):
        t, s = (torch.tensor([(i[k].item() + j) / 4], dtype=torch.float64) for j in (1, 0))
        a, b = gaussian.schedule(t), gaussian.schedule(s)
        moved = 0.9 * gaussian.consistency((a.alpha * batch.x0[k] + a.sigma * eps[k])[None], t)[0]
        aim = gaussian.consistency((b.alpha * batch.x0[k] + b.sigma * eps[k])[None], s)[0] + 0.1
        if s == 0:
            aim = batch.x0[k]
        expected += (moved - aim).square().mean().item() / 32
    assert got == pytest.approx(expected, rel=1e-9)
    assert (i == 0).any()  # so the boundary was met


def test_its_fixed_point_on_a_gaussian_is_that_of_cd_with_euler_steps() -> None:
    """An affine target at the mean of all neighbours is the mean of the targets, and DDIM goes to that mean. So the
    gradient vanishes at the products of DDIM's contractions, and not at the exact map."""
    n, mean, variance = 4, 0.7, 0.36
    teacher = GaussianTeacher(torch.tensor([mean]), torch.tensor([[variance]]), RectifiedFlow())
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    euler = teacher.ddim_contraction(t, t - 1 / n)[:, 0].cumprod(0)
    exact = (variance / ((1 - t) ** 2 * variance + t**2)).sqrt()
    gradients = {}
    x0 = teacher.sample(400_000, torch.Generator().manual_seed(3), dtype=torch.float64)
    for name, slope in (("euler", euler), ("exact", exact)):
        net = PerTime(n).double()
        with torch.no_grad():
            net.slope[1:, 0], net.offset[1:, 0] = slope, mean - slope * (1 - t) * mean
        student = Student(ONE_STEP, net, teacher.schedule, "x0")
        nets = Nets({"student": student, "target": student})
        ct = CT(intervals=Doubling(n, n, 1), spacing=Even())
        ct.student_loss(nets, Batch({}, x0.shape, x0=x0), Step.at(0)).total.backward()
        gradients[name] = net.slope.grad[1:, 0]
    assert gradients["euler"].abs().max() < 1.5e-3
    assert gradients["exact"].abs().max() > 6e-3


def test_no_teacher_is_needed_and_nothing_flows_through_the_target(gaussian: GaussianTeacher) -> None:
    assert CT().needs == {"student"} and CT().data == {"x0"} and CT(target_decay=0.5).averages() == {"target": 0.5}
    student, target = exact_student(gaussian, ONE_STEP).double(), exact_student(gaussian, ONE_STEP).double()
    loss = CT().student_loss(Nets({"student": student, "target": target}), batch_of(gaussian, 16), Step.at(0))
    loss.total.backward()
    assert student.net.scale.grad is not None and target.net.scale.grad is None


def test_a_student_that_would_be_called_off_its_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"intervals.start 2 leaves no room for the sampler's 4 times"):
        CT(intervals=Doubling(2, 64, 100)).check(Sampler(trailing(4), Renoise()))
    with pytest.raises(ValueError, match="CT's student jumps to the data only"):
        CT().check(Sampler(trailing(2), Ddim()))
    with pytest.raises(ValueError, match=r"target_decay must lie in \[0, 1\); got 1"):
        CT(target_decay=1.0)
    CT(intervals=Doubling(4, 64, 100)).check(Sampler(trailing(4), Renoise()))


def test_training_on_data_alone_reaches_the_exact_ode_map(gaussian: GaussianTeacher) -> None:
    start = pretrained(gaussian, 400)
    before = error_of(gaussian, Student(ONE_STEP, start.net, start.schedule, start.kind))
    objective = CT(intervals=Doubling(4, 32, 400), spacing=Karras(0.02, 160.0))
    student = distilled(objective, gaussian, start, ONE_STEP, {"student": AdamW(2e-3, decay="linear")}, 600, batch=256)
    after = error_of(gaussian, student)
    assert after < 0.3 < before / 2  # 0.15 to 0.16 over three seeds, from 0.72
