"""Networks that are preconditioned by ``sigma_data``: EDM's (arXiv:2206.00364) and consistency models (2303.01469).

Their schedulers scale what the network is given and mix what it answers with the sample, so that its own output is of
no kind. Here that happens in the call, whose answer is the clean sample on the path ``x0 + sigma eps``.
"""

from __future__ import annotations

from dataclasses import replace

from diffusers import (
    CMStochasticIterativeScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
)
from torch import Tensor, nn

from stepdistill.models.denoiser import Call, Cond
from stepdistill.models.families.base import add_family
from stepdistill.models.families.unet2d import UNET2D
from stepdistill.schedule import KarrasEDM, Kind

_SIGNS = {"epsilon": 1.0, "v_prediction": -1.0}


def is_edm(scheduler: SchedulerMixin) -> bool:
    """Whether it preconditions the network."""
    return isinstance(scheduler, EDMEulerScheduler | EDMDPMSolverMultistepScheduler | CMStochasticIterativeScheduler)


def edm_schedule(scheduler: SchedulerMixin) -> KarrasEDM:
    """Its path, up to its ``sigma_max``."""
    config = scheduler.config
    schedule = KarrasEDM(config.sigma_max, config.sigma_min, config.rho)
    schedule.prior_std = float(scheduler.init_noise_sigma)  # of EDM's two, sqrt(sigma_max^2 + 1)
    return schedule


def clean(scheduler: SchedulerMixin) -> Kind:
    """What a preconditioned call answers with."""
    return "x0"


def preconditioned(scheduler: SchedulerMixin, net_call: Call) -> Call:
    """The call that answers with clean samples.

    Args:
        scheduler: an EDM or consistency scheduler.
        net_call: calls the bare network: (net, scaled sample (B, ...), its noise level as it is told (B,), cond).

    Raises:
        ValueError: for an unknown prediction type.
    """
    config = scheduler.config
    if config.get("prediction_type", "epsilon") not in _SIGNS:
        name = type(scheduler).__name__
        raise ValueError(f"prediction_type {config.prediction_type!r} of {name} is none of {', '.join(_SIGNS)}")
    sign, data = _SIGNS[config.get("prediction_type", "epsilon")], config.sigma_data
    consistency = isinstance(scheduler, CMStochasticIterativeScheduler)
    path = edm_schedule(scheduler)
    # a consistency model is the identity at sigma_min and is nothing below
    start, floor, told = (config.sigma_min, config.sigma_min, 250.0) if consistency else (0.0, 1e-8, 0.25)

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        sigma = path(t).sigma.clamp_min(floor)
        width = (sigma**2 + data**2).sqrt()
        c_skip, c_out = data**2 / ((sigma - start) ** 2 + data**2), sign * data * (sigma - start) / width
        skip, out, scale = (c.to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1)) for c in (c_skip, c_out, 1 / width))
        return skip * x_t + out * net_call(net, scale * x_t, (told * sigma.log()).to(x_t.dtype), cond)

    return call


def _net_call(net: nn.Module, x: Tensor, told: Tensor, cond: Cond) -> Tensor:
    return net(x, told, class_labels=cond.get("class_labels"), return_dict=False)[0]


EDM_UNET = add_family(
    replace(
        UNET2D,
        name="edm",
        serves=lambda net, scheduler: is_edm(scheduler),
        schedule=edm_schedule,
        kind=clean,
        call=lambda scheduler: preconditioned(scheduler, _net_call),
    )
)
