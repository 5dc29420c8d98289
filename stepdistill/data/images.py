"""Images with captions: a folder of your own, or made-up scenes; encoded to latents once."""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepdistill import shapes
from stepdistill.data.base import MEMORY, Data, Setting, cached, companions, epochs, lent, placed, weights_hash
from stepdistill.data.prompts import check_made_up, encoded, read_utf8, text_of
from stepdistill.logging import Progress
from stepdistill.models.families import Opened
from stepdistill.objective import Batch, Step

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PIXELS_AT_ONCE = 2**22
"""Of images that the autoencoder takes together, at most 64."""


@torch.no_grad()
def image_shape(opened: Opened) -> tuple[int, ...]:
    """Shape of one decoded sample: (C, H, W), or (C, T, H, W) of a video."""
    like = next(opened.denoiser.net.parameters())
    with lent(opened, like.device, vae=True):
        return tuple(opened.decode(torch.zeros(1, *opened.sample_shape, device=like.device)).shape[1:])


@dataclass(frozen=True)
class ImageSource(Data):
    """Images and their captions: all of them once an epoch, in a new order each time."""

    provides = frozenset({"x0"})

    memory: float = field(default=MEMORY, kw_only=True)
    """GB that latents, and again encoded captions, may take on the run's device; see ``PromptSource``."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.memory >= 0:
            raise ValueError(f"data.memory must be at least 0; got {self.memory}")

    @abstractmethod
    def texts(self) -> list[str]:
        """Captions of all images, in the images' order; empty for those that ``images`` leaves out."""

    @abstractmethod
    def key(self) -> str:
        """What the images depend on, for the cache."""

    @abstractmethod
    def images(self, size: tuple[int, ...]) -> Iterator[Tensor | None]:
        """All images in order, uint8 (3, H, W) of that size; None for one to leave out."""

    def captions(self, n: int) -> list[str]:
        """See ``Data``."""
        return [text for text in self.texts() if text][:n]

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        texts = self.texts()
        stored = self._latents(setting, len(texts))
        latents, texts = stored["latents"], [texts[i] for i in stored["rows"].tolist()]
        cond_of, x0_of = encoded(texts, setting, self.memory), placed(latents, setting.device, self.memory)
        rows_of = epochs(len(latents), setting.batch, setting.seed)
        shape = (setting.batch, *latents.shape[1:])

        def batch(step: Step) -> Batch:
            rows = rows_of(step.index)
            return Batch(cond_of(rows), shape, x0=x0_of(rows))

        return batch

    def _latents(self, setting: Setting, count: int) -> dict[str, Tensor]:
        """``latents`` (N, ...), the posterior's modes, and ``rows`` (N,), the numbers of their images."""
        opened = setting.opened
        size = image_shape(opened)
        if len(size) != 3 or size[0] != 3:
            raise ValueError(f"data {type(self).__name__} holds images in colour; the teacher makes {size}")
        vae = companions(opened).get("vae")
        law = {} if vae is None else {k: v for k, v in vae.config.items() if not k.startswith("_")}
        weights = "" if vae is None else weights_hash(vae)

        def make() -> dict[str, Tensor]:
            at_once = max(1, min(64, PIXELS_AT_ONCE // math.prod(size[1:])))
            latents, rows, waiting = [], [], []

            def flush() -> None:
                if waiting:
                    part = torch.stack(waiting).to(setting.device).float() / 127.5 - 1
                    latents.append(opened.to_latents(part).cpu())
                    waiting.clear()

            with lent(opened, setting.device, vae=True), Progress("encoding images", 0, count) as progress:
                for row, image in enumerate(self.images(size)):
                    if image is not None:
                        rows.append(row)
                        waiting.append(image)
                    if len(waiting) == at_once:
                        flush()
                    progress.advance()
                flush()
            return {"latents": torch.cat(latents), "rows": torch.tensor(rows)}

        key = f"{self.key()} {size} {sorted(law.items(), key=lambda item: item[0])} {weights}"
        return cached(setting.cache, "latents", key, ("latents", "rows"), make)


@dataclass(frozen=True)
class Captioned(ImageSource):
    """A folder of images with their captions.

    Either ``metadata.jsonl`` names them, ``{"file_name": "a.png", "text": "..."}`` a line, as Hugging Face's image
    folders do; or ``NAME.txt`` stands beside each ``NAME.png``, ``.jpg``, ``.jpeg`` or ``.webp``. Images are scaled
    and cropped around the middle to the teacher's size.
    """

    folder: str
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about an image that cannot be read or has no caption: stop, or leave it out and say how many."""

    def texts(self) -> list[str]:
        """See ``ImageSource``."""
        return [text for _, text in self._listed()]

    def key(self) -> str:
        """See ``ImageSource``."""
        digest = hashlib.sha256()
        for path, text in self._listed():
            stat = path.stat() if path.is_file() else None
            digest.update(repr((path.name, bool(text), stat and (stat.st_size, stat.st_mtime_ns))).encode())
        return f"captioned {Path(self.folder).resolve()} {self.on_error} {digest.hexdigest()}"

    def images(self, size: tuple[int, ...]) -> Iterator[Tensor | None]:
        """See ``ImageSource``."""
        listed, left_out = self._listed(), []
        for path, text in listed:
            image = None
            try:
                if not text:
                    raise ValueError("no caption")
                image = _read_image(path, (size[2], size[1]))
            except Exception as error:  # decoders raise what they like
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if self.on_error == "stop":
                    raise ValueError(
                        f"data.folder: image {path} cannot be used ({reason}); mend or remove it, or set "
                        "data.on_error to 'skip'"
                    ) from error
                left_out.append(f"{path.name} ({reason})")
            yield image
        if len(left_out) == len(listed):
            raise ValueError(f"data.folder {self.folder}: no image can be used, the first is {left_out[0]}")
        if left_out:
            warnings.warn(
                f"{self.folder}: {len(left_out)} of {len(listed)} images cannot be used and are left out, "
                f"the first is {left_out[0]}",
                stacklevel=2,
            )

    def _listed(self) -> list[tuple[Path, str]]:
        """Images, none of them opened, and their captions, empty where there is none.

        Raises:
            ValueError: in one line, if the folder is missing or empty, metadata are damaged, or, unless ``on_error``
                is "skip", a caption is missing.
        """
        folder = Path(self.folder)
        if not folder.is_dir():
            raise ValueError(f"data.folder {folder}: no such folder")
        metadata = folder / "metadata.jsonl"
        listed = list(_in_metadata(metadata) if metadata.is_file() else _beside(folder))
        if not listed:
            raise ValueError(
                f"data.folder {folder}: no images with captions there; give metadata.jsonl, or NAME.txt beside NAME.png"
            )
        uncaptioned = next((path for path, text in listed if not text), None)
        if uncaptioned is not None and self.on_error == "stop":
            raise ValueError(
                f"data.folder: image {uncaptioned} has no caption; write one, or set data.on_error to 'skip'"
            )
        return listed


def _in_metadata(metadata: Path) -> Iterator[tuple[Path, str]]:
    for number, line in enumerate(read_utf8(metadata, "data.folder").split("\n"), 1):
        if line.strip():
            where = f"data.folder {metadata}, line {number}"
            row, text = text_of(line, where)
            if not isinstance(row.get("file_name"), str):
                raise ValueError(f"{where}: no file_name")
            yield metadata.parent / row["file_name"], text.strip()


def _beside(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            caption = path.with_suffix(".txt")
            yield path, read_utf8(caption, "data.folder").strip() if caption.is_file() else ""


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An image, uint8 (3, H, W): upright, on white where it is transparent, scaled and cropped to (W, H)."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


@dataclass(frozen=True)
class ShapesData(ImageSource):
    """Made-up scenes of ``stepdistill.shapes`` with their captions, what the bundled text-to-image teachers learned."""

    count: int = 8192
    seed: int = 0
    dropout: float = 0.15
    """Chance of each attribute to be left out of its caption."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        check_made_up(self.count, self.dropout)

    def texts(self) -> list[str]:
        """See ``ImageSource``."""
        return shapes.captions(_scenes(self.count, self.seed).attributes, self.seed, self.dropout).texts

    def key(self) -> str:
        """See ``ImageSource``."""
        return f"shapes {self.count} {self.seed}"

    def images(self, size: tuple[int, ...]) -> Iterator[Tensor | None]:
        """See ``ImageSource``."""
        if size[1:] != (shapes.SIZE, shapes.SIZE):
            raise ValueError(f"data ShapesData holds images of {shapes.SIZE}x{shapes.SIZE}; the teacher makes {size}")
        yield from _scenes(self.count, self.seed).images


@functools.lru_cache(maxsize=1)
def _scenes(count: int, seed: int) -> shapes.Scenes:
    return shapes.draw(count, seed)
