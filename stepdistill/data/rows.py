"""Rows of image data, whatever they come from, and how an image is read and fitted to a size."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stepdistill.data.report import Bad
from stepdistill.models.families.base import Size

HEAD = 2**16
"""Bytes at the beginning of most files that tell an image's size."""
COLUMNS = ("prompt", "text", "caption")
"""Where a row has its text; the first one that is there counts."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Of images, whatever their files are called; others may start programs (EPS)."""
FITTING = "upright, on white, Lanczos, middle 1"
"""What ``fitted`` does, for the cache's keys: change it with the code."""


class Row(NamedTuple):
    """An image with its caption or its class; nothing is opened before it is asked for."""

    name: str
    """What messages call it."""
    read: Callable[[int], bytes | Tensor]
    """The first so many bytes of the file, -1 for all; or the image itself, uint8 (3, H, W)."""
    text: str = ""
    label: int | None = None

    def content(self, first: int = -1) -> bytes | Tensor:
        """What ``read`` gives.

        Raises:
            Bad: if it cannot be read.
        """
        try:
            return self.read(first)
        except Bad:
            raise
        except FileNotFoundError as error:
            raise Bad("missing image", "no such file") from error
        except (OSError, ValueError) as error:
            raise Bad("unreadable image", str(error)) from error


def checked_text(text: object) -> str:
    """A caption or prompt as it is.

    Raises:
        Bad: if it is no text, or one that no tokenizer can take.
    """
    if not isinstance(text, str):
        raise Bad("no caption") if text is None else Bad("caption is no text", repr(text)[:80])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Bad("caption is no Unicode", f"lone surrogate at character {error.start}") from error
    return text


def text_in(row: Mapping[str, Any], column: str = "") -> str:
    """The text of a row of metadata; ``column`` empty takes the first of ``COLUMNS``.

    Raises:
        Bad: if there is no such column, or no text in it.
    """
    names = [name for name in ((column,) if column else COLUMNS) if name in row]
    if not names:
        raise Bad("missing column", f"no {column or f'{COLUMNS[0]}, {COLUMNS[1]} or {COLUMNS[2]}'}")
    return checked_text(row[names[0]])


def opened_image(content: bytes | Tensor) -> Image.Image:
    """The image of a file's content; pixels are decoded later.

    Raises:
        Bad: if it is none.
    """
    if isinstance(content, Tensor):
        return Image.fromarray(content.permute(1, 2, 0).numpy())
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise Bad("damaged image", f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise what they like
        raise Bad("damaged image", str(error) or type(error).__name__) from error
    if min(image.size) < 1:
        raise Bad("damaged image", "it has no pixels")
    return image


def size_of(row: Row) -> Size:
    """Height and width of an image when it stands upright; reads its head alone where that is enough.

    Raises:
        Bad: if it is none.
    """
    try:
        image = opened_image(row.content(HEAD))
    except Bad:
        image = opened_image(row.content())
    try:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # orientations that swap the sides
    except Exception as error:
        raise Bad("damaged image", str(error) or type(error).__name__) from error
    return image.size if turned else (image.size[1], image.size[0])


def check_size(size: Size, wanted: Size, enlarge: float) -> None:
    """Raise ``Bad`` if an image of that (height, width) would have to be enlarged by more than ``enlarge``."""
    if max(wanted[0] / size[0], wanted[1] / size[1]) > enlarge:
        raise Bad("too small", f"{size[1]}x{size[0]} pixels for {wanted[1]}x{wanted[0]}")


def fitted(content: bytes | Tensor, size: Size, enlarge: float) -> Tensor:
    """An image, uint8 (3, H, W): upright, on white where it is transparent, scaled and cropped around the middle.

    Args:
        content: of an image file, or an image, uint8 (3, H, W).
        size: (H, W).
        enlarge: factor up to which it may be enlarged.

    Raises:
        Bad: if it cannot be decoded, or would have to be enlarged more.
    """
    height, width = size
    try:
        image = ImageOps.exif_transpose(opened_image(content))
        check_size((image.height, image.width), size, enlarge)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        fitting = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except Bad:
        raise
    except Exception as error:  # decoders raise what they like
        raise Bad("damaged image", str(error) or type(error).__name__) from error
    return torch.from_numpy(np.array(fitting)).permute(2, 0, 1)
