"""How a recipe trains: each player's optimizer, and the run's lengths and frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer


@dataclass(frozen=True)
class AdamW:
    """One player's optimizer (arXiv:1711.05101) and its learning rate over training."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""
    final: float = 0.02
    """Where it falls to, as a share of ``lr``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("lr", "weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"AdamW.{name} must be at least 0; got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"AdamW.betas must lie in [0, 1); got {list(self.betas)}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"AdamW.eps must be above 0; got {self.eps}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"AdamW.final must lie in [0, 1]; got {self.final}")

    def build(self, params: Iterator[torch.nn.Parameter]) -> Optimizer:
        """The optimizer, with one fused kernel for the whole update."""
        return torch.optim.AdamW(
            params, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps, fused=True
        )

    def rate(self, index: int, steps: int) -> float:
        """Learning rate of step ``index`` of ``steps``; a pure function, so there is nothing to checkpoint."""
        if index < self.warmup:
            return self.lr * (index + 1) / self.warmup
        done = (index - self.warmup) / max(steps - self.warmup, 1)
        if self.decay == "linear":
            return self.lr * (1 - (1 - self.final) * done)
        if self.decay == "cosine":
            return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))
        return self.lr


@dataclass(frozen=True)
class Run:
    """How long and how a recipe trains, and how often it reports."""

    steps: int = 1000
    """Steps of the trainer; every turn that is due is taken in each."""
    batch: int = 64
    """Samples of one micro-batch, over all processes: a recipe means the same however many share its batches."""
    accumulate: int = 1
    """Micro-batches of one update."""
    seed: int = 0
    """Of all randomness: the same seed gives the same run, bit for bit on CPU."""
    ema: float = 0.99
    """Decay of the running average of the student that is evaluated and exported."""
    clip: float = 1.0
    """Largest gradient norm of a turn; 0 does not clip."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    preview_every: int = 0
    """Steps between pictures in samples/; 0 makes one, at the end."""
    health_every: int = 200
    """Steps between lines of health.jsonl, see ``stepdistill.health``, from the start on and at the end; 0 is never.
    It changes nothing of the run, and costs about as much as one step each time, sixteen of the teacher's at first."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves at the end and on an interrupt only."""
    keep_last: int = 2
    """Checkpoints kept."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1. Times are float64, which mps has not."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice. Small networks are fastest on one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic inside networks; weights, conversions and losses stay float32. Losses are scaled for float16."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go beside metrics.jsonl; each is an extra of its name: pip install 'stepdistill[tensorboard]'."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "batch", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1; got {getattr(self, name)}")
        for name in ("clip", "preview_every", "health_every", "save_every", "threads"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"run.{name} must be at least 0; got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"run.ema must lie in [0, 1); got {self.ema}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed must lie in [0, 2^63); got {self.seed}")
