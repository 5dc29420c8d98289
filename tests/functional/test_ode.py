"""The jump and its inverse: identities that hold on every path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from stepdistill.functional.ode import jump, jump_target
from stepdistill.schedule import EDM, RectifiedFlow, Schedule

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_jump_keeps_the_noise_that_its_estimate_implies(schedule: Schedule, interior: Tensor) -> None:
    x0, eps = draw(9, 2, 3), draw(9, 2, 3)
    for share in (0.0, 0.4, 1.0, 1.01):  # also to the data, to itself and upwards
        c_t, c_s = schedule.coeffs(interior, x0), schedule.coeffs(interior * share, x0)
        jumped = jump(c_t.alpha * x0 + c_t.sigma * eps, x0, c_t, c_s)
        assert_close(jumped, c_s.alpha * x0 + c_s.sigma * eps, **TIGHT)


def test_a_jump_nowhere_is_the_identity_and_to_the_data_is_the_estimate(schedule: Schedule, interior: Tensor) -> None:
    x_t, x0 = draw(9, 4), draw(9, 4)
    c_t = schedule.coeffs(interior, x_t)
    assert_close(jump(x_t, x0, c_t, c_t), x_t, rtol=0, atol=0)
    assert_close(jump(x_t, x0, c_t, schedule.coeffs(0 * interior, x_t)), x0, rtol=0, atol=0)


def test_jumps_with_one_estimate_compose(schedule: Schedule, interior: Tensor) -> None:
    x_t, x0 = draw(9, 4), draw(9, 4)
    c = [schedule.coeffs(interior * share, x_t) for share in (1.0, 0.6, 0.2)]
    assert_close(jump(jump(x_t, x0, c[0], c[1]), x0, c[1], c[2]), jump(x_t, x0, c[0], c[2]), **TIGHT)


def test_a_jump_is_an_euler_step_of_the_velocity_on_flow_and_edm_paths() -> None:
    for schedule in (RectifiedFlow(), EDM()):
        x_t, x0 = draw(3, 2), draw(3, 2)
        t, s = (torch.tensor(u, dtype=torch.float64) * schedule.t_max for u in ([0.9, 0.5, 0.3], [0.8, 0.1, 0.0]))
        c_t = schedule.coeffs(t, x_t)
        velocity = c_t.dalpha * x0 + c_t.dsigma * (x_t - c_t.alpha * x0) / c_t.sigma
        euler = x_t + (s - t)[:, None] * velocity
        assert_close(jump(x_t, x0, c_t, schedule.coeffs(s, x_t)), euler, **TIGHT)


def test_a_jump_onto_its_target_lands_there(schedule: Schedule, interior: Tensor) -> None:
    x_t, x_s, x0 = draw(9, 4), draw(9, 4), draw(9, 4)
    for share in (0.0, 0.5, 0.95):
        c_t, c_s = schedule.coeffs(interior, x_t), schedule.coeffs(interior * share, x_t)
        assert_close(jump(x_t, jump_target(x_t, x_s, c_t, c_s), c_t, c_s), x_s, **TIGHT)
        assert_close(jump_target(x_t, jump(x_t, x0, c_t, c_s), c_t, c_s), x0, **TIGHT)
    assert_close(jump_target(x_t, x_s, c_t, schedule.coeffs(0 * interior, x_t)), x_s, rtol=0, atol=0)


def test_progressive_distillations_target_follows_its_paper() -> None:
    """Salimans and Ho, appendix G: x0 = (z'' - (s''/s) z) / (a'' - (s''/s) a), two DDIM steps folded into one."""
    schedule = RectifiedFlow()
    x_t, first, second = draw(5, 2), draw(5, 2), draw(5, 2)  # a state and the teacher's two estimates
    c = [schedule.coeffs(torch.full((5,), t, dtype=torch.float64), x_t) for t in (0.8, 0.6, 0.4)]
    x_mid = c[1].alpha * first + c[1].sigma / c[0].sigma * (x_t - c[0].alpha * first)
    x_end = c[2].alpha * second + c[2].sigma / c[1].sigma * (x_mid - c[1].alpha * second)
    ratio = c[2].sigma / c[0].sigma
    assert_close(
        jump_target(x_t, x_end, c[0], c[2]), (x_end - ratio * x_t) / (c[2].alpha - ratio * c[0].alpha), **TIGHT
    )
    agreed = jump(jump(x_t, first, c[0], c[1]), first, c[1], c[2])
    assert_close(jump_target(x_t, agreed, c[0], c[2]), first, **TIGHT)
