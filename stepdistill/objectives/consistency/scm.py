"""sCM: continuous-time consistency in TrigFlow, with a teacher (sCD) or on data alone (sCT). arXiv:2410.11081"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Denoiser, Rescheduled
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.neighbours import refuse_jumps, times_and_own
from stepdistill.parts.tangents import CentralDifference, Jvp, Tangent
from stepdistill.parts.times import LogNormal, Times
from stepdistill.sampling import Sampler
from stepdistill.schedule import TrigFlow


class LogVariance(nn.Module):
    """A learned function of time, (B,) -> (B,), zero at the start."""

    def __init__(self, waves: int = 8):
        super().__init__()
        self.waves = waves
        self.linear = nn.Linear(2 * waves, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        phases = t[:, None] * torch.arange(1, self.waves + 1, device=t.device)
        return self.linear(torch.cat([phases.cos(), phases.sin()], 1).to(self.linear.weight))[:, 0]


@register("scm", family="consistency", paper="2410.11081")
@dataclass(frozen=True)
class SCM(Objective):
    """Move the student's output F along the derivative of its clean estimate f down the ODE, until f stands still: the
    limit of CD for a grid without end (alg. 1).

    Student and teacher are seen on TrigFlow, ``x_t = cos(t) x0 + sin(t) z`` and ``f = cos(t) x_t - sin(t) F``. With
    ``g = df/dt = -cos(t) (F - dx/dt) - sin(t) (x_t + dF/dt)``, its second part phased in, the target is
    ``F + g / (|g| + c)``. The paper puts cos(t) before g; at pure noise that is 0, and with it a flow student's first
    step would never be trained, so here c is compared with g itself.
    """

    optional = frozenset({"weighting"})
    data = frozenset({"x0"})

    distil: bool = True
    """Along the teacher's ODE (sCD); false takes the direction from each sample to its noise (sCT)."""
    times: Times = field(default_factory=lambda: LogNormal(-1.0, 1.4))
    """Law of the noise levels."""
    own: float = 0.1
    """Share of the batch at the student's own times instead, since a path may end beyond what a log-normal law reaches.
    Not in the paper, which begins at a level that its law still draws."""
    sigma_data: float = 0.5
    """Standard deviation of the data, TrigFlow's own scale."""
    tangent: Tangent = field(default_factory=Jvp)
    """How df/dt is taken. ``CentralDifference.h`` counts in TrigFlow's time at pure noise, and shrinks with sin(t)."""
    lag: float = 0.05
    """How far below t it is taken, counted as h. The paper's is 0; but values of f travel up from the data, and updates
    are steadier where they look to where f comes from, as upwind differences are."""
    warmup: int = 10_000
    """Steps over which the second part of the tangent is phased in; before, F regresses on dx/dt (H in the paper)."""
    floor: float = 0.1
    """Below this norm the tangent is not blown up to unit length (c in the paper)."""
    adaptive: bool = False
    """Learn a weight for each time, by ``optim.weighting``; normalised tangents are nearly equal in size already."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.own <= 1:
            raise ValueError(
                f"objective.own must lie in (0, 1], so that the student's times are trained; got {self.own}"
            )
        reach = self.tangent.h if isinstance(self.tangent, CentralDifference) else 0.0
        if not max(reach, 1e-6) <= self.lag < 1:
            raise ValueError(
                f"objective.lag must be below 1 and at least the tangent's h, {reach:g}, so that no difference looks "
                f"above t; got {self.lag}"
            )
        if not self.sigma_data > 0 or not self.floor > 0 or self.warmup < 0:
            raise ValueError(
                f"objective needs sigma_data and floor above 0 and warmup at least 0; got {self.sigma_data}, "
                f"{self.floor} and {self.warmup}"
            )

    def check(self, sampler: Sampler) -> None:
        """The student adds noise between its steps."""
        refuse_jumps("sCM", sampler)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The teacher for its ODE; on data alone the student merely starts from it."""
        return frozenset({"student", "teacher"}) if self.distil else frozenset({"student"})

    @property
    def guides(self) -> bool:  # type: ignore[override]
        """The teacher's guidance is in its velocity."""
        return self.distil

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student, and of the weighting if there is one."""
        return (Turn(self.student_loss, moves=("student", "weighting") if self.adaptive else ("student",)),)

    def extras(self, student: Denoiser) -> dict[str, nn.Module]:
        """The learned weighting."""
        return {"weighting": LogVariance()} if self.adaptive else {}

    def tangents(self, nets: Nets, batch: Batch, eps: Tensor, t: Tensor, ramp: float) -> Tensor:
        """``g`` for samples noised to TrigFlow times ``t``, (B, ...)."""
        trig = TrigFlow(self.sigma_data)
        student, t = Rescheduled(nets.student, trig), t - self.lag * t.sin()
        c, x_t = trig.coeffs(t, eps), trig.add_noise(batch.x0, eps, t)
        sin, dx = c.sigma / self.sigma_data, c.dalpha * batch.x0 + c.dsigma * eps
        if self.distil:
            dx = Rescheduled(nets.teacher, trig)(x_t, t, batch.cond, want="velocity")

        def f(x_t: Tensor, t: Tensor) -> Tensor:
            return student(x_t, t, batch.cond)

        df = self.tangent(f, (x_t, t), (sin * dx, t.sin())) / sin
        if ramp == 1:
            return df
        return ramp * df + (1 - ramp) * c.alpha * (dx - student(x_t, t, batch.cond, want="velocity"))

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Standing still along the ODE."""
        eps = step.randn(batch.shape)
        time = times_and_own(self.times, self.own, nets.student, len(batch), step)

        trig = TrigFlow(self.sigma_data)
        t = trig.t_from_logsnr(nets.student.schedule.logsnr(time)).clamp_min(1e-4)  # F of an x0 divides by sin(t)
        x_t = trig.add_noise(batch.x0, eps, t)
        velocity = Rescheduled(nets.student, trig)(x_t, t, batch.cond, want="velocity")
        with torch.no_grad():
            g = self.tangents(nets, batch, eps, t, min(1.0, step.index / max(self.warmup, 1)))
            norm = g.flatten(1).norm(dim=1).view(-1, *[1] * (g.ndim - 1))
            target = velocity / self.sigma_data + g / (norm + self.floor)
        loss = (velocity / self.sigma_data - target).flatten(1).square().mean(1)
        if self.adaptive:
            w = nets.weighting(t)
            loss = loss * torch.exp(-w) + w
        return Loss(loss.mean(), tangent=norm.mean())
