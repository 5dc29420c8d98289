"""CLIP from local weights, of open_clip or transformers: image features, and the CLIP score.

torchmetrics 1.9's ``CLIPScore`` fails with transformers 5 (its ``get_image_features`` expects a tensor) and clamps its
mean at 0, so the score is our own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stepdistill.evaluation.extractors import ImageFeatures, from_folder
from stepdistill.evaluation.resize import Resize
from stepdistill.evaluation.weights import find_weights, sha256_of

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of channels, of images in [0, 1]."""
TEXTS = 64
"""Prompts encoded together."""


@dataclass(frozen=True)
class Clip:
    """Both sides of a CLIP model."""

    images: ImageFeatures
    """Projected image embeddings, rows of length 1: an ``Extractor``."""
    encode: Callable[[list[str]], Tensor]
    """Prompts -> projected text embeddings (B, D)."""

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, D) float32 of prompts, rows of length 1, on the CPU. What a tokenizer cuts off is not seen."""
        parts = [list(prompts[start : start + TEXTS]) for start in range(0, len(prompts), TEXTS)]
        return torch.cat([normalize(self.encode(part).float().cpu(), dim=1) for part in parts])

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """CLIP score of each image and its own prompt: 100 times the cosine, arXiv:2104.08718 without its factor.

        No prefix is put before prompts and nothing is clamped.

        Args:
            images: uint8 (B, 3, H, W).
            prompts: as many.

        Returns:
            float32 (B,) on the CPU.

        Raises:
            ValueError: if images and prompts differ in number, or images break the contract.
        """
        if len(images) != len(prompts) or not len(prompts):
            raise ValueError(f"CLIP score needs one prompt an image; got {len(images)} images, {len(prompts)} prompts")
        return agreement(self.images(images), self.texts(prompts))


def agreement(images: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine, row by row: (B, D), (B, D) -> (B,)."""
    return 100 * (normalize(images, dim=1) * normalize(texts, dim=1)).sum(1)


def open_clip_model(
    weights: str | PathLike[str] | None = None,
    *,
    architecture: str | None = None,
    how: Resize | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> Clip:
    """A CLIP model of open_clip.

    Args:
        weights: a folder with open_clip_config.json, weights and tokenizer, as open_clip's ``local-dir:`` takes it, or
            a safetensors file of an ``architecture``; None: the folder ``open-clip`` in ``STEPDISTILL_WEIGHTS``.
        architecture: open_clip's name of a file's network, for example "ViT-L-14".
        how: images reach its size; default: as the model's own configuration says.
        device: where it runs.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if the folder, the file or the architecture does not fit, or the model's resize has no name here.
    """
    import open_clip  # takes its time

    path = find_weights(weights, "open-clip", "open_clip folder or safetensors file")
    if path.is_dir() == (architecture is not None):
        raise ValueError(f"open_clip takes a folder, or a file with its architecture; got {path} and {architecture}")
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a safetensors file; open_clip models are published as safetensors, too")
    name = f"local-dir:{path}" if architecture is None else architecture
    try:
        model = open_clip.create_model(name, pretrained=None if architecture is None else str(path))
        tokenize = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no open_clip model: {str(error).splitlines()[0]}") from error
    model = model.float().eval().requires_grad_(False).to(device)
    config = model.visual.preprocess_cfg
    size = config["size"][0] if isinstance(config["size"], tuple | list) else config["size"]
    own = {"shortest": "clip", "squash": "pil"}.get(config["resize_mode"])
    if how is None and (own is None or config["interpolation"] != "bicubic"):
        raise ValueError(
            f"{path} asks for resize {config['resize_mode']!r} by {config['interpolation']}, which is none of ours; "
            "say how to resize"
        )
    images = ImageFeatures(
        lambda x: model.encode_image(x, normalize=True),
        name=f"open_clip-{architecture or path.name}",
        sha256=sha256_of(path),
        dim=_width(model.encode_image, size, device),
        how=how or own,
        size=size,
        mean=[255 * v for v in config["mean"]],
        std=[255 * v for v in config["std"]],
        device=device,
        batch_size=batch_size,
    )
    return Clip(images, lambda prompts: model.encode_text(tokenize(prompts).to(device)))


def transformers_clip(
    weights: str | PathLike[str] | None = None,
    *,
    how: Resize = "clip",
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> Clip:
    """A CLIP model of transformers.

    Args:
        weights: a folder of ``CLIPModel`` with its tokenizer; None: the folder ``clip-vit-large-patch14-336`` in
            ``STEPDISTILL_WEIGHTS``, CMMD's.
        how: "clip" crops the middle; "cmmd" for CMMD as published.
        device: where it runs.
        batch_size: images per forward pass.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds another model, or no tokenizer.
    """
    from transformers import AutoTokenizer, CLIPModel

    what = "CLIP folder (openai/clip-vit-large-patch14-336 on the Hugging Face hub)"
    path = find_weights(weights, "clip-vit-large-patch14-336", what)
    model = from_folder(CLIPModel, path).to(device)
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        # transformers would make a tokenizer of two words and say nothing.
        raise ValueError(f"{path} has no tokenizer; put its tokenizer.json, or vocab.json and merges.txt, there")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    length = model.config.text_config.max_position_embeddings
    mean, std = _statistics(path)

    def encode(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = {k: tokens[k].to(device) for k in ("input_ids", "attention_mask")}
        return _tensor(model.get_text_features(**tokens))

    images = ImageFeatures(
        lambda x: normalize(_tensor(model.get_image_features(pixel_values=x)), dim=1),
        name=f"clip-{path.name}",
        sha256=sha256_of(path),
        dim=model.config.projection_dim,
        how=how,
        size=model.config.vision_config.image_size,
        mean=[255 * v for v in mean],
        std=[255 * v for v in std],
        device=device,
        batch_size=batch_size,
    )
    return Clip(images, encode)


def _tensor(output: Tensor | object) -> Tensor:
    """Projected embeddings: transformers 4 returns them, transformers 5 an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _statistics(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of channels that the folder's image processor names, else OpenAI's."""
    config = folder / "preprocessor_config.json"
    if not config.is_file():
        return OPENAI
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return values.get("image_mean", OPENAI[0]), values.get("image_std", OPENAI[1])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a JSON object ({error})") from error


@torch.no_grad()
def _width(encode: Callable[[Tensor], Tensor], size: int, device: torch.device | str) -> int:
    return encode(torch.zeros(1, 3, size, size, device=device)).shape[1]
