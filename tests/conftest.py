"""One thread, fixed seeds, every schedule, and GPU tests wherever there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # Triton's interpreter, which must be asked for before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from stepdistill.schedule import EDM, DiscreteVP, KarrasEDM, RectifiedFlow, Schedule, TrigFlow

torch.set_num_threads(1)  # more is slower on networks this small


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same draws in every order of tests."""
    torch.manual_seed(0)


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "vp-linear": DiscreteVP.linear,
    "vp-scaled-linear": DiscreteVP.scaled_linear,
    "flow": RectifiedFlow,
    "edm": EDM,
    "karras": KarrasEDM,
    "trig": TrigFlow,
    "trig-half": lambda: TrigFlow(sigma_data=0.5),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Each of the schedules in turn."""
    return SCHEDULES[request.param]()


@pytest.fixture
def interior(schedule: Schedule) -> Tensor:
    """Nine times of ``schedule`` between the ends, none an entry of a table; float64."""
    return torch.linspace(0.01737, 0.98271, 9, dtype=torch.float64) * schedule.t_max
