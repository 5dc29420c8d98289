"""Teachers without weights."""

from __future__ import annotations

import pytest

from stepdistill.known_teachers import open_known
from stepdistill.plan import open_for_plan
from stepdistill.recipe import Teacher


@pytest.mark.parametrize(
    ("name", "parameters"), [("sd1.5", 859_520_964), ("sdxl", 2_567_463_684), ("flux-dev", 11_901_408_320)]
)
def test_known_teachers_have_the_published_numbers_of_weights(name: str, parameters: int) -> None:
    """Those of the hub's weight files."""
    assert sum(p.numel() for p in open_known(name).denoiser.parameters()) == parameters


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="config:sdxl"):
        open_for_plan(Teacher("config:sd9"))
