"""Neighbours on trajectories: what consistency methods without a solver compare, and the samplers they serve."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.models.denoiser import Cond, Predictor
from stepdistill.objective import Step
from stepdistill.parts.times import OnGrid, Times
from stepdistill.sampling import Renoise, Sampler
from stepdistill.student import Student


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
