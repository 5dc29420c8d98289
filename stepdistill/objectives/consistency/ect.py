"""ECT: easy consistency tuning, from a denoiser to a consistency model. arXiv:2406.14548"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.functional.distances import Distance, Huber
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.discretisation import noise_level, time_of
from stepdistill.parts.neighbours import refuse_jumps, same_noise, times_and_own
from stepdistill.parts.times import LogNormal, Times
from stepdistill.sampling import Sampler


@register("ect", family="consistency", paper="2406.14548")
@dataclass(frozen=True)
class ECT(Objective):
    """Move the student's clean estimate at t onto its own, without gradient, at a lower r(t), for the same sample and
    the same noise; r starts at the data and closes in on t stage by stage (sec. 3, alg. 1).

    At r = 0 this is plain denoising, which a pretrained network does already; so unlike iCT there is no grid, and the
    first targets are the data. Levels t and r are sigma / alpha, so they mean the same on every path.
    """

    needs = frozenset({"student"})
    guides = False
    data = frozenset({"x0"})
    between_images = frozenset({"distance"})

    times: Times = field(default_factory=lambda: LogNormal(-1.1, 2.0))
    """Law of t."""
    own: float = 0.1
    """Share of the batch at the student's own times instead, since a path may end beyond what a log-normal law reaches.
    Not in the paper, which begins at a level that its law still draws."""
    factor: float = 2.0
    """How much the gap between t and r shrinks from one stage to the next (q in the paper)."""
    stage_steps: int = 25_000
    """Length of a stage; the paper's is 25,000 updates of 128 samples, eight times."""
    k: float = 8.0
    """How much wider the gap is at low t: by ``1 + k sigmoid(-b t)``."""
    b: float = 1.0
    """How fast that ends."""
    sigma_max: float = 80.0
    """Higher levels count as this one; without a bound, times without any signal would have no weight."""
    distance: Distance = field(default_factory=Huber)
    """Between the two clean estimates; weighted by 1 / (t - r)."""

    smallest: float = 1e-3
    """The gap shrinks to this share of t and no further: beyond, rounding is all that is left of the difference."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.own <= 1:
            raise ValueError(
                f"objective.own must lie in (0, 1], so that the student's times are trained; got {self.own}"
            )
        if not self.factor > 1 or self.stage_steps < 1 or not self.k >= 0 or not self.b >= 0 or not self.sigma_max > 0:
            raise ValueError(
                "objective needs factor above 1, stage_steps at least 1, k and b at least 0, sigma_max above 0; got "
                f"{self.factor}, {self.stage_steps}, {self.k}, {self.b} and {self.sigma_max}"
            )

    def check(self, sampler: Sampler) -> None:
        """The student adds noise between its steps."""
        refuse_jumps("ECT", sampler)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def lower(self, level: Tensor, index: int) -> Tensor:
        """r(t) at step ``index``, from t to r in levels of sigma / alpha: ``0 <= r < t``."""
        gap = max(self.factor ** -(1 + index // self.stage_steps), self.smallest)
        return level * (1 - gap * (1 + self.k * torch.sigmoid(-self.b * level))).clamp_min(0.0)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Agreement across the gap."""
        student = nets.student
        eps = step.randn(batch.shape)
        t = times_and_own(self.times, self.own, student, len(batch), step)

        level = noise_level(student.schedule, t).clamp_max(self.sigma_max)
        lower = self.lower(level, step.index)
        x0, target = same_noise(student, student, batch.x0, eps, t, time_of(student.schedule, lower), batch.cond)
        return Loss(((1 / (level - lower)).to(x0) * self.distance(x0, target)).mean())
