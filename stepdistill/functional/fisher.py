"""Score identity distillation: the Fisher divergence of two noised laws, estimated from samples and two denoisers."""

from __future__ import annotations

from torch import Tensor

from stepdistill.functional.divergence import mean_but_batch


def sid_loss(
    x0: Tensor, teacher_x0: Tensor, critic_x0: Tensor, alpha: float = 1.0, *, normalise: bool = True
) -> Tensor:
    """``D . ((teacher_x0 - x0) - alpha D)`` with ``D = teacher_x0 - critic_x0`` (SiD, arXiv:2404.04057 alg. 1).

    The first product and ``|D|^2`` have the same expectation F, the Fisher divergence in units of the data, where the
    critic is exact; its errors enter the two differently, and the difference takes out most of them. The value is
    ``(1 - alpha) F``, so 0 or negative is no sign of success. Gradients are wanted through all three arguments: with
    both estimates detached what is left is the direction of DMD, whatever alpha.

    Args:
        x0: student samples, (B, ...).
        teacher_x0: teacher's clean estimate of the re-noised samples, (B, ...), with a graph to ``x0``.
        critic_x0: critic's clean estimate of the same, (B, ...), with a graph to ``x0``.
        alpha: weight of the squared difference; at 1/2 the gradient is half that of F for any generator.
        normalise: divide by each sample's ``mean |x0 - teacher_x0|``, held constant; off for closed forms.

    Returns:
        Means over a sample's elements, (B,).
    """
    gap = teacher_x0 - critic_x0
    loss = gap * (teacher_x0 - x0 - alpha * gap)
    if normalise:
        loss = loss / mean_but_batch((x0 - teacher_x0).detach().abs()).clamp_min(1e-5)
    return loss.flatten(1).mean(1)
