"""Grids cut into segments: which edge a time falls towards, and where a jump may end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """[0, 1] cut into ``count`` equal segments, walked by a solver with ``solver_steps`` steps over the whole range.

    Raises:
        ValueError: if the solver's grid does not contain the edges.
    """

    count: int = 4
    """Segments; as many steps the student serves."""
    solver_steps: int = 16
    """Steps of the teacher's solver over [0, 1]; a multiple of ``count``."""

    def __post_init__(self) -> None:
        """Check that edges are grid points."""
        if self.count < 1 or self.solver_steps % self.count:
            raise ValueError(
                f"solver_steps must be a multiple of the segments, so that every edge is a grid point; "
                f"got {self.solver_steps} steps and {self.count} segments"
            )

    @property
    def edges(self) -> tuple[float, ...]:
        """Upper edges, falling from 1: the student's grid."""
        return tuple(1 - i / self.count for i in range(self.count))

    def lower_edge(self, index: Tensor) -> Tensor:
        """Index of the lower edge of the segment that grid index ``index`` (1 ... solver_steps) starts in.

        A point on an edge belongs to the segment below it, otherwise nothing would start at the top.
        """
        per = self.solver_steps // self.count
        return torch.div(index - 1, per, rounding_mode="floor") * per

    def time(self, index: Tensor) -> Tensor:
        """Fraction of t_max at grid index ``index``; float64."""
        return index.double() / self.solver_steps
