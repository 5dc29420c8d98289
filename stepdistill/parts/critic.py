"""The critic (fake score): another denoiser, fitted to the student's samples by plain denoising."""

from __future__ import annotations

from torch import Tensor

from stepdistill.models.denoiser import Cond, Denoiser
from stepdistill.objective import Step
from stepdistill.parts.times import Times
from stepdistill.schedule import row


def denoising_loss(net: Denoiser, x0: Tensor, cond: Cond, times: Times, step: Step) -> Tensor:
    """Mean squared error of a denoiser in the kind it predicts, without guidance or condition dropout.

    Args:
        net: the denoiser to fit.
        x0: samples to fit it to, (B, ...); detached here.
        cond: their conditions.
        times: law of the noise levels; the whole range, since a critic must be right wherever it is asked.
        step: source of randomness.

    Returns:
        A scalar.
    """
    x0 = x0.detach()
    t, eps = times(net.schedule, len(x0), step), step.randn(x0.shape)
    c = net.schedule.coeffs(t, x0)
    of_x0, of_eps = row(net.kind, c)
    target = of_x0 * x0 + of_eps * eps
    return (net(c.alpha * x0 + c.sigma * eps, t, cond, want=net.kind) - target).square().mean()
