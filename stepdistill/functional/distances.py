"""How far apart two samples are. Values to put into an objective's ``distance`` field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


class Distance(ABC):
    """Two tensors (B, ...) to one value per sample, (B,)."""

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of ``a`` to ``b`` per sample."""


@dataclass(frozen=True)
class L2(Distance):
    """Mean squared error over a sample's elements."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, ...), (B, ...) -> (B,)."""
        return (a - b).flatten(1).square().mean(1)


@dataclass(frozen=True)
class Huber(Distance):
    """Pseudo-Huber on the sample's norm, ``sqrt(|a - b|^2 + c^2) - c`` with ``c = scale * sqrt(d)`` (iCT,
    arXiv:2310.14189 sec. 3.3), divided by sqrt(d) so that its size does not depend on resolution.
    """

    scale: float = 0.00054
    """Where it turns from squared to linear, in units of the root mean square difference."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, ...), (B, ...) -> (B,)."""
        mean_square = (a - b).flatten(1).square().mean(1)
        return (mean_square + self.scale**2).sqrt() - self.scale


@dataclass(frozen=True)
class ElementHuber(Distance):
    """Pseudo-Huber element by element, ``mean(sqrt((a - b)^2 + c^2) - c)``, as the LCM family uses it."""

    c: float = 0.001
    """Where it turns from squared to linear, in units of the data."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, ...), (B, ...) -> (B,)."""
        return (((a - b).flatten(1).square() + self.c**2).sqrt() - self.c).mean(1)


@dataclass(frozen=True)
class AdaptiveL2(Distance):
    """Squared error over its own detached size, ``e / sg(e + c)^power`` with e the sum over a sample's elements
    (MeanFlow, arXiv:2505.13447 sec. 4.3): gradients of all samples are about as long, whatever their errors.
    """

    power: float = 1.0
    """0 is the squared error; 1 divides it away."""
    c: float = 1e-3
    """Added to the squared error, where errors no longer matter."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.power <= 1 or not self.c > 0:
            raise ValueError(f"AdaptiveL2 needs 0 <= power <= 1 and c > 0; got {self.power} and {self.c}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, ...), (B, ...) -> (B,)."""
        square = (a - b).flatten(1).square().sum(1)
        return square / (square.detach() + self.c) ** self.power


@dataclass(frozen=True)
class Barron(Distance):
    """Mean squared error over its own detached root, ``m / sg(sqrt(m + c^2))``: Barron's reweighting at alpha = 1
    (arXiv:1701.03077), with gradients that are bounded like a root mean square's.
    """

    c: float = 1e-3
    """Where it turns from squared to linear, in units of the root mean square difference."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, ...), (B, ...) -> (B,)."""
        m = L2()(a, b)
        return m / (m.detach() + self.c**2).sqrt()


@dataclass(frozen=True)
class LPIPS(Distance):
    """Learned perceptual image patch similarity (arXiv:1801.03924) of the images that samples decode to: differences
    between a frozen classifier's features, weighted as people judge. For methods that compare clean samples.

    This is a value without a network: building a recipe puts ``models.vision.Perceptual`` in its place, with
    torchvision's classifier, whose weights are downloaded once, under torchmetrics' weighting.
    """

    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """The classifier. The networks are ordered by size and quality; few-step papers use vgg."""
    size: int = 224
    """Side that images are resized to, as in the papers; 0 leaves them as they are, at least 32 pixels wide."""

    def __post_init__(self) -> None:
        """Check what can be told without the network."""
        if self.net not in ("vgg", "alex", "squeeze"):
            raise ValueError(f"LPIPS.net must be vgg, alex or squeeze; got {self.net!r}")
        if self.size != 0 and self.size < 32:
            raise ValueError(f"LPIPS.size must be at least 32, or 0 for images as they are; got {self.size}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Refused: there is no network here.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("LPIPS() has no network until its recipe is built; by hand, use models.vision.Perceptual")
