"""TSCD against exact jumps, and a naive re-derivation of its loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepdistill.distill import distill
from stepdistill.export import load_student
from stepdistill.functional.ode import jump_target
from stepdistill.models.nets import Nets
from stepdistill.objective import Step
from stepdistill.objectives import TSCD
from stepdistill.parts.segments import Segments
from stepdistill.recipes import find
from stepdistill.sampling import Ddim, Sampler, Tcd, trailing
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained
from .test_cd import ExactOde, batch_of


class JumpsToEdge(nn.Module):
    """The clean estimate whose jump lands exactly where the ODE meets the lower edge of t's segment."""

    def __init__(self, teacher: GaussianTeacher, segments: int):
        super().__init__()
        self._teacher, self.segments = (teacher,), segments

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        (teacher,) = self._teacher
        edge = torch.tensor([(math.ceil(u * self.segments - 1e-9) - 1) / self.segments for u in t.tolist()])
        edge = edge.double().clamp_min(0)
        x_edge = teacher.flow_map(x_t, t, edge)
        c_t, c_e = teacher.schedule.coeffs(t, x_t), teacher.schedule.coeffs(edge, x_t)
        return torch.where(t[:, None] > edge[:, None], jump_target(x_t, x_edge, c_t, c_e), x_t)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_exact_jumps_to_the_edge_have_no_loss_under_the_exact_ode(gaussian: GaussianTeacher, count: int) -> None:
    student = Student(Sampler(trailing(count), Ddim()), JumpsToEdge(gaussian, count), gaussian.schedule, "x0")
    nets = Nets({"student": student, "target": student, "teacher": gaussian})
    tscd = TSCD(segments=Segments(count, 8), to_edge=1.0, solver=ExactOde())
    assert tscd.student_loss(nets, batch_of(gaussian, 256), Step.at(0)).total.item() < 1e-14
    wrong = TSCD(segments=Segments(8, 8), to_edge=1.0, solver=ExactOde())  # one solver step each: target is the state
    assert count == 8 or wrong.student_loss(nets, batch_of(gaussian, 256), Step.at(0)).total.item() > 1e-6


def test_the_loss_equals_a_loop_over_samples(gaussian: GaussianTeacher) -> None:
    """Times, edges, ends and both jumps written out for each sample with plain floats."""
    n, segments = 24, Segments(4, 16)
    student = exact_student(gaussian, Sampler(trailing(4), Ddim())).double()
    target = exact_student(gaussian, Sampler(trailing(4), Ddim())).double()
    with torch.no_grad():
        student.net.scale.fill_(0.9)
        target.net.shift.fill_(0.1)
    nets = Nets({"student": student, "target": target, "teacher": gaussian})
    batch = batch_of(gaussian, n)
    got = TSCD(segments=segments, to_edge=0.3).student_loss(nets, batch, Step.at(3)).total.item()

    step = Step.at(3)
    eps, i = step.randn((n, 2)), step.integers(16, n) + 1
    coin, share = step.rand(n), step.rand(n)
    expected = 0.0
    for k in range(n):
        t, s = i[k].item() / 16, (i[k].item() - 1) / 16
        low = math.floor(s * 4) / 4  # the segment that (s, t] lies in
        end = low + (0.0 if coin[k] < 0.3 else share[k].item()) * (s - low)
        a, b, e = (gaussian.schedule(torch.tensor([u], dtype=torch.float64)) for u in (t, s, end))
        x_t = a.alpha * batch.x0[k] + a.sigma * eps[k].double()
        tt, ss = (torch.tensor([u], dtype=torch.float64) for u in (t, s))
        x0 = gaussian(x_t[None], tt, {})[0]
        x_s = b.alpha * x0 + b.sigma * (x_t - a.alpha * x0) / a.sigma
        moved = student(x_t[None], tt, {})[0]
        moved = e.alpha * moved + e.sigma * (x_t - a.alpha * moved) / a.sigma
        aim = x_s
        if end < s:
            y = target(x_s[None], ss, {})[0]
            aim = e.alpha * y + e.sigma * (x_s - b.alpha * y) / b.sigma
        expected += (moved - aim).square().mean().item() / n
    assert got == pytest.approx(expected, rel=1e-6)


def test_a_target_at_its_own_end_is_the_solvers_state(gaussian: GaussianTeacher) -> None:
    """With as many segments as solver steps every end is s itself, so the target network has no say."""
    student = exact_student(gaussian, Sampler(trailing(8), Ddim())).double()
    nonsense = exact_student(gaussian, Sampler(trailing(8), Ddim())).double()
    with torch.no_grad():
        nonsense.net.scale.fill_(float("nan"))
    nets = Nets({"student": student, "target": nonsense, "teacher": gaussian})
    loss = TSCD(segments=Segments(8, 8)).student_loss(nets, batch_of(gaussian, 64), Step.at(0)).total
    assert torch.isfinite(loss)


def test_four_segments_beat_the_teachers_four_steps(gaussian: GaussianTeacher) -> None:
    """Four jumps of the student against four DDIM steps of the exact teacher, whose law is known in closed form."""
    optim = {"student": AdamW(2e-3, decay="linear")}
    sampler = Sampler(trailing(4), Ddim())
    objective = TSCD(segments=Segments(4, 16), to_edge=0.5)
    got = drawn(distilled(objective, gaussian, pretrained(gaussian), sampler, optim, 800))
    _, coarse = gaussian.ddim_law(trailing(4))
    exact = gaussian.cov
    error = (torch.cov(got.T) - exact.float()).norm() / exact.norm()
    assert error < 0.5 * (coarse - exact).norm() / exact.norm()
    assert (got.mean(0) - gaussian.mean).abs().max() < 0.06


# One student for several numbers of steps


def test_each_batch_is_that_of_one_of_the_cuts_and_all_get_their_turn(gaussian: GaussianTeacher) -> None:
    nets = Nets({"teacher": gaussian})
    for name, scale in (("student", 0.9), ("target", 1.1)):
        nets[name] = exact_student(gaussian, Sampler(trailing(4), Ddim())).double()
        nets[name].net.scale.data.fill_(scale)
    batch, unified, seen = batch_of(gaussian, 16), TSCD(segments=Segments(4, 8), also=(1, 2, 8)), []
    for index in range(24):
        step = Step.at(index)
        count = (4, 1, 2, 8)[step.integers(4, 1)]
        alone = TSCD(segments=Segments(count, 8)).student_loss(nets, batch, step).total
        assert torch.equal(unified.student_loss(nets, batch, Step.at(index)).total, alone)
        seen.append(count)
    assert set(seen) == {1, 2, 4, 8}


def test_the_student_knows_all_its_grids_and_no_other() -> None:
    unified, own = TSCD(segments=Segments(4, 16), also=(1, 2)), Sampler(trailing(4), Tcd(0.0))
    for steps in (1, 2, 4):
        unified.check(Sampler(trailing(steps), Tcd(0.0)))
    with pytest.raises(ValueError, match="are not the upper edges of 4 segments"):
        unified.check(Sampler(trailing(8), Tcd(0.0)))
    assert unified.serves(own) == tuple(Sampler(trailing(k), Tcd(0.0)) for k in (4, 1, 2))
    assert TSCD().serves(own) == (own,)


@pytest.mark.parametrize(("also", "said"), [((3,), "multiple of the segments"), ((2, 4), "other numbers than 4")])
def test_cuts_that_do_not_fit_are_refused(also: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TSCD(segments=Segments(4, 16), also=also)


def test_jumps_below_an_edge_need_a_cut_that_trains_them() -> None:
    sampler = Sampler(trailing(4), Tcd(0.3))
    with pytest.raises(ValueError, match="jumps below the next edge"):
        TSCD(Segments(4, 16)).check(sampler)
    TSCD(Segments(4, 16), also=(1,)).check(sampler)
    TSCD(Segments(1, 16)).check(Sampler(trailing(1), Tcd(0.3)))


def test_one_student_beats_the_teacher_at_each_number_of_steps(gaussian: GaussianTeacher) -> None:
    """Each of its grids against as many DDIM steps of the exact teacher, whose law is known in closed form. A student
    trained for four steps alone is off by 1.0 and 0.85 with one and two."""
    objective, sampler = TSCD(segments=Segments(4, 8), also=(1, 2), to_edge=0.5), Sampler(trailing(4), Ddim())
    optim = {"student": AdamW(2e-3, decay="linear")}
    student = distilled(objective, gaussian, pretrained(gaussian, 400), sampler, optim, 400, batch=256)
    student = Student(sampler, student.net, student.schedule, student.kind, serves=objective.serves(sampler))
    for k, bar in ((1, 0.75), (2, 0.5), (4, 0.17)):
        got, (_, coarse), exact = drawn(student.serving(k)), gaussian.ddim_law(trailing(k)), gaussian.cov
        error, far = (torch.cov(got.T) - exact).norm() / exact.norm(), (coarse - exact).norm() / exact.norm()
        assert error < bar < 0.8 * far
        assert (got.mean(0) - gaussian.mean).abs().max() < 0.02


def test_a_run_leaves_a_pipeline_for_each_number_of_steps(tmp_path: Path) -> None:
    recipe = find("digits_tscd_unified@4")
    done = distill(replace(recipe, run=replace(recipe.run, steps=2), evaluation=None), tmp_path)
    cond = {"class_labels": torch.arange(4)}
    for k, folder in ((1, "pipeline-1step"), (2, "pipeline-2step"), (4, "pipeline"), (8, "pipeline-8step")):
        read = load_student(tmp_path / folder)
        assert read.sampler.steps == k
        made = done.student.sample((4, 1, 8, 8), cond, steps=k)
        torch.testing.assert_close(read.sample((4, 1, 8, 8), cond), made, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"steps 3: this student was trained for 4 or 1 or 2 or 8 "):
        done.student.sample((4, 1, 8, 8), cond, steps=3)
    with pytest.raises(ValueError, match=r"steps 1: this student was trained for 2 "):
        load_student(tmp_path / "pipeline-2step").sample((4, 1, 8, 8), cond, steps=1)
