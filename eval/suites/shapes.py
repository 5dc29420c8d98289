"""Suites on the bundled text-to-image teachers of captioned shapes: ``stepdistill bench shapes_sd_teacher``."""

from __future__ import annotations

from stepdistill.bench import Suite
from stepdistill.recipe import Teacher
from stepdistill.sampling import Ddim, DpmPP2M, Heun


def shapes_sd_teacher() -> Suite:
    """The Stable Diffusion teacher alone, at the guidance that its students take over."""
    return _teacher("bundled:shapes-sd")


def shapes_sd3_teacher() -> Suite:
    """The flow-matching teacher alone, at the guidance that its students take over."""
    return _teacher("bundled:shapes-sd3")


def _teacher(source: str) -> Suite:
    return Suite(Teacher(source, guidance=3.0), solvers=(Ddim(), DpmPP2M(), Heun()), n=1000)
