"""Class labels, and scikit-learn's real digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stepdistill.data.base import Data, Setting, epochs, to_device
from stepdistill.models.denoiser import Cond, of_samples
from stepdistill.models.families import Opened
from stepdistill.objective import Batch, Step

HELD_OUT_DIGITS = 360
SPLIT_SEED = 0


class Digits(NamedTuple):
    """Grey 8x8 images of handwritten digits; both tensors on the CPU and in the same order."""

    images: Tensor  # (N, 1, 8, 8) float32 in [-1, 1]; -1 is paper, 1 is ink, 17 grey levels 0.125 apart
    labels: Tensor  # (N,) int64 in 0..9


def load_digits(split: Literal["train", "heldout", "all"] = "train") -> Digits:
    """Scikit-learn's 1797 real digits (UCI optdigits, test part), scaled by x / 8 - 1.

    The split is fixed and keeps the class proportions: 1437 images to train on, 360 held out.
    Order is fixed too: shuffled for the two parts, scikit-learn's own for "all".
    """
    import sklearn.datasets  # takes its time
    from sklearn.model_selection import train_test_split

    bunch = sklearn.datasets.load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(bunch.target).long()
    if split == "all":
        return Digits(images, labels)
    train, heldout = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=HELD_OUT_DIGITS, stratify=bunch.target, random_state=SPLIT_SEED
    )
    rows = {"train": train, "heldout": heldout}
    if split not in rows:
        raise ValueError(f"split must be 'train', 'heldout' or 'all', got {split!r}")
    index = torch.from_numpy(rows[split])
    return Digits(images[index], labels[index])


@dataclass(frozen=True)
class Labels(Data):
    """Class labels, all equally likely, and nothing else: for data-free methods."""

    provides = frozenset()

    classes: int = 10
    """Labels are 0 ... classes - 1; 0 gives none, for an unconditional teacher."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.classes < 0:
            raise ValueError(f"data.classes must be at least 0; got {self.classes}")

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        shape = (setting.batch, *setting.opened.sample_shape)
        class_cond(setting.opened, torch.arange(self.classes))  # the network must know all of them

        def batch(step: Step) -> Batch:
            labels = step.integers(self.classes, setting.batch) if self.classes else torch.arange(0)
            return Batch(to_device(class_cond(setting.opened, labels), setting.device), shape)

        return batch


@dataclass(frozen=True)
class DigitsData(Data):
    """Real handwritten digits with their labels: the training split of ``load_digits``, reshuffled every epoch."""

    provides = frozenset({"x0"})

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        digits = load_digits("train")
        if setting.opened.sample_shape != digits.images.shape[1:]:
            raise ValueError(
                f"data DigitsData holds images of shape {tuple(digits.images.shape[1:])}; "
                f"the teacher's are {setting.opened.sample_shape}"
            )
        conditional = bool(self.examples(setting.opened, 1))
        cond = class_cond(setting.opened, digits.labels if conditional else torch.arange(0))
        cond, x0 = to_device(cond, setting.device), digits.images.to(setting.device)
        rows_of = epochs(len(x0), setting.batch, setting.seed)

        def batch(step: Step) -> Batch:
            rows = rows_of(step.index)
            return Batch(of_samples(cond, rows), (setting.batch, *x0.shape[1:]), x0=x0[rows])

        return batch


def class_cond(opened: Opened, labels: Tensor) -> Cond:
    """Conditions of class labels (N,) int64; of none where there are none.

    Raises:
        ValueError: if the teacher takes prompts, or does not know a label.
    """
    if opened.family.cond is None:
        raise ValueError(f"{type(opened.pipeline).__name__} takes prompts, not class labels; use data Prompts")
    return opened.family.cond(opened.denoiser.net, {"labels": labels} if len(labels) else {})
