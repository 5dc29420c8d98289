"""The straight path, on which average velocities live, for networks of any other.

States of equal signal-to-noise ratio are one state up to scale, and a jump is a jump on every path. So a method that is
written for rectified flow reads as its paper does, and trains students of eps, v and flow teachers alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.models.denoiser import Predictor, Rescheduled
from stepdistill.sampling import Ddim, Renoise, Sampler, Tcd
from stepdistill.schedule import RectifiedFlow, Schedule

STRAIGHT = RectifiedFlow()
"""``x_t = (1 - t) x0 + t eps``."""
CLOSEST = 1e-3
"""Times below which the velocity that a predicted sample amounts to, ``(x_t - x0) / t``, loses its digits."""


def straight(predict: Predictor) -> Predictor:
    """A predictor as seen on the straight path; asked for the velocity, it answers with ``eps - x0``."""
    return predict if isinstance(predict.schedule, RectifiedFlow) else Rescheduled(predict, STRAIGHT)


def on_straight(schedule: Schedule, t: Tensor) -> Tensor:
    """Times (B,) of ``schedule`` as times of the straight path, at equal signal-to-noise ratio; float64."""
    return STRAIGHT.t_from_logsnr(schedule.logsnr(t))


def start_time(schedule: Schedule) -> float:
    """Where on the straight path sampling on ``schedule`` starts: 1, or a little less if some signal is left there."""
    return float(on_straight(schedule, torch.tensor([schedule.t_max], dtype=torch.float64)))


def start_state(schedule: Schedule, noise: Tensor) -> Tensor:
    """The state on the straight path that sampling starts from; ``noise`` standard normal, (B, ...)."""
    c = schedule(torch.tensor([schedule.t_max], dtype=torch.float64))
    return noise * float(schedule.prior_std / (c.alpha + c.sigma))


def only_jumps(sampler: Sampler) -> None:
    """A flow map knows where it jumps, and no slopes: rules that average those of several times are not for it.

    Raises:
        ValueError: if the sampler's is one.
    """
    if not isinstance(sampler.rule, Ddim | Renoise | Tcd):
        raise ValueError(f"sampler.rule {sampler.rule}: a flow map is sampled by its jumps; use Ddim() or Renoise()")
