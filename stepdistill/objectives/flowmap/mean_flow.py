"""MeanFlow: the average velocity between two times. arXiv:2505.13447"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stepdistill.functional.distances import AdaptiveL2, Distance
from stepdistill.models.denoiser import Cond, null_like, of_samples, unscaled, with_null
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.flow import CLOSEST, STRAIGHT, on_straight, only_jumps, start_time, straight
from stepdistill.parts.tangents import Jvp, Tangent
from stepdistill.parts.times import LogNormal, Times
from stepdistill.sampling import Sampler
from stepdistill.student import Student


@register("mean_flow", family="flowmap", paper="2505.13447")
@dataclass(frozen=True)
class MeanFlow(Objective):
    """Move the student's average velocity u from t to s onto ``v - (t - s) du/dt``, the identity that the true average
    keeps along its trajectory (eq. 6, alg. 1).

    With s = t this is flow matching, and u is a velocity; with s = 0 a step of u is the sample. From data v is
    ``eps - x0``, and guidance is mixed into it by the student's own predictions; in distillation v is the guided
    teacher's velocity, which is less noisy. There is no target network: the derivative is the current student's.
    """

    needs = frozenset({"student", "teacher"})
    data = frozenset({"x0"})
    two_time = True

    velocity: Literal["data", "teacher"] = "data"
    """Where v comes from: noise and data, as in the paper, or the teacher."""
    times: Times = field(default_factory=lambda: LogNormal(-0.4, 1.0))
    """Of two draws the larger is t and the smaller s. The default is logit-normal on the straight path."""
    unequal: float = 0.25
    """Share of the batch whose s is not t. Distillation takes 1."""
    to_grid: float = 0.0
    """Share of those that head for the next time of the student's own grid instead; 0 is the paper."""
    omega: float = 1.0
    """Share of v itself in the guided velocity ``omega v + kappa u(cond) + (1 - omega - kappa) u(null)`` (eq. 20), from
    data only; the guidance scale is ``omega / (1 - kappa)``."""
    kappa: float = 0.0
    """Share of the student's conditional prediction in it."""
    mix_until: float = 1.0
    """Latest time at which velocities are mixed, on the straight path."""
    drop: float = 0.1
    """Share of conditions that are dropped where velocities are mixed; these samples keep v as it is."""
    tangent: Tangent = field(default_factory=Jvp)
    """How du/dt is taken."""
    tangent_warmup: int = 0
    """Steps over which du/dt comes in."""
    distance: Distance = field(default_factory=AdaptiveL2)
    """Between the average velocity and its target."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("unequal", "to_grid", "mix_until", "drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name} must lie in [0, 1]; got {getattr(self, name)}")
        if not self.omega > 0 or not 0 <= self.kappa < 1:
            raise ValueError(f"objective needs omega > 0 and 0 <= kappa < 1; got {self.omega} and {self.kappa}")
        if self.mixes and self.velocity == "teacher":
            raise ValueError("objective.omega and kappa mix guidance into data; a teacher has teacher.guidance")

    @property
    def mixes(self) -> bool:
        """Whether guidance is mixed into the velocity."""
        return (self.omega, self.kappa) != (1.0, 0.0)

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

    def draw(self, student: Student, n: int, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Times t and s (n,) on the straight path, and the indices of the samples whose s is below t."""
        schedule = student.schedule
        pair = torch.stack([self.times(schedule, n, step), self.times(schedule, n, step)])
        low, high = pair.amin(0), pair.amax(0)
        edge = torch.where(step.rand(n) < self.to_grid, student.next_time(high), low)
        # a little off both ends, where another path's derivatives would be lost
        t = on_straight(schedule, high).clamp(CLOSEST, start_time(schedule) - 1e-6)
        s = torch.minimum(on_straight(schedule, edge), t)
        apart = step.rows(n, lambda number: round(number * self.unequal, 9) % 1 < self.unequal)  # evenly spread
        return t, t.index_copy(0, apart, s[apart]), apart

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Regression onto the identity's right-hand side."""
        u, n = straight(nets.student), len(batch)
        eps = step.randn(batch.shape)
        t, s, apart = self.draw(nets.student, n, step)
        dropped = step.rand(n) < self.drop

        x_t = STRAIGHT.add_noise(batch.x0, eps, t)
        cond = with_null(batch.cond, nets.teacher.null, dropped) if self.mixes and self.drop else batch.cond
        with torch.no_grad():
            v = eps - batch.x0
            if self.velocity == "teacher":
                v = straight(nets.teacher)(x_t, t, cond, want="velocity")
            if self.mixes:
                plain = dropped | (t > self.mix_until)
                v = torch.where(_like(plain, v), v, self.mixed(nets, v, x_t, t, cond))
        target = v.clone()
        if len(rows := step.evaluated(apart)):
            part, heading, along = of_samples(cond, rows), s[rows], v[rows]

            def average(x: Tensor, t: Tensor) -> Tensor:
                return u(x, t, part, want="velocity", s=heading)

            # differences look neither below s nor beyond the start: shorter, or further back along the trajectory
            gap, reach = t[rows] - heading, self.tangent.reach
            length = gap.clamp_min(max(2 * reach, 1e-9))
            share = gap / length
            back = (t[rows] + share * reach - start_time(nets.student.schedule) + 1e-6).clamp_min(0)
            at = x_t[rows] - _like(back, v) * along, t[rows] - back
            slope = self.tangent(average, at, (_like(share, v) * along, share))
            warm = min(1.0, (step.index + 1) / max(self.tangent_warmup, 1))
            target[apart] -= (warm * _like(length, v) * slope)[: len(apart)]
        return Loss(self.distance(u(x_t, t, cond, want="velocity", s=s), target).mean())

    def mixed(self, nets: Nets, v: Tensor, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The guided velocity, (B, ...)."""
        u = straight(nets.student)
        if not unscaled(cond) or not nets.teacher.null:
            raise ValueError("objective.omega and kappa need conditions and a null one; leave them 1 and 0")
        null = null_like(nets.teacher.null, unscaled(cond))
        v = self.omega * v + (1 - self.omega - self.kappa) * u(x_t, t, null, want="velocity", s=t)
        return v + self.kappa * u(x_t, t, cond, want="velocity", s=t) if self.kappa else v


def _like(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, (B,), shaped to multiply ``x`` (B, ...)."""
    values = values if values.dtype == torch.bool else values.to(x)
    return values.view(-1, *[1] * (x.ndim - 1))
