"""The ways in which images reach an extractor's size. They move a Frechet distance by more than most methods do.

==================  ===============================================================================================
``none``            images must have the size already
``clean``           clean-fid ``clean``: PIL bicubic, each channel as float32, clipped to 0..255, not rounded
``legacy_pytorch``  pytorch-fid, clean-fid ``legacy_pytorch``: torch bilinear, no antialias
``torchmetrics``    torchmetrics' FID: torch bilinear with antialias
``tensorflow``      torch-fidelity, clean-fid ``legacy_tensorflow``: TensorFlow 1 bilinear, corners of pixels aligned
``pil``             PIL bicubic on bytes, rounded: torchvision's ``Resize`` of a PIL image; FD-DINOv2 of dgm-eval
``clip``            CLIP's: the shorter side by ``pil``, the middle cropped
``cmmd``            CMMD's: torch bicubic, no antialias, not clipped
==================  ===============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Resize = Literal["none", "clean", "legacy_pytorch", "torchmetrics", "tensorflow", "pil", "clip", "cmmd"]


def resize(images: Tensor, size: int, how: Resize) -> Tensor:
    """Images at an extractor's size.

    Args:
        images: uint8 (B, 3, H, W).
        size: of the sides asked for.
        how: see the table above.

    Returns:
        float32 (B, 3, size, size), levels 0..255, on the images' device.

    Raises:
        ValueError: if ``how`` is unknown, or is "none" and the images have another size.
    """
    if how not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}; got {how!r}")
    return RESIZES[how](images, size)


def _none(images: Tensor, size: int) -> Tensor:
    if images.shape[2:] != (size, size):
        raise ValueError(f"images must be {size}x{size} under resize 'none', got {images.shape[2]}x{images.shape[3]}")
    return images.float()


def _clean(images: Tensor, size: int) -> Tensor:
    def channel(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))

    planes = images.cpu().numpy().astype(np.float32).reshape(-1, *images.shape[2:])
    resized = np.stack([channel(plane) for plane in planes]).clip(0, 255)
    return torch.from_numpy(resized).view(-1, 3, size, size).to(images.device)


def _legacy_pytorch(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)


def _torchmetrics(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)


def _tensorflow(images: Tensor, size: int) -> Tensor:
    """Output i lies at input ``i * H / size``, not at ``(i + 0.5) * H / size - 0.5``: half a pixel off, on purpose."""
    x = images.float()
    for dim in (3, 2):  # along rows first
        length = x.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (length / size)
        low = place.floor().long()
        weight = (place - low).view(-1, *[1] * (3 - dim))
        near, far = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        x = near + (far - near) * weight
    return x


def _pil(images: Tensor, size: int) -> Tensor:
    return _through_pil(images, lambda image: image.resize((size, size), Image.Resampling.BICUBIC))


def _clip(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    # torchvision truncates the longer side and rounds the crop's margins.
    new = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    top, left = round((new[0] - size) / 2), round((new[1] - size) / 2)

    def shorter_side_then_middle(image: Image.Image) -> Image.Image:
        image = image.resize((new[1], new[0]), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + size, top + size))

    return _through_pil(images, shorter_side_then_middle)


def _through_pil(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).to(images.device, torch.float32)


def _cmmd(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False)


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "none": _none,
    "clean": _clean,
    "legacy_pytorch": _legacy_pytorch,
    "torchmetrics": _torchmetrics,
    "tensorflow": _tensorflow,
    "pil": _pil,
    "clip": _clip,
    "cmmd": _cmmd,
}
