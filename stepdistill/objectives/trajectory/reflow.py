"""Reflow: rectified flow on the teacher's noise-image pairs, trained better. arXiv:2405.20320 (arXiv:2209.03003)"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stepdistill.functional.distances import Distance, Huber
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Loss, Objective, Step, Turn, register
from stepdistill.parts.times import Times, UShaped
from stepdistill.sampling import Sampler, refuse_noise
from stepdistill.schedule import RectifiedFlow


@register("reflow", family="trajectory", paper="2405.20320")
@dataclass(frozen=True)
class Reflow(Objective):
    """Move the student's velocity onto ``noise - image`` of the teacher's own pairs, all along the straight line from
    one to the other (sec. 4; Liu et al., arXiv:2209.03003 eq. 1).

    The couples keep straight lines from crossing, so the learned flow is nearly straight and few steps follow it. KD
    regresses on the same pairs at the student's few times; this student has learned every time and serves any grid.
    One round is enough (sec. 3). ``times=Uniform(), distance=L2()`` is the original; ``perceptual=LPIPS()`` makes the
    paper's whole premetric, LPIPS-Huber, where there is a pretrained network to look at images with.

    The line is rectified flow's and the student keeps its own schedule: at equal signal-to-noise ratio the two are one
    state up to scale, with one clean estimate, so the student is called on its own path and a DDIM jump of it is
    Euler's step on the line, for any grid of its own times. Between a noisiest time that leaves a little signal
    (SD: alpha = 0.07) and pure noise the line goes on; all of that is trained at what sampling starts from, noise
    alone. Several DDIM steps then still count this start as holding signal; ``NoiseCorrected`` does not, and is exact.
    """

    needs = frozenset({"student"})
    data = frozenset({"path"})
    between_images = frozenset({"perceptual"})

    times: Times = field(default_factory=UShaped)
    """Where on the line, as rectified flow's time: 1 is the noise."""
    distance: Distance = field(default_factory=lambda: Huber(0.03))
    """Between the two velocities. The paper's c = 0.00054 d is this scale at its 32 x 32 pixels, in units of ours."""
    perceptual: Distance | None = None
    """Between the student's clean estimate and the image, besides: ``(1 - t) Huber / sqrt(d) + LPIPS / t`` for samples
    of d elements, the paper's best setting (config F) in the units of our Huber. None leaves the distance alone."""
    shortest: float = 1e-5
    """Times are kept this far from the ends, where a clean estimate says nothing of the velocity."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.shortest < 0.5:
            raise ValueError(f"objective.shortest must lie in (0, 0.5); got {self.shortest}")

    def check(self, sampler: Sampler) -> None:
        """Sampling starts from the pairs' noise and stays on their lines."""
        if sampler.times[0] != 1:
            raise ValueError(
                f"sampler.times starts at {sampler.times[0]:g}; reflow's pairs begin with pure noise, let it start at 1"
            )
        refuse_noise(sampler)

    def turns(self) -> tuple[Turn, ...]:
        """One update of the student."""
        return (Turn(self.student_loss, moves=("student",)),)

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """Regression of the velocity at one point of each pair's line."""
        schedule, line = nets.student.schedule, RectifiedFlow()
        start, image = batch.path[:, 0], batch.path[:, -1]
        noise = start / schedule.prior_std
        tau = self.times(line, len(batch), step).clamp(self.shortest, 1 - self.shortest).to(start.device)

        t = schedule.t_from_logsnr(line.logsnr(tau)).clamp(max=schedule.t_max)
        beyond = line.logsnr(tau) < schedule.logsnr(torch.full_like(t, schedule.t_max))
        column = (-1, *[1] * (start.ndim - 1))
        x_t = torch.where(beyond.view(column), start, schedule.add_noise(image, noise, t))
        x0 = nets.student(x_t, t, batch.cond)
        # points of the line are image + tau (noise - image), so the velocity of an estimate x0 is (point - x0) / tau
        velocity = noise - image + (image - x0) / tau.to(x0).view(column)
        loss = self.distance(velocity, noise - image)
        if self.perceptual is not None:
            tau = tau.to(loss)
            loss = (1 - tau) * loss / image[0].numel() ** 0.5 + self.perceptual(x0, image) / tau
        return Loss(loss.mean())
