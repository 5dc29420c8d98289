"""All networks of a run in one place; who moves and who stays fixed; running averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Nets(nn.ModuleDict):
    """Networks by role: ``student``, ``teacher``, ``critic``, ``disc``, ``ema``, and a method's extras.

    All state of a run lives here, so a checkpoint of it is ``nets.state_dict()`` (the frozen teacher excepted: it is
    opened from its source again). Read as attributes: ``nets.student``.
    """

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The state of everyone but the teacher."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("teacher.")}


@contextmanager
def only_trains(nets: Nets, moves: tuple[str, ...]) -> Iterator[list[nn.Parameter]]:
    """Within the block the parameters of ``moves`` require gradients and nobody else's do; yields those parameters."""
    params = []
    for name, net in nets.items():
        moving = name in moves
        for p in net.parameters():
            p.requires_grad_(moving)
            if moving:
                params.append(p)
    yield params


@torch.no_grad()
def update_average(average: nn.Module, source: nn.Module, decay: float) -> None:
    """``average <- decay * average + (1 - decay) * source`` for parameters; buffers are copied."""
    averaged, moved = list(average.parameters()), list(source.parameters())
    if averaged:
        torch._foreach_lerp_(averaged, moved, 1 - decay)
    for a, b in zip(average.buffers(), source.buffers(), strict=True):
        a.copy_(b)
