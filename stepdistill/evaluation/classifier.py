"""The judge of the digits benchmark: a small CNN whose penultimate layer is the space of the Frechet distance."""

from os import PathLike
from pathlib import Path

import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class DigitClassifier(nn.Module):
    """Three convolutions, a 64-wide layer and a linear read-out; about 45 k parameters, float32.

    SiLU and average pooling keep the features smooth in the pixels. There is no batch statistic and
    no dropout inside, so an image's features depend on that image alone, in train and in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, 32)
        self.norm3 = nn.GroupNorm(8, 32)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, 64) of images (B, 1, 8, 8) in [-1, 1]; bounded below by SiLU's -0.28."""
        h = F.silu(self.conv1(images))
        h = F.silu(self.norm2(self.conv2(h)))
        h = F.avg_pool2d(h, 2)  # (B, 32, 4, 4)
        h = F.silu(self.norm3(self.conv3(h)))
        return F.silu(self.hidden(h.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8) in [-1, 1]."""
        return self.head(self.features(images))


def load_digit_classifier(path: str | PathLike[str]) -> DigitClassifier:
    """The classifier stored at `path` (safetensors only), in eval mode, float32, on the CPU, without gradients."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no digit classifier at {path}; rebuild it with `python train/digits_teacher.py`")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    model = DigitClassifier()
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in state.items()}
    if found != wanted:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        name = wrong[0]
        raise ValueError(
            f"{path} is not a digit classifier: {name} has shape {found.get(name)}, expected {wanted.get(name)} "
            f"({len(wrong)} such tensors)"
        )
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
