"""TwinFlow: a flow map whose negative times hold its own samples' flow, with RCGM. arXiv:2512.05150"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stepdistill.functional.distances import Barron
from stepdistill.models.denoiser import Cond, null_like, of_samples, unscaled
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.flow import CLOSEST, STRAIGHT, on_straight, only_jumps, start_state, start_time, straight
from stepdistill.parts.times import Times, Uniform
from stepdistill.sampling import Sampler, at


@register("twinflow", family="flowmap", paper="2512.05150")
@dataclass(frozen=True)
class TwinFlow(Objective):
    """Move the average velocity F from t to s onto what a short step along the flow and a walk of its running average
    make of it (RCGM), and one-step samples along the gap between the fake flow F(-t, -t) and the real one (sec. 3).

    Of every four samples one heads from noise to data, the next two a little and any way down; the fourth is its own,
    whose plain flow it learns at negative times: a critic within, as MDT's, but taught. There is no derivative.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})
    two_time = True

    velocity: Literal["data", "teacher"] = "data"
    """Where the flow's velocity comes from: noise and data, as in the paper, or the guided teacher."""
    guidance: float = 0.5
    """Of the running average's ``F(cond) - F(null)``, how much is added to the velocity from data; 0 adds nothing."""
    times: Times = field(default_factory=Uniform)
    """Where all but the first of four start, and where one-step samples are looked at."""
    rectify: float = 0.5
    """Weight of the term on one-step samples."""
    delta: float = 0.01
    """Length of the step along the flow."""
    hops: int = 2
    """Of the walk behind it."""
    near: float = 0.05
    """Largest share of t that the second of four goes down."""
    target_decay: float = 0.99
    """Of the running average."""
    c: float = 1e-3
    """Where losses turn from squared to linear, in units of the velocity."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, top in (("delta", 0.5), ("near", 1.0), ("target_decay", 1 - 1e-12), ("c", math.inf)):
            if not 0 < getattr(self, name) <= top:
                raise ValueError(f"objective.{name} must lie above 0 and at most at {top:g}; got {getattr(self, name)}")
        for name, least in (("hops", 1), ("rectify", 0), ("guidance", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"objective.{name} must be at least {least}; got {getattr(self, name)}")
        if self.velocity == "teacher" and self.guidance:
            raise ValueError("objective.guidance is mixed into data; under velocity 'teacher' set it 0")

    def check(self, sampler: Sampler) -> None:
        """The student jumps from time to time."""
        only_jumps(sampler)

    @property
    def guides(self) -> bool:  # type: ignore[override]
        """The teacher's guidance is in its velocity."""
        return self.velocity == "teacher"

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def averages(self) -> Mapping[str, float]:
        """Who walks."""
        return {"target": self.target_decay}

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """All in one evaluation, then the rectification of one in four."""
        f, schedule, n = straight(nets.student), nets.student.schedule, len(batch)
        ways, near, _, own = (step.rows(n, lambda g, k=k: g % 4 == k) for k in range(4))
        live = step.rows(n, lambda g: g % 4 != 3)
        top = start_time(schedule)
        eps, noise, again = (step.randn(batch.shape) for _ in range(3))
        t, share = on_straight(schedule, self.times(schedule, n, step)).clamp_min(CLOSEST), step.rand(n)
        level = on_straight(schedule, self.times(schedule, n, step)).clamp_min(CLOSEST)

        share[near] *= self.near
        s = (t * (1 - share)).clamp_min(CLOSEST)
        t[ways], s[ways], s[own] = top, 0.0, -t[own]
        x0 = batch.x0.clone()
        if len(rows := step.evaluated(own)):
            with torch.no_grad():
                z = noise[rows] * schedule.prior_std
                made = nets.student(z, at(schedule.t_max, z), of_samples(batch.cond, rows), s=at(0.0, z))
                x0[own] = made[: len(own)].to(x0)
        x_t = STRAIGHT.add_noise(x0, eps, t)
        x_t[ways] = start_state(schedule, eps[ways]).to(x_t)

        out = f(x_t, t, batch.cond, want="velocity", s=s)
        with torch.no_grad():
            target = eps - x0
            if len(rows := step.evaluated(live)):
                cond = of_samples(batch.cond, rows)
                v = self.flow(nets, target[rows], x_t[rows], t[rows], cond)
                target[live] = self.recursion(nets, out[rows], v, x_t[rows], t[rows], s[rows], cond)[: len(live)]
            weight = torch.where(s < 0, 1.0, ((1 - (t - s)) * math.pi / 2.5).tan() + 1).to(x_t)
        base = (weight * Barron(self.c)(out, target)).mean()
        if not self.rectify:
            return Loss(base)
        rectify = base.new_zeros(())
        if len(rows := step.evaluated(ways)):
            with torch.no_grad():
                x_s = STRAIGHT.add_noise(x_t[rows] - top * out[rows], again[rows], level[rows])
                cond, signed = of_samples(batch.cond, rows.repeat(2)), torch.cat([-level[rows], level[rows]])
                fake, real = f(torch.cat([x_s, x_s]), signed.abs(), cond, want="velocity", s=signed).chunk(2)
                aim = out[rows] - (fake - real).clamp(-1, 1)  # lowering F raises the sample
            rectify = Barron(self.c)(out[rows], aim)[: len(ways)].sum() * 4 / n
        return Loss(base + self.rectify * rectify, base=base, rectify=rectify)

    def flow(self, nets: Nets, v: Tensor, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity to follow: ``v`` from data, guided, or the teacher's; (B, ...)."""
        if self.velocity == "teacher":
            return straight(nets.teacher)(x_t, t, cond, want="velocity")
        if not self.guidance:
            return v
        target, null, cond = straight(nets.target), nets.teacher.null, unscaled(cond)
        if not cond or not null:
            raise ValueError(f"objective.guidance {self.guidance} needs conditions and a null one; set it 0")
        given, null = (target(x_t, t, c, want="velocity", s=t) for c in (cond, null_like(null, cond)))
        return v + self.guidance * (given - null)

    def recursion(self, nets: Nets, out: Tensor, v: Tensor, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """What ``out`` should be: RCGM's residual is taken off it, clipped; (B, ...)."""
        shape = (-1, *[1] * (x_t.ndim - 1))
        target, x = straight(nets.target), x_t - self.delta * v
        middle, walked = torch.maximum(t - self.delta, s), torch.zeros_like(x)
        length = (middle - s) / self.hops
        for k in range(self.hops):
            u = middle - k * length
            way = length.to(x).view(shape) * target(x, u, cond, want="velocity", s=(u - length).clamp_min(0))
            x, walked = x - way, walked + way
        residual = ((t - s).to(x).view(shape) * out - walked) / self.delta - v
        residual = torch.where((t < s + self.delta).view(shape), out - v, residual)
        return out - residual.clamp(-1, 1)
