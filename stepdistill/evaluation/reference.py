"""What generated images are held against: real images, a folder of them, or a file of statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stepdistill.evaluation.comparison import contrast, saturation
from stepdistill.evaluation.features import Extractor
from stepdistill.evaluation.metrics import MeanCov, Moments
from stepdistill.evaluation.statistics_files import load_statistics
from stepdistill.evaluation.weights import sha256_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BATCH = 256
KEEP = 10_000
"""Features kept for the metrics of neighbours and kernels, the customary number of real samples."""


@dataclass(frozen=True)
class Reference:
    """Statistics of real images under one extractor; memory does not grow with their number."""

    moments: MeanCov | Moments
    features: Tensor | None
    """Of the first ``KEEP`` images, (N, D) float32; None of a statistics file, which has only moments."""
    colour: dict[str, float]
    """Mean ``saturation`` and ``contrast``; empty of a statistics file."""
    sha256: str
    """Of the images' levels, in order, or of the file."""

    @classmethod
    def of_images(cls, images: Tensor | Iterable[Tensor], extractor: Extractor, keep: int = KEEP) -> Reference:
        """Of images uint8 (N, 3, H, W), or of batches of such; batches pass through and are not kept.

        Raises:
            ValueError: if the images break the contract or there are fewer than two.
        """
        moments, kept, digest = MeanCov(extractor.dim), [], hashlib.sha256()
        sums = {"saturation": 0.0, "contrast": 0.0}
        for batch in images.split(BATCH) if isinstance(images, Tensor) else images:
            features = extractor(batch)
            if moments.count < keep:
                kept.append(features[: keep - moments.count])
            moments.update(features)
            digest.update(batch.contiguous().cpu().numpy().tobytes())
            for name, of in (("saturation", saturation), ("contrast", contrast)):
                sums[name] += float(of(batch).sum())
        if moments.count < 2:
            raise ValueError(f"a reference needs at least 2 images, got {moments.count}")
        colour = {name: value / moments.count for name, value in sums.items()}
        return cls(moments, torch.cat(kept), colour, digest.hexdigest())

    @classmethod
    def of_folder(cls, folder: str | PathLike[str], extractor: Extractor, keep: int = KEEP) -> Reference:
        """Of all images in a folder and its subfolders; see ``read_images``."""
        return cls.of_images(read_images(folder), extractor, keep)

    @classmethod
    def of_file(cls, path: str | PathLike[str]) -> Reference:
        """Of a statistics file; see ``load_statistics``. Only Frechet distances can be held against it."""
        moments = load_statistics(path)
        return cls(moments, None, {}, sha256_of(Path(path)))


def read_images(folder: str | PathLike[str], batch_size: int = BATCH) -> Iterator[Tensor]:
    """The images of a folder and its subfolders in the order of their paths, uint8 (B, 3, H, W), batch by batch.

    Raises:
        ValueError: in one line, if there is no such folder, it has no images, one cannot be read, or sizes differ.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images: no such folder: {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"images: none in {folder}; expected {', '.join(SUFFIXES)}")
    batch: list[Tensor] = []
    first = None
    for path in paths:
        image = _read(path)
        first = first or (path, image.shape)
        if image.shape != first[1]:
            (_, h, w), (_, height, width) = image.shape, first[1]
            raise ValueError(
                f"images must have one size: {first[0]} is {width}x{height}, {path} is {w}x{h}; bring them to one size"
            )
        batch.append(image)
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {path} cannot be read ({str(error).splitlines()[0]})") from error
