"""Grids cut into segments: which edge a time falls towards, and two jumps from neighbours that should agree there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stepdistill.functional.ode import jump
from stepdistill.models.denoiser import Predictor
from stepdistill.models.nets import Nets
from stepdistill.sampling import Move, StepRule


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


@dataclass(frozen=True)
class Boundaries:
    """[0, 1] cut at given edges, and walked by a solver in either direction.

    Raises:
        ValueError: if the edges do not fall from 1, or the solver's grid does not contain them.
    """

    edges: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Upper edges, falling from 1: the student's grid."""
    solver_steps: int = 16
    """Steps of the teacher's solver over [0, 1]; every edge is a point of its grid."""

    def __post_init__(self) -> None:
        """Check order, and that edges are grid points."""
        below = (*self.edges, 0.0)
        if below[0] != 1 or any(a <= b for a, b in pairwise(below)):
            raise ValueError(f"segments.edges must fall from 1 and stay above 0; got {list(self.edges)}")
        off = [e for e in self.edges if abs(e * self.solver_steps - round(e * self.solver_steps)) > 1e-9]
        if off:
            raise ValueError(f"segments.edges: {off[0]:g} is no point of a grid of {self.solver_steps} solver_steps")

    def lower_edge(self, index: Tensor) -> Tensor:
        """Index of the nearest edge below grid index ``index`` (1 ... solver_steps), not itself."""
        edges = self._indices(index)
        return edges[torch.searchsorted(edges, index) - 1]

    def upper_edge(self, index: Tensor) -> Tensor:
        """Index of the nearest edge above grid index ``index`` (0 ... solver_steps - 1), not itself."""
        edges = self._indices(index)
        return edges[torch.searchsorted(edges, index, right=True)]

    def time(self, index: Tensor) -> Tensor:
        """Fraction of t_max at grid index ``index``; float64."""
        return index.double() / self.solver_steps

    def _indices(self, like: Tensor) -> Tensor:
        """Of all edges, rising from 0."""
        return like.new_tensor([0, *(round(e * self.solver_steps) for e in reversed(self.edges))])


def two_jumps(
    nets: Nets, target: Predictor, solver: StepRule, x_t: Tensor, move: Move, end: Tensor
) -> tuple[Tensor, Tensor]:
    """The student's jump to ``end``, and its target's to the same end from one solver step of the teacher nearer to it.

    Args:
        nets: the student and the teacher.
        target: the student's running average, or the student itself.
        solver: one step of the teacher's ODE.
        x_t: states at ``move.t``, (B, ...).
        move: the solver's step.
        end: where both jumps end, (B,): at ``move.s``, or beyond it in the direction of the move.

    Returns:
        Two states at ``end``, (B, ...): the student's with a graph, the target's without.
    """
    c_t, c_s, c_end = (nets.student.schedule.coeffs(u, x_t) for u in (move.t, move.s, end))
    with torch.no_grad():
        x_s, _ = solver(nets.teacher, x_t, move)
        # At s = end the jump is the identity, so the target is the solver's state itself.
        aim = jump(x_s, target(x_s, move.s, move.cond), c_s, c_end)
        aim = torch.where((move.s == end).view_as(c_s.alpha), x_s, aim)
    return jump(x_t, nets.student(x_t, move.t, move.cond), c_t, c_end), aim
