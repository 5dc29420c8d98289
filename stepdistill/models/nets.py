"""All networks of a run in one place; who moves and who stays fixed; running averages."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stepdistill.distributed import local


class Nets(nn.ModuleDict):
    """Networks by role: ``student``, ``teacher``, ``critic``, ``disc``, ``ema``, ``lpips``, and a method's extras.

    All state of a run lives here, so a checkpoint of it is ``nets.state_dict()`` (but for the teacher and LPIPS, which
    are frozen and opened from their sources again). Read as attributes: ``nets.student``.
    """

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """The state of everyone but those who never change."""
        roles = ((role, net.state_dict()) for role, net in self.items() if role not in ("teacher", "lpips"))
        return {f"{role}.{key}": value for role, state in roles for key, value in state.items()}


def freeze(net: nn.Module, layers: Sequence[str]) -> None:
    """Fix some of a network's weights for good: they become buffers, which nobody trains.

    They are saved, copied and averaged under their names as before, but optimizers, clipping and ``only_trains`` go by
    parameters and so never see them; no gradient is computed for them either.

    Args:
        net: changed in place, before it is first trained.
        layers: ends of the names of the submodules whose weights stay, all that is inside them included; "conv1" is
            every layer called so, "mid_block" a whole block.

    Raises:
        ValueError: if one names no submodule with weights, or nothing is left to move.
    """
    fixed: set[int] = set()
    for end in layers:
        named = [m for name, m in net.named_modules() if name == end or name.endswith(f".{end}")]
        found = {id(p) for module in named for p in module.parameters()}
        if not found:
            raise ValueError(f"freeze: {end!r} names no layer with weights of {type(net).__name__}")
        fixed |= found
    if all(id(p) in fixed for p in net.parameters()):
        raise ValueError(f"freeze: {', '.join(layers)} are all weights of {type(net).__name__}; leave some to move")
    buffers: dict[int, torch.Tensor] = {}  # weights that two modules share stay shared
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(p) in fixed:
                delattr(module, name)
                module.__dict__.setdefault(_FROZEN, set()).add(name)
                module.register_buffer(name, buffers.setdefault(id(p), p.detach()))


_FROZEN = "_stepdistill_frozen"


def is_weight(module: nn.Module, name: str) -> bool:
    """Whether a module's own tensor of that name is a weight, free or frozen, rather than a statistic or a table."""
    return name in module._parameters or name in module.__dict__.get(_FROZEN, ())


_LISTED: WeakKeyDictionary[nn.Module, tuple[list[nn.Parameter], list[torch.Tensor]]] = WeakKeyDictionary()


def listed(net: nn.Module) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """A network's parameters and buffers, walked once: for small networks the walk is a sizeable part of an update.

    Whoever gives a network other parameters (adapters, say) does so before it is first trained.
    """
    if net not in _LISTED:
        _LISTED[net] = list(net.parameters()), list(net.buffers())
    return _LISTED[net]


@contextmanager
def only_trains(nets: Nets, moves: tuple[str, ...]) -> Iterator[list[nn.Parameter]]:
    """Within the block the parameters of ``moves`` require gradients and nobody else's do; yields those parameters."""
    for net in nets.values():
        for p in listed(net)[0]:
            p.requires_grad_(False)
    # second, since roles on one network are among the parameters of its owner
    moved = [p for name in moves for p in listed(nets[name])[0]]
    for p in moved:
        p.requires_grad_(True)
    yield moved


def add_averages(nets: Nets, names: Iterable[str]) -> None:
    """Put copies of the student in, unless they are there."""
    for name in names:
        if name not in nets:
            nets[name] = copy.deepcopy(nets.student).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, source: nn.Module, decay: float) -> None:
    """``average <- decay * average + (1 - decay) * source`` for parameters; buffers are copied."""
    (averaged, kept), (moved, current) = listed(average), listed(source)
    if averaged:
        torch._foreach_lerp_([local(p) for p in averaged], [local(p) for p in moved], 1 - decay)
    for a, b in zip(kept, current, strict=True):
        a.copy_(b)
