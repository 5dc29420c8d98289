"""Weights of FID's Inception that are made up, the same wherever they are made."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from stepdistill.evaluation.inception import InceptionV3


def state() -> dict[str, Tensor]:
    """A state dict in the layout of the published file, read-out included; activations stay of order one."""
    shapes = {name: tuple(value.shape) for name, value in InceptionV3().state_dict().items()}
    return {
        name: _values(name, shape) for name, shape in (shapes | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}).items()
    }


def _values(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    draws = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        draws *= np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("running_var") or name.endswith("bn.weight"):
        draws = 1 + 0.1 * np.abs(draws)
    else:
        draws *= 0.1
    return torch.from_numpy(draws)
