"""Attention that is steered away from a negative prompt: NASA (arXiv:2412.02687) and NAG (arXiv:2505.21179).

The negative prompt's tokens stand behind the positive's in the network's text input. Whatever else a network does with
text it does token by token; only attention mixes tokens, and there the two are kept apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stepdistill.attention.install import CROSS, FLUX, JOINT, unknown_processor, with_processors
from stepdistill.attention.processors import CrossAttention, FluxAttention, JointAttention
from stepdistill.kernels import Backend, branch_attention, steer_attention


@dataclass(frozen=True)
class Away:
    """How a layer's outputs for two prompts become one."""

    scale: float
    """Weight of the negative prompt: a of ``Z+ - a Z-`` (NASA), phi of ``Z+ + phi (Z+ - Z-)`` (NAG)."""
    method: Literal["nasa", "nag"] = "nasa"
    tau: float = 2.5
    """NAG: how much longer than ``Z+`` a token may become, in the L1 norm over all heads."""
    alpha: float = 0.25
    """NAG: share of the extrapolated output; the rest is ``Z+``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.method not in ("nasa", "nag"):
            raise ValueError(f"method {self.method!r}: nasa or nag")
        if self.scale < 0:
            raise ValueError(f"scale {self.scale}: 0 or more; it steers away, so a prompt to go towards is a prompt")
        if self.tau < 1 or not 0 <= self.alpha <= 1:
            raise ValueError(f"tau {self.tau}, alpha {self.alpha}: tau at least 1 and alpha within [0, 1] expected")

    def combine(self, towards: Tensor, away: Tensor) -> Tensor:
        """Outputs (B, H, M, d) for both prompts to one."""
        if self.scale == 0:
            return towards
        if self.method == "nasa":
            return torch.add(towards, away, alpha=-self.scale)
        return nag(towards, away, self.scale, self.tau, self.alpha)


def nag(towards: Tensor, away: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """``alpha Ze min(1, tau |Z+| / |Ze|) + (1 - alpha) Z+`` with ``Ze = Z+ + scale (Z+ - Z-)``, (B, H, M, d).

    Norms are L1 per token, over heads and channels.
    """
    far = towards + scale * (towards - away)
    wide = torch.promote_types(far.dtype, torch.float32)
    length, limit = (x.to(wide).abs().sum((1, 3), keepdim=True) for x in (far, towards))
    shrink = (tau * limit / length.clamp_min(torch.finfo(wide).tiny)).clamp_max(1.0)
    return alpha * far * shrink.to(far.dtype) + (1 - alpha) * towards


class SteeredCrossAttention(CrossAttention):
    """Cross-attention over two prompts; self-attention as ever."""

    def __init__(self, away: Away, positive: int, backend: Backend | None = None) -> None:
        super().__init__(backend)
        self.away, self.positive = away, positive

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cross: bool) -> Tensor:
        """Steered where ``cross``; a mask, of whole tokens at the end of each prompt, becomes lengths."""
        if not cross:
            return super().attend(q, k, v, mask, cross)
        n = self.positive
        branches = [(k[:, :, :n], v[:, :, :n]), (k[:, :, n:], v[:, :, n:])]
        lengths = None
        if mask is not None:
            seen = mask[:, 0, 0] > -1
            lengths = torch.stack([seen[:, :n].sum(1), seen[:, n:].sum(1)], 1)
        if self.away.method == "nasa":
            return steer_attention(q, branches, (1.0, -self.away.scale), lengths=lengths, prefer=self.backend)
        return self.away.combine(*branch_attention(q, branches, lengths=lengths, prefer=self.backend))


def joint(q: Tensor, k: Tensor, v: Tensor, image: slice, texts: tuple[slice, slice], away: Away) -> Tensor:
    """Joint attention (B, H, L, d) with two prompts beside the image: each sees itself and the image.

    The image's own outputs come of both and are combined. What either prompt's tokens see is what they would see alone.
    """
    order = sorted((image, *texts), key=lambda part: part.start)
    out: dict[slice, Tensor] = {}
    images = []
    for text in texts:
        parts = [part for part in order if part in (image, text)]
        x = [torch.cat([tensor[:, :, p] for p in parts], 2) for tensor in (q, k, v)]
        z = scaled_dot_product_attention(*x)
        pieces = dict(zip([p.start for p in parts], z.split([p.stop - p.start for p in parts], 2), strict=True))
        images.append(pieces[image.start])
        out[text.start] = pieces[text.start]
    out[image.start] = away.combine(*images)
    return torch.cat([out[part.start] for part in order], 2)


class SteeredJointAttention(JointAttention):
    """SD3: image, prompt, negative prompt."""

    def __init__(self, away: Away, positive: int) -> None:
        super().__init__()
        self.away, self.positive = away, positive

    def attend(self, q: Tensor, k: Tensor, v: Tensor, image: int) -> Tensor:
        """Steered where there is text."""
        n = q.shape[2]
        if n == image:
            return super().attend(q, k, v, image)
        texts = slice(image, image + self.positive), slice(image + self.positive, n)
        return joint(q, k, v, slice(0, image), texts, self.away)


def steered_flux(away: Away, positive: int, negative: int) -> FluxAttention:
    """FLUX.1: prompt, negative prompt, image; the same in its single blocks."""
    texts = slice(0, positive), slice(positive, positive + negative)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joint(q, k, v, slice(positive + negative, q.shape[2]), texts, away)

    return FluxAttention(attend)


@contextmanager
def steered(net: nn.Module, away: Away, positive: int, negative: int, prefer: Backend | None = None) -> Iterator[None]:
    """Within it ``net`` takes a prompt of ``positive`` tokens and ``negative`` tokens behind it, and steers.

    Args:
        net: a UNet with cross-attention, PixArt, SD3 or FLUX.1.
        away: how.
        positive: tokens of the prompt.
        negative: tokens of the negative prompt.
        prefer: backend of cross-attention; None chooses.

    Raises:
        ValueError: if ``net`` has processors of another kind.
    """

    def make(processor: Any) -> Any:
        if isinstance(processor, CROSS):
            return SteeredCrossAttention(away, positive, prefer)
        if isinstance(processor, JOINT):
            return SteeredJointAttention(away, positive)
        if isinstance(processor, FLUX):
            return steered_flux(away, positive, negative)
        raise unknown_processor(net, processor)

    with with_processors(net, make):
        yield
