"""Captioned coloured shapes, 32x32 pixels: the made-up world that the bundled text-to-image teachers draw.

A scene is one shape (small or large) or two, on a coloured background with a slow change of brightness. Position,
rotation, exact size, exact colour and brightness are free, and a caption may leave attributes out, so that one caption
has many right images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (60, 100, 240),
    "yellow": (240, 210, 40),
    "white": (235, 235, 235),
    "black": (25, 25, 25),
}
LAYOUTS = ("single", "left of", "above")
SIZES = ("small", "large")
HEADS: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "background": tuple(COLOURS),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "shape2": SHAPES,
    "colour2": tuple(COLOURS),
}
"""Attributes and their values; in ``left of`` and ``above`` the first shape is the left or the upper one."""
ABSENT = -1
"""The value of an attribute that a scene has not: ``size`` of two shapes, ``shape2`` and ``colour2`` of one."""
PAIRS = 0.25
"""Share of scenes with two shapes."""
RADII = {"small": (6.0, 7.5), "large": (9.5, 11.5), "pair": (5.5, 6.5)}

_CHUNK = 4096
_COLOUR_JITTER = 16.0
_TEXTURE = 18.0
_ROTATION = 0.3
_COLUMN = {name: column for column, name in enumerate(HEADS)}


class Scenes(NamedTuple):
    """Drawn scenes; all tensors in the same order and on the CPU."""

    images: Tensor  # (N, 3, 32, 32) uint8
    attributes: Tensor  # (N, 7) int64, columns as in HEADS
    geometry: Tensor  # (N, 2, 4) float32: centre x, centre y, radius (0 where there is no second shape), rotation
    paint: Tensor  # (N, 3, 3) float32: colour of the background, of the first and of the second shape, 0..255


class Captions(NamedTuple):
    """Captions and what they name."""

    texts: list[str]
    named: Tensor  # (N, 7) bool, columns as in HEADS: attributes that the text tells


def draw(n: int, seed: int) -> Scenes:
    """``n`` random scenes; the same seed always gives the same ones."""
    parts = [_draw(min(_CHUNK, n - start), seed * 1_000_003 + start) for start in range(0, n, _CHUNK)]
    return Scenes(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def random_attributes(n: int, generator: torch.Generator) -> Tensor:
    """Attributes (n, 7) as ``draw`` takes them: all values equally likely, no shape in its background's colour."""

    def pick(values: int) -> Tensor:
        return torch.randint(values, (n,), generator=generator)

    colours = len(COLOURS)
    background = pick(colours)
    pair = torch.rand(n, generator=generator) < PAIRS
    absent = torch.full((n,), ABSENT)
    columns = {
        "layout": torch.where(pair, 1 + pick(2), 0),
        "background": background,
        "shape": pick(len(SHAPES)),
        "colour": (background + 1 + pick(colours - 1)) % colours,
        "size": torch.where(pair, absent, pick(len(SIZES))),
        "shape2": torch.where(pair, pick(len(SHAPES)), absent),
        "colour2": torch.where(pair, (background + 1 + pick(colours - 1)) % colours, absent),
    }
    return torch.stack([columns[name] for name in HEADS], 1)


def captions(attributes: Tensor, seed: int, dropout: float = 0.15) -> Captions:
    """One caption for each row of ``attributes``, such as "a small red ring on a black background".

    Args:
        attributes: (N, 7), columns as in HEADS.
        seed: of what is left out.
        dropout: chance of each attribute but the layout to be left out; without its shape a thing is "a shape".
    """
    generator = torch.Generator().manual_seed(seed)
    named = torch.rand(attributes.shape, generator=generator) >= dropout
    named[:, _COLUMN["layout"]] = True
    named &= attributes != ABSENT
    rows = zip(attributes.tolist(), named.tolist(), strict=True)
    return Captions([caption(values, flags) for values, flags in rows], named)


def align(predicted: Tensor, attributes: Tensor, named: Tensor) -> Tensor:
    """Whether every named attribute is right, (N,) bool; all arguments (N, 7)."""
    return ((predicted == attributes) | ~named).all(1)


def caption(values: list[int], named: list[bool]) -> str:
    """The caption of one scene that tells exactly the named values; both lists in the order of HEADS."""

    def word(head: str) -> str:
        column = _COLUMN[head]
        return HEADS[head][values[column]] if named[column] else ""

    def thing(*words: str) -> str:
        return " ".join(part for part in ("a", *words) if part)

    text = thing(word("size"), word("colour"), word("shape") or "shape")
    if values[_COLUMN["layout"]]:
        text += f" {word('layout')} {thing(word('colour2'), word('shape2') or 'shape')}"
    if word("background"):
        text += f" on a {word('background')} background"
    return text


def _draw(n: int, seed: int) -> Scenes:
    generator = torch.Generator().manual_seed(seed)
    attributes = random_attributes(n, generator)
    geometry = _geometry(attributes, generator)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    columns = [_COLUMN[name] for name in ("background", "colour", "colour2")]
    jitter = _COLOUR_JITTER * (2 * torch.rand(n, 3, 3, generator=generator) - 1)
    paint = palette[attributes[:, columns].clamp_min(0)] + jitter
    coarse = _TEXTURE * (2 * torch.rand(n, 1, 3, 3, generator=generator) - 1)
    texture = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    image = paint[:, 0, :, None, None] + texture
    for thing, head in enumerate(("shape", "shape2")):
        cover = coverage(attributes[:, _COLUMN[head]], geometry[:, thing])[:, None]
        image = image.lerp(paint[:, thing + 1, :, None, None] + texture / 2, cover)
    return Scenes(image.round().clamp(0, 255).to(torch.uint8), attributes, geometry, paint)


def _geometry(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Centres, radii and rotations (N, 2, 4) that keep every shape inside the image and clear of the other one."""
    n = len(attributes)
    layout, size = attributes[:, _COLUMN["layout"]], attributes[:, _COLUMN["size"]]
    low, high = torch.tensor([RADII["pair"], RADII["small"], RADII["large"]]).T
    kind = size + 1  # ABSENT is -1: row 0 is a pair
    low, high = low[kind, None], high[kind, None]
    radius = low + (high - low) * torch.rand(n, 2, generator=generator)
    offset = 2 * torch.rand(n, 2, 2, generator=generator) - 1  # (N, shape, x or y)
    centre = SIZE / 2 + offset * (SIZE / 2 - 1.24 * radius - 0.5).clamp_min(0)[:, :, None]
    for value, axis in ((1, 0), (2, 1)):
        apart = torch.tensor([SIZE / 4, 3 * SIZE / 4]) + 0.4 * offset[:, :, axis]
        centre[:, :, axis] = torch.where(layout[:, None] == value, apart, centre[:, :, axis])
    radius = torch.stack([radius[:, 0], torch.where(layout > 0, radius[:, 1], 0)], 1)
    rotation = _ROTATION * (2 * torch.rand(n, 2, generator=generator) - 1)
    return torch.cat([centre, radius[:, :, None], rotation[:, :, None]], 2)


def coverage(shape: Tensor, geometry: Tensor) -> Tensor:
    """Share of each pixel inside the shape, (N, 32, 32), from its signed distance in pixels.

    Args:
        shape: (N,) int64; ABSENT covers nothing.
        geometry: (N, 4) centre x, centre y, radius, rotation; pixel i spans i to i + 1.
    """
    x, y, radius, rotation = (column[:, None, None] for column in geometry.T)
    along = torch.arange(SIZE) + 0.5
    right, down = along[None, None, :] - x, along[None, :, None] - y
    cos, sin = rotation.cos(), rotation.sin()
    u, v = cos * right + sin * down, cos * down - sin * right
    length = (right.square() + down.square()).sqrt()
    distances = {
        "circle": length - radius,
        "square": torch.maximum(u.abs(), v.abs()) - 0.86 * radius,
        # Sides of an upright triangle: the lower one, and two that lean by 60 degrees.
        "triangle": torch.maximum(v, 0.75**0.5 * u.abs() - 0.5 * v) - 0.62 * radius,
        "ring": (length - 0.78 * radius).abs() - 0.25 * radius,
    }
    every = torch.stack([distances[name] for name in SHAPES], 1)  # (N, shapes, 32, 32)
    distance = every[torch.arange(len(shape)), shape.clamp_min(0)]
    return torch.where((shape == ABSENT)[:, None, None], 0, (0.5 - distance).clamp(0, 1))
