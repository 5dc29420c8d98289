"""Neighbours on trajectories: what consistency methods compare, and the samplers they serve."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.models.denoiser import Cond, Predictor
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.parts.segments import two_jumps
from stepdistill.parts.times import OnGrid, Times
from stepdistill.sampling import Move, Renoise, Sampler, StepRule
from stepdistill.student import Student


def on_ode(nets: Nets, target: Predictor, solver: StepRule, batch: Batch, step: Step, n: int) -> tuple[Tensor, Tensor]:
    """Clean estimates at neighbours on the teacher's ODE: the batch's samples noised to a random point of an even grid,
    and one solver step further down.

    Args:
        nets: the student and the teacher.
        target: asked at the lower point; may be the student itself.
        solver: one step of the teacher's ODE.
        batch: real samples and their conditions.
        step: source of randomness.
        n: intervals of the grid over the whole range.

    Returns:
        Two estimates (B, ...): the student's with a graph, the target's without, which at t = 0 is the state itself.
    """
    schedule, eps = nets.student.schedule, step.randn(batch.shape)
    i = step.integers(n, len(batch)) + 1
    t, s = (i.double() / n) * schedule.t_max, ((i - 1).double() / n) * schedule.t_max

    x_t = schedule.add_noise(batch.x0, eps, t)
    return two_jumps(nets, target, solver, x_t, Move(t, s, batch.cond, step.rng), torch.zeros_like(t))


def same_noise(
    student: Predictor, target: Predictor, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """Clean estimates at two noise levels that one sample reaches with one noise.

    ``eps - x0`` is an unbiased guess of the direction of the ODE (arXiv:2303.01469 sec. 5), so this is a pair of
    neighbours without a teacher.

    Args:
        student: asked at t.
        target: asked at s; may be the student itself.
        x0: samples, (B, ...).
        eps: noise, (B, ...).
        t: upper times, (B,).
        s: lower times, (B,), 0 <= s < t.
        cond: conditions, each (B, ...).

    Returns:
        Two estimates (B, ...): the student's with a graph, the target's without and equal to ``x0`` where s is 0.
    """
    schedule = student.schedule
    with torch.no_grad():
        aim = target(schedule.add_noise(x0, eps, s), s, cond)
        aim = torch.where((s == 0).view(-1, *[1] * (x0.ndim - 1)), x0, aim)
    return student(schedule.add_noise(x0, eps, t), t, cond), aim


def times_and_own(times: Times, own: float, student: Student, n: int, step: Step) -> Tensor:
    """``n`` training times: of a law, or with probability ``own`` one of those at which the student will be called.

    Args:
        times: the law.
        own: a probability.
        student: carries its sampler.
        n: how many.
        step: source of randomness.

    Returns:
        (n,), in the time of the student's schedule, float64.
    """
    laws = [law(student.schedule, n, step) for law in (times, OnGrid(student.sampler.times))]
    return torch.where(step.rand(n) < own, laws[1], laws[0])


def refuse_jumps(method: str, sampler: Sampler) -> None:
    """A consistency function leads to the data and nowhere else, so whoever goes on from there adds noise.

    Raises:
        ValueError: if a sampler of several steps does anything else.
    """
    if sampler.steps > 1 and not isinstance(sampler.rule, Renoise):
        raise ValueError(f"sampler.rule {sampler.rule}: {method}'s student jumps to the data only; use Renoise()")


def refuse_off_grid(field: str, n: int, sampler: Sampler) -> None:
    """A student knows the points of an even grid of ``n`` intervals, which ``field`` holds.

    Raises:
        ValueError: if the sampler calls it elsewhere.
    """
    off = [t for t in sampler.times if abs(t * n - round(t * n)) > 1e-9]
    if off:
        raise ValueError(
            f"sampler.times {off[0]:g} is no point of the grid of {n} intervals; "
            f"let {field} be a multiple of the sampler's {sampler.steps} steps"
        )


def refuse_crowded(start: int, sampler: Sampler) -> None:
    """The sampler's times are ends of intervals from the first step on, when there are ``start`` of them.

    Raises:
        ValueError: if there are more times than that.
    """
    if sampler.steps > start:
        raise ValueError(
            f"objective.intervals.start {start} leaves no room for the sampler's {sampler.steps} times; let it be at "
            "least as many"
        )
