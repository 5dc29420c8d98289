"""The judges of the shapes world: an attribute classifier of our own and a small open_clip model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.paths import project_dir
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


@dataclass(frozen=True)
class ShapesJudges:
    """What judges generated scenes: right attributes, and agreement of image and text by a network trained apart."""

    classifier: ShapesClassifier
    clip: nn.Module
    tokenize: Callable[[list[str]], Tensor]

    @torch.no_grad()
    def clip_scores(self, images: Tensor, texts: list[str]) -> Tensor:
        """100 times the cosine of each image's embedding and its text's, (B,), of images (B, 3, 32, 32) in [-1, 1]."""
        image = F.normalize(self.clip.encode_image(images), dim=1)
        text = F.normalize(self.clip.encode_text(self.tokenize(texts)), dim=1)
        return 100 * (image * text).sum(1)


def load_judges(folder: str | PathLike[str] | None = None) -> ShapesJudges:
    """Both judges on the CPU, float32, in eval mode, without gradients.

    Args:
        folder: holds ``classifier.safetensors`` and ``clip/``; None for the bundled ``assets/shapes-judges``.
    """
    folder = project_dir("assets") / "shapes-judges" if folder is None else Path(folder)
    name = f"local-dir:{folder / 'clip'}"
    clip = open_clip.create_model(name).eval().requires_grad_(False)
    return ShapesJudges(load_shapes_classifier(folder / "classifier.safetensors"), clip, open_clip.get_tokenizer(name))
