"""Derivatives of a network along a direction, for continuous-time consistency and flow maps. No gradient flows through.

Values to put into an objective's ``tangent`` field.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class Tangent(ABC):
    """How ``d/dh f(at + h along)`` at h = 0 is taken."""

    @property
    def reach(self) -> float:
        """How far along, to either side, ``f`` is looked at."""
        return 0.0

    @abstractmethod
    def __call__(self, f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
        """The derivative, shaped as what ``f`` returns, detached.

        Args:
            f: a function of as many tensors as there are in ``at``; it must draw nothing at random.
            at: where, each (B, ...).
            along: direction, one of the shape and dtype of each of ``at``.
        """


@dataclass(frozen=True)
class Jvp(Tangent):
    """Forward-mode differentiation: exact, one pass that costs about two. Attention takes the plain path, since no
    fused kernel has a forward derivative.
    """

    def __call__(self, f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
        """See ``Tangent``."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(f, at, along)[1].detach()


@dataclass(frozen=True)
class CentralDifference(Tangent):
    """``(f(at + h along) - f(at - h along)) / 2h``: two passes through any kernel, off by O(h^2).

    Rounding errors grow as the network's precision over h: bfloat16 needs 5e-3. Networks that were trained at whole
    timesteps only may bend between them: an h of several timesteps looks past that, ``Jvp`` does not. The caller sees
    to it that both points lie where ``f`` is defined.
    """

    h: float = 5e-3

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.h < 1:
            raise ValueError(f"tangent.h must lie in (0, 1); got {self.h}")

    @property
    def reach(self) -> float:
        """The step."""
        return self.h

    def __call__(self, f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
        """See ``Tangent``."""
        with torch.no_grad():
            ahead = f(*(x + self.h * d for x, d in zip(at, along, strict=True)))
            behind = f(*(x - self.h * d for x, d in zip(at, along, strict=True)))
        return (ahead - behind) / (2 * self.h)
