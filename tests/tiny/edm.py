"""A ConsistencyModelPipeline, randomly initialised."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from tests.tiny.unet2d import pipeline as unet2d


def pipeline(**changes: Any) -> ConsistencyModelPipeline:
    """The whole of it; ``changes`` go to the UNet."""
    torch.manual_seed(0)
    return ConsistencyModelPipeline(unet2d(**changes).unet.eval(), CMStochasticIterativeScheduler())
