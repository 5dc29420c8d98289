"""Images side by side, as PNG: for a page, for a run's samples, for figures."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from stepdistill.checkpoint import write_atomically

LARGEST_TILE = 256
"""Pixels; larger images are reduced for the page, which would otherwise weigh tens of megabytes."""


class Grid(NamedTuple):
    """Images to show together; give teacher and student the same noise and the same classes."""

    title: str
    images: Tensor  # uint8 (R * C, 3, H, W), row by row
    columns: int
    captions: tuple[str, ...] = ()  # of the columns, from the left
    steps: int | None = None  # grids of one title and several step counts share a place, and a slider chooses
    note: str = ""  # beside the title


class Panel(NamedTuple):
    """A grid as the page holds it."""

    title: str
    png: str  # base64
    count: int
    columns: int
    captions: tuple[str, ...] = ()
    steps: int | None = None
    note: str = ""


def panel_of(grid: Grid) -> Panel:
    """The grid as a PNG, large images reduced."""
    factor = math.ceil(grid.images.shape[-1] / LARGEST_TILE)
    note = grid.note if factor == 1 else f"{grid.note} (shown at 1/{factor} of their size)".strip()
    return Panel(grid.title, png_of(grid.images, grid.columns), len(grid.images), grid.columns, *grid[3:5], note)


def png_of(images: Tensor, columns: int) -> str:
    """Base64 of a PNG for the page: images uint8 (B, 3, H, W) in rows, large ones reduced, small ones enlarged."""
    factor = math.ceil(images.shape[-1] / LARGEST_TILE)
    if factor > 1:
        images = avg_pool2d(images.float(), factor).round().to(torch.uint8)
    return base64.b64encode(_png(images, columns)).decode()


def image_grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Images side by side on a transparent ground, every pixel repeated ``scale`` times.

    Args:
        images: uint8 (B, 3, H, W), row by row; the last row may be short.
        columns: images per row.
        scale: side of one pixel, >= 1.

    Raises:
        ValueError: if the images break the contract, there are none, or a number is below 1.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(f"images must be uint8 (B, 3, H, W), B >= 1, got {tuple(images.shape)} of {images.dtype}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    height, width = images.shape[2] * scale, images.shape[3] * scale
    gap = 1 + min(height, width) // 24
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + gap) - gap))
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Writes an image grid as PNG, small images enlarged to about 40 pixels; whole or not at all.

    Raises:
        ValueError: see ``image_grid``.
        OSError: if the disk refuses.
    """
    png = _png(images, columns)
    write_atomically(Path(path), lambda aside: aside.write_bytes(png))


def _png(images: Tensor, columns: int) -> bytes:
    scale = max(1, round(40 / images.shape[-1]))  # digits are 8 pixels wide
    buffer = io.BytesIO()
    image_grid(images, columns, scale).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
