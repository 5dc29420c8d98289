"""Noise schedules and what a network predicts under them.

One forward process for everything, ``x_t = alpha_t x0 + sigma_t eps`` with t = 0 at the data and noise growing up to
``t_max``. A schedule answers with four numbers per time; every kind of prediction is a row of one 2x2 linear system.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Kind = Literal["x0", "eps", "v", "velocity"]
"""What a network predicts: the clean sample, the noise, v = alpha eps - sigma x0, or dx_t/dt."""

KINDS: tuple[str, ...] = get_args(Kind)


class Coeffs(NamedTuple):
    """``x_t = alpha x0 + sigma eps`` and its time derivatives, one value per sample."""

    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor


class Schedule(ABC):
    """A noise path. Times are float tensors of shape (B,), 0 (data) <= t <= ``t_max`` (noise); subclasses are final."""

    t_max: float
    prior_std: float = 1.0
    """Standard deviation of the noise that sampling starts from at ``t_max``."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Coeffs:
        """Closed-form coefficients at times ``t``, float64, the shape of ``t``."""

    @abstractmethod
    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        """The time at which ``log(alpha^2 / sigma^2)`` has the given value; float64, the shape of ``logsnr``."""

    def logsnr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)`` at times ``t``; +inf where sigma = 0, -inf where alpha = 0. Float64."""
        c = self(t)
        return 2 * (c.alpha.log() - c.sigma.log())

    def coeffs(self, t: Tensor, like: Tensor) -> Coeffs:
        """Coefficients in ``like``'s dtype and on its device, shaped (B, 1, ..., 1) to multiply it.

        Raises:
            ValueError: if ``t`` is not one time per sample of ``like``.
        """
        if t.shape != like.shape[:1]:
            raise ValueError(f"t must have one time per sample, shape ({len(like)},); got {tuple(t.shape)}")
        shape = (-1,) + (1,) * (like.ndim - 1)
        return Coeffs(*(c.to(like.device, like.dtype).view(shape) for c in self(t)))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``alpha_t x0 + sigma_t eps``; x0 and eps (B, ...), t (B,)."""
        c = self.coeffs(t, x0)
        return c.alpha * x0 + c.sigma * eps


class DiscreteVP(Schedule):
    """The variance-preserving table of DDPM-like teachers, continued between its entries.

    Table index i stands at ``t = (i + 1) / N`` and t = 0 is the data, so a trailing four-step grid 1, .75, .5, .25 is
    999, 749, 499, 249 of a 1000-entry table. In between, the angle ``atan2(sigma, alpha)`` is linear in t: exact at
    the entries, smooth at both ends, and finite at zero terminal SNR, where ``log alpha`` is not.

    Args:
        alphas_cumprod: the scheduler's table, shape (N,), strictly decreasing in (0, 1), the last entry may be 0.

    Raises:
        ValueError: if the table is not strictly decreasing within [0, 1).
    """

    t_max = 1.0

    def __init__(self, alphas_cumprod: Tensor):
        table = alphas_cumprod.detach().double().cpu()
        if table.ndim != 1 or len(table) < 1 or not bool((table.diff() < 0).all()) or table[0] >= 1 or table[-1] < 0:
            raise ValueError(
                f"alphas_cumprod must fall strictly within [0, 1), got {len(table.flatten())} values from "
                f"{table.flatten()[0]:.4g} to {table.flatten()[-1]:.4g}; is this a VP scheduler?"
            )
        self.n = len(table)
        angle = torch.atan2((1 - table).sqrt(), table.sqrt())
        self._angle = torch.cat([torch.zeros(1, dtype=torch.float64), angle])  # (N + 1,), index i is t = i / N
        self._slope = self._angle.diff() * self.n  # d angle / dt on each interval

    @classmethod
    def linear(cls, n: int = 1000, start: float = 1e-4, end: float = 0.02) -> DiscreteVP:
        """The linear-beta table of DDPM (arXiv:2006.11239), diffusers' default."""
        return cls((1 - torch.linspace(start, end, n, dtype=torch.float64)).cumprod(0))

    @classmethod
    def scaled_linear(cls, n: int = 1000, start: float = 0.00085, end: float = 0.012) -> DiscreteVP:
        """The table of Stable Diffusion: betas linear in their square root."""
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0))

    def __call__(self, t: Tensor) -> Coeffs:
        u = t.double() * self.n
        angles, slopes = self._angle.to(t.device), self._slope.to(t.device)
        i = u.ceil().long().sub_(1).clamp_(0, self.n - 1)  # the interval (i, i + 1] that holds u
        slope = slopes[i]
        angle = angles[i + 1] + (u - (i + 1)) / self.n * slope  # anchored at the entry: exact there
        # cos(pi / 2) rounds to 6e-17; at zero terminal SNR nothing at all is left of the data
        alpha, sigma = angle.cos().masked_fill(angle >= math.pi / 2, 0.0), angle.sin()
        return Coeffs(alpha, sigma, -sigma * slope, alpha * slope)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        angles, slopes = self._angle.to(logsnr.device), self._slope.to(logsnr.device)
        angle = torch.atan(torch.exp(-logsnr.double() / 2))
        i = torch.searchsorted(angles, angle).sub_(1).clamp_(0, self.n - 1)
        return ((i + 1).double() / self.n + (angle - angles[i + 1]) / slopes[i]).clamp(0.0, 1.0)


class RectifiedFlow(Schedule):
    """The straight path ``x_t = (1 - t) x0 + t eps``, 0 <= t <= 1 (arXiv:2209.03003): SD3, FLUX, Sana, Wan ..."""

    t_max = 1.0

    def __call__(self, t: Tensor) -> Coeffs:
        t = t.double()
        one = torch.ones_like(t)
        return Coeffs(1 - t, t, -one, one)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr.double() / 2)


class EDM(Schedule):
    """The variance-exploding path ``x_t = x0 + t eps``, 0 <= t <= sigma_max (arXiv:2206.00364): t *is* sigma.

    For closed forms. Grids and laws that are even in time are even in sigma here, and hardly meet the data's range:
    pipelines open on ``KarrasEDM``.
    """

    def __init__(self, sigma_max: float = 80.0):
        self.t_max = self.prior_std = float(sigma_max)

    def __call__(self, t: Tensor) -> Coeffs:
        t = t.double()
        one = torch.ones_like(t)
        return Coeffs(one, t, torch.zeros_like(t), one)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.exp(-logsnr.double() / 2)


class KarrasEDM(Schedule):
    """EDM's path ``x_t = x0 + sigma eps`` in Karras' time: ``sigma^(1 / rho)`` is linear in t (arXiv:2206.00364 eq. 5),
    from ``sigma_max`` at t = 1 down towards ``sigma_min``, so that even grids of time are EDM's own.

    Below t = 1e-6, all but ``sigma_min``, sigma itself is linear, and 0 at the data.
    """

    t_max = 1.0
    nearest = 1e-6

    def __init__(self, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0):
        self.prior_std, self.rho = float(sigma_max), float(rho)
        self._low, self._high = float(sigma_min) ** (1 / rho), float(sigma_max) ** (1 / rho)
        self._first = (self._low + self.nearest * (self._high - self._low)) ** rho

    def __call__(self, t: Tensor) -> Coeffs:
        t = t.double()
        root, rise = self._low + t * (self._high - self._low), self._high - self._low
        close, steep = t < self.nearest, self._first / self.nearest
        sigma = torch.where(close, t * steep, root**self.rho)
        dsigma = torch.where(close, torch.full_like(t, steep), self.rho * rise * root ** (self.rho - 1))
        return Coeffs(torch.ones_like(t), sigma, torch.zeros_like(t), dsigma)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        sigma = torch.exp(-logsnr.double() / 2)
        far = (sigma ** (1 / self.rho) - self._low) / (self._high - self._low)
        return torch.where(sigma < self._first, sigma * self.nearest / self._first, far)


class TrigFlow(Schedule):
    """``x_t = cos(t) x0 + sin(t) sigma_d eps``, 0 <= t <= pi/2 (sCM, arXiv:2410.11081)."""

    t_max = math.pi / 2

    def __init__(self, sigma_data: float = 1.0):
        self.sigma_data = self.prior_std = float(sigma_data)

    def __call__(self, t: Tensor) -> Coeffs:
        t = t.double()
        cos, sin, sd = t.cos(), t.sin(), self.sigma_data
        return Coeffs(cos, sd * sin, -sin, sd * cos)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-logsnr.double() / 2) / self.sigma_data)


def row(kind: Kind, c: Coeffs) -> tuple[Tensor | float, Tensor | float]:
    """(p, q) such that a prediction of this kind is ``p x0 + q eps``."""
    if kind == "x0":
        return 1.0, 0.0
    if kind == "eps":
        return 0.0, 1.0
    if kind == "v":
        return -c.sigma, c.alpha
    if kind == "velocity":
        return c.dalpha, c.dsigma
    raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")


def convert(pred: Tensor, x_t: Tensor, c: Coeffs, src: Kind, dst: Kind) -> Tensor:
    """Turn a prediction of kind ``src`` at ``x_t`` into kind ``dst``.

    Every kind is a row (p, q) of ``pred = p x0 + q eps``; with ``x_t = alpha x0 + sigma eps`` that is a 2x2 system,
    solved here once. Singular only where the information is missing: x0 from eps at alpha = 0, eps from x0 at
    sigma = 0.

    Args:
        pred: the prediction, (B, ...).
        x_t: the noised sample it was made at, (B, ...).
        c: coefficients of that time, broadcastable to ``x_t`` (``Schedule.coeffs``).
        src: kind of ``pred``.
        dst: kind wanted.

    Returns:
        The prediction as ``dst``, (B, ...).
    """
    if src == dst:
        return pred
    (p, q), (r, s) = row(src, c), row(dst, c)
    det = p * c.sigma - q * c.alpha
    # dst = r x0 + s eps with x0 = (sigma pred - q x_t) / det and eps = (p x_t - alpha pred) / det
    return ((r * c.sigma - s * c.alpha) / det) * pred + ((s * p - r * q) / det) * x_t
