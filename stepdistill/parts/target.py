"""The target network: whose estimate the student is moved onto, its running average or itself."""

from __future__ import annotations

from collections.abc import Mapping

from stepdistill.models.denoiser import Predictor
from stepdistill.models.nets import Nets


def check_decay(decay: float | None) -> None:
    """Check an objective's ``target_decay``.

    Raises:
        ValueError: unless it lies in [0, 1), or is None.
    """
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"objective.target_decay must lie in [0, 1); got {decay}")


def averages_of(decay: float | None) -> Mapping[str, float]:
    """What ``Objective.averages`` says: the target network under its decay, or none."""
    return {} if decay is None else {"target": decay}


def target_of(nets: Nets, decay: float | None) -> Predictor:
    """The target network, or where there is none the student as it is."""
    return nets.student if decay is None else nets.target
