"""KD against the exact ODE map."""

from __future__ import annotations

import pytest
import torch

from stepdistill.functional.distances import L2
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import KD
from stepdistill.sampling import Ddim, Sampler, at, trailing
from stepdistill.testing import GaussianTeacher, exact_student
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained


def exact_path(teacher: GaussianTeacher, noise: torch.Tensor, times: tuple[float, ...]) -> torch.Tensor:
    """The exact ODE's states at ``times`` and at 0, (B, K + 1, D)."""
    t0 = at(times[0], noise)
    return torch.stack([teacher.flow_map(noise, t0, at(s, noise)) for s in (*times, 0.0)], 1)


def test_a_student_that_is_the_exact_map_has_no_loss(gaussian: GaussianTeacher) -> None:
    student = exact_student(gaussian, Sampler(trailing(1), Ddim()))
    noise = torch.randn(64, 2, dtype=torch.float64)
    nets = Nets({"student": student.double()})
    batch = Batch({}, (64, 2), path=exact_path(gaussian, noise, trailing(1)))
    assert KD().student_loss(nets, batch, Step.at(0)).total.item() < 1e-20


@pytest.mark.parametrize("steps", [1, 4])
def test_the_loss_equals_a_loop_over_samples(gaussian: GaussianTeacher, steps: int) -> None:
    """The regression target is the clean estimate whose DDIM step lands on the next state, written out by hand."""
    times = trailing(steps)
    student = exact_student(gaussian, Sampler(times, Ddim())).double()
    with torch.no_grad():
        student.net.scale.fill_(0.8)
    noise = torch.randn(32, 2, dtype=torch.float64)
    path = exact_path(gaussian, noise, times)
    loss = KD(distance=L2()).student_loss(Nets({"student": student}), Batch({}, (32, 2), path=path), Step.at(5))

    intervals = Step.at(5).integers(steps, 32)
    grid = (*times, 0.0)
    expected = 0.0
    for i, j in enumerate(intervals.tolist()):
        t, s = (torch.tensor([grid[k]], dtype=torch.float64) for k in (j, j + 1))
        c_t, c_s = gaussian.schedule(t), gaussian.schedule(s)
        x_t, x_s = path[i, j], path[i, j + 1]
        # x_s = alpha_s x0 + sigma_s (x_t - alpha_t x0) / sigma_t, solved for x0
        x0 = (x_s - c_s.sigma / c_t.sigma * x_t) / (c_s.alpha - c_s.sigma / c_t.sigma * c_t.alpha)
        expected += (student(x_t[None], t, {}) - x0).square().mean().item() / 32
    assert loss.total.item() == pytest.approx(expected, rel=1e-9)


def test_one_step_regression_reaches_the_exact_ode_map(gaussian: GaussianTeacher) -> None:
    def pairs(step: Step) -> Batch:
        return Batch({}, (512, 2), path=exact_path(gaussian, step.randn((512, 2)), trailing(1)))

    optim = {"student": AdamW(2e-3, decay="linear")}
    start = pretrained(gaussian)
    student = distilled(KD(), gaussian, start, Sampler(trailing(1), Ddim()), optim, 500, data=pairs)
    noise = torch.randn(2000, 2)
    exact = gaussian.consistency(noise, at(1.0, noise))
    with torch.no_grad():
        error = (student(noise, at(1.0, noise), {}) - exact).square().mean().sqrt()
    assert error < 0.04
    assert drawn(student).std(0).allclose(gaussian.cov.diagonal().sqrt().float(), rtol=0.06)


def test_shuffled_pairs_lead_to_the_data_mean(gaussian: GaussianTeacher) -> None:
    """The blurry failure: without the coupling the optimum is a constant."""

    def unpaired(step: Step) -> Batch:
        noise = step.randn((512, 2))
        return Batch({}, (512, 2), path=torch.stack([noise, gaussian.sample(512, step.rng)], 1))

    optim = {"student": AdamW(2e-3, decay="linear")}
    start = pretrained(gaussian, 200)
    student = distilled(KD(), gaussian, start, Sampler(trailing(1), Ddim()), optim, 300, data=unpaired)
    got = drawn(student, 2000)
    assert got.std(0).max() < 0.25
    torch.testing.assert_close(got.mean(0), gaussian.mean.float(), atol=0.06, rtol=0)
