"""How much an error of the clean estimate counts at each noise level. Values to put into an objective's ``weight``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Weight(ABC):
    """A function of the log signal-to-noise ratio; -inf, where nothing of the data is left, must be fine too."""

    @abstractmethod
    def __call__(self, logsnr: Tensor) -> Tensor:
        """Weights of the log-SNRs (B,); (B,)."""


@dataclass(frozen=True)
class Even(Weight):
    """One everywhere: the clean estimate's own error."""

    def __call__(self, logsnr: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return torch.ones_like(logsnr)


@dataclass(frozen=True)
class TruncatedSnr(Weight):
    """``max(SNR, 1)`` (arXiv:2202.00512 sec. 4): the error of eps or of the clean estimate, whichever is larger."""

    def __call__(self, logsnr: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return logsnr.exp().clamp_min(1.0)


@dataclass(frozen=True)
class SnrPlusOne(Weight):
    """``SNR + 1`` (arXiv:2202.00512 sec. 4): on variance-preserving paths the squared error of v."""

    def __call__(self, logsnr: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return logsnr.exp() + 1
