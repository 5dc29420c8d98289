"""The deterministic jump that every few-step method is built on."""

from __future__ import annotations

from torch import Tensor

from stepdistill.schedule import Coeffs


def jump(x_t: Tensor, x0: Tensor, c_t: Coeffs, c_s: Coeffs) -> Tensor:
    """Move along the line that a clean-sample estimate fixes: ``alpha_s x0 + sigma_s (x_t - alpha_t x0) / sigma_t``.

    This is the DDIM step (arXiv:2010.02502 eq. 12, eta = 0), the identity at s = t, ``x0`` at sigma_s = 0, and equal
    to an Euler step of the velocity on rectified-flow and EDM paths.

    Args:
        x_t: state at time t, (B, ...).
        x0: estimate of the clean sample, (B, ...).
        c_t: coefficients at t, sigma_t > 0, broadcastable.
        c_s: coefficients at s.

    Returns:
        The state at time s, (B, ...).
    """
    ratio = c_s.sigma / c_t.sigma
    return ratio * x_t + (c_s.alpha - ratio * c_t.alpha) * x0


def jump_target(x_t: Tensor, x_s: Tensor, c_t: Coeffs, c_s: Coeffs) -> Tensor:
    """The one clean-sample estimate whose jump from ``x_t`` lands on ``x_s`` (progressive distillation,
    arXiv:2202.00512 appendix G, written for any path).

    Args:
        x_t: state at time t, (B, ...).
        x_s: state to land on, at a time s with less noise, (B, ...).
        c_t: coefficients at t, sigma_t > 0.
        c_s: coefficients at s.

    Returns:
        x0 of shape (B, ...) with ``jump(x_t, x0, c_t, c_s) == x_s``.
    """
    ratio = c_s.sigma / c_t.sigma
    return (x_s - ratio * x_t) / (c_s.alpha - ratio * c_t.alpha)
