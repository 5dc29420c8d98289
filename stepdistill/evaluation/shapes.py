"""The judges of the shapes world: an attribute classifier of our own and a small open_clip model."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.shapes import HEADS

FEATURES = 128


class ShapesClassifier(nn.Module):
    """Five convolutions, a 128-wide layer, and one linear read-out for each attribute; 0.22 M parameters, float32.

    No batch statistic and no dropout: an image's features depend on that image alone. What a head says of an attribute
    that the scene has not (the size of two shapes, a second shape of one) means nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 24, 1), (24, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in widths)
        self.norms = nn.ModuleList(nn.GroupNorm(4, o) for _, o, _ in widths)
        self.hidden = nn.Linear(64 * 4 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, sum(map(len, HEADS.values())))

    def layers(self, images: Tensor) -> list[Tensor]:
        """Activations after each convolution, then the features, of images (B, 3, 32, 32) in [-1, 1]."""
        h, seen = images, []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.silu(norm(conv(h)))
            seen.append(h)
        return [*seen, F.silu(self.hidden(F.avg_pool2d(h, 2).flatten(1)))]

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, 128) of images (B, 3, 32, 32) in [-1, 1]: the space of the Frechet distance."""
        return self.layers(images)[-1]

    def read(self, features: Tensor) -> dict[str, Tensor]:
        """Logits (B, values) of each attribute from features (B, 128)."""
        parts = self.head(features).split([len(values) for values in HEADS.values()], 1)
        return dict(zip(HEADS, parts, strict=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, values) of each attribute of images (B, 3, 32, 32) in [-1, 1]."""
        return self.read(self.features(images))

    @torch.no_grad()
    def attributes(self, images: Tensor) -> Tensor:
        """The most likely value of each attribute, (B, 7) int64, of images (B, 3, 32, 32) in [-1, 1]."""
        return torch.stack([logits.argmax(1) for logits in self(images).values()], 1)


def load_shapes_classifier(path: str | PathLike[str]) -> ShapesClassifier:
    """The classifier stored at ``path`` (safetensors, any float type), in eval mode, float32, without gradients."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no shapes classifier at {path}; rebuild it with `python train/shapes_teachers.py`")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    model = ShapesClassifier()
    try:
        model.load_state_dict({name: weight.float() for name, weight in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} is not a shapes classifier: {error}") from error
    return model.eval().requires_grad_(False)
