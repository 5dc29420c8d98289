"""Training of the two judges: the attribute classifier and the open_clip model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from open_clip import CLIP
from torch import Tensor, nn

from shapes_parts.assets import rounded
from shapes_parts.loop import Plan, Trained, train
from shapes_parts.losses import attribute_loss, split_heads
from shapes_parts.text import EMBED, clip_ids, make_clip
from stepdistill.evaluation.shapes import ShapesClassifier
from stepdistill.shapes import ABSENT, HEADS, Scenes, caption, captions, draw

CLIP_PLAN = Plan("clip", steps=1000, lr=2e-3, ema=0.995, decay=0.4)
CLIP_BATCH = 96
LOGIT_SCALE = 12.0
CLASSIFIER = Plan("classifier", steps=2000, lr=2e-3, ema=0.995)


class Stream:
    """Fresh scenes for ever, drawn a few thousand at a time; batch ``i`` is a function of ``i`` alone."""

    def __init__(self, batch: int, seed: int, pool: int = 4096):
        self.batch, self.seed, self.per_pool = batch, seed, pool // batch
        self.index, self.scenes = -1, None

    def __call__(self, index: int) -> Scenes:
        pool, place = divmod(index, self.per_pool)
        if pool != self.index or self.scenes is None:
            self.index, self.scenes = pool, draw(self.per_pool * self.batch, self.seed + pool)
        rows = slice(place * self.batch, (place + 1) * self.batch)
        return Scenes(*(tensor[rows] for tensor in self.scenes))


def scaled(images: Tensor) -> Tensor:
    """From uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def spoiled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, 32, 32) in [-1, 1], two in five blurred once or twice, half with noise of a deviation below 0.2."""
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(3, 1, 3, 3)
    degree = torch.rand(len(images), generator=generator)
    for chance in (0.4, 0.2):
        blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
        images = torch.where((degree < chance)[:, None, None, None], blurred, images)
    deviation = 0.4 * (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5).clamp_min(0)
    return images + deviation * torch.randn(images.shape, generator=generator)


def train_classifier() -> Trained:
    """Cross-entropy on fresh scenes, blurred and noisy ones among them, with dropout on the features."""
    stream = Stream(64, seed=1_000)

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, ShapesClassifier)
        scenes = stream(step)
        features = model.features(spoiled(scaled(scenes.images), generator))
        keep = (torch.rand(features.shape, generator=generator) < 0.8) / 0.8
        logits = model.read(features * keep)
        return {"loss": attribute_loss(logits, scenes.attributes)}

    return train(CLASSIFIER, ShapesClassifier, loss)


class Contrast(nn.Module):
    """An open_clip model and two linear read-outs of attributes, which serve its training only."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = make_clip()
        self.clip.logit_scale.data.fill_(math.log(LOGIT_SCALE)).requires_grad_(False)
        self.clip.logit_scale.requires_grad_(False)
        values = sum(map(len, HEADS.values()))
        self.seen, self.read = nn.Linear(EMBED, values), nn.Linear(EMBED, values)


def swapped(attributes: Tensor, named: Tensor, generator: torch.Generator) -> Tensor:
    """Attributes (N, 7) with one named attribute of each scene given another value; "single" stays."""
    chances = named.float()
    chances[:, 0] *= attributes[:, 0] > 0
    chances[chances.sum(1) == 0, 0] = 1  # names nothing that could change: nothing is
    column = torch.multinomial(chances, 1, generator=generator)[:, 0]
    rows = torch.arange(len(attributes))
    counts = torch.tensor([len(values) for values in HEADS.values()])[column]
    shift = 1 + (torch.rand(len(rows), generator=generator) * (counts - 1)).long()
    other = (attributes[rows, column] + shift) % counts
    layout = attributes[:, 0]
    other = torch.where(column == 0, torch.where(layout > 0, 3 - layout, 0), other)
    changed = attributes.clone()
    changed[rows, column] = other
    return changed


def train_clip() -> Trained:
    """Symmetric contrastive loss; each image also against its caption with one attribute swapped, twice.

    A caption that is true of another image of the batch is not held against it. A fixed, low logit scale makes the
    margins wide, and read-outs of the attributes keep shapes apart, which contrast alone learns late.
    """
    stream = Stream(CLIP_BATCH, seed=4_000_000)

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(model, Contrast)
        scenes = stream(step)
        told = captions(scenes.attributes, step, 0.2)
        others = [swapped(scenes.attributes, told.named, generator) for _ in range(2)]
        attributes = torch.cat([scenes.attributes, *others])  # of all texts, (3B, 7)
        named = told.named.repeat(3, 1)
        rows = zip(attributes.tolist(), named.tolist(), strict=True)
        image = model.clip.visual(spoiled(scaled(scenes.images), generator))
        text = model.clip.encode_text(clip_ids([caption(values, flags) for values, flags in rows]))
        true = ((scenes.attributes[:, None] == attributes) | ~named).all(2)  # (B, 3B)
        own = torch.eye(CLIP_BATCH, 3 * CLIP_BATCH, dtype=torch.bool)
        logits = LOGIT_SCALE * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        logits = logits.masked_fill(true & ~own, -100.0)
        target = torch.arange(CLIP_BATCH)
        contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :CLIP_BATCH].T, target)
        seen = attribute_loss(split_heads(model.seen(image)), scenes.attributes)
        read = attribute_loss(split_heads(model.read(text)), attributes.masked_fill(~named, ABSENT))
        right = (logits.argmax(1) == target).float().mean()
        return {"loss": contrast + 0.2 * seen + 0.2 * read, "seen": seen, "read": read, "right": right}

    return train(CLIP_PLAN, Contrast, loss, lambda average: str(clip_drops(average.clip, 500, 98)), watch_every=300)


def trained_clip() -> CLIP:
    """The open_clip model as its file holds it; trained if it is not yet."""
    return rounded(train_clip().average).clip


@torch.no_grad()
def clip_drops(clip: CLIP, n: int, seed: int) -> dict[str, float]:
    """Mean CLIP score of full captions, and of the same with one attribute of the first shape or background wrong."""
    clip.eval()
    scenes = draw(n, seed)
    image = torch.cat([F.normalize(clip.visual(scaled(part)), dim=1) for part in scenes.images.split(250)])
    scores = {}
    for name in ("", "shape", "colour", "background"):
        attributes = scenes.attributes.clone()
        if name:
            column = list(HEADS).index(name)
            attributes[:, column] = (attributes[:, column] + 1 + torch.arange(n) % 3) % len(HEADS[name])
        texts = captions(attributes, 0, dropout=0.0).texts
        text = torch.cat([F.normalize(clip.encode_text(part), dim=1) for part in clip_ids(texts).split(250)])
        scores[f"wrong_{name}" if name else "right"] = round(100 * float((image * text).sum(1).mean()), 2)
    return scores
