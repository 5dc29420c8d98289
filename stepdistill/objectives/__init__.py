"""One paper, one file. Importing this package fills the registry."""

from __future__ import annotations

from stepdistill.objectives.adversarial.ladd import LADD
from stepdistill.objectives.consistency.cd import CD
from stepdistill.objectives.score.dmd2 import DMD2
from stepdistill.objectives.trajectory.kd import KD
from stepdistill.objectives.trajectory.tscd import TSCD

__all__ = ["CD", "DMD2", "KD", "LADD", "TSCD"]
