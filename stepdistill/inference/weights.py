"""Whether weights are still those that something was computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PROBES = 16
"""Entries of each tensor that are looked at; LoRA updates are dense, so any few of them give one away."""


_DTYPES: WeakKeyDictionary[nn.Module, tuple[torch.dtype, torch.dtype]] = WeakKeyDictionary()


def dtype_of(module: nn.Module) -> torch.dtype:
    """``module.dtype`` of diffusers, which walks all parameters each time; asked again when the first one's changes."""
    first = next(module.parameters()).dtype
    known = _DTYPES.get(module)
    if known is None or known[0] != first:
        known = _DTYPES[module] = first, module.dtype
    return known[1]


def with_children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """All of them and what is in them; ``nn.Module.modules`` makes names for each, which takes its time."""
    found = list(modules)
    for module in found:  # grows on the way
        found += [child for child in module._modules.values() if child is not None]
    return found


class WeightWatch:
    """Notices that modules, their adapters or their weights are no longer what they were when last looked at.

    Modules that were exchanged (a LoRA that was loaded), adapters that were switched, scaled or merged, weights that
    moved (another device or dtype) or were written (``_version``) show without reading any weight, by ``moved``.
    Writing through ``.data``, as peft does when it merges an adapter, shows in none of these; ``rewritten`` reads a few
    entries of each tensor instead, which on a GPU waits for it.

    Args:
        modules: finds the modules, children included, each time anew.
    """

    def __init__(self, modules: Callable[[], Iterable[nn.Module]]):
        self.modules = modules
        self.remember()

    def remember(self) -> None:
        """What is there now is what it shall be compared with."""
        self._state = self._look()
        tensors = [t for m in self.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        # matrices and kernels: adapters merge into no others
        self._views = [t.detach().reshape(-1)[:: max(1, t.numel() // PROBES)] for t in tensors if t.ndim > 1]
        self._probed = self._probe()

    def moved(self) -> bool:
        """Whether anything changed that shows from outside."""
        return self._look() != self._state

    def rewritten(self) -> bool:
        """Whether anything changed at all."""
        if self.moved():
            return True
        return any(not torch.equal(a, b) for a, b in zip(self._probe(), self._probed, strict=True))

    def _look(self) -> list[object]:
        seen: list[object] = []
        for module in self.modules():
            seen.append(id(module))
            for group in (module._parameters, module._buffers):
                for t in group.values():
                    if t is not None:  # another dtype lies elsewhere
                        seen += (t.data_ptr(), None if t.is_inference() else t._version)
            if isinstance(module, BaseTunerLayer):
                seen += (tuple(module.merged_adapters), module.disable_adapters, tuple(module.active_adapters))
                seen.append(tuple(module.scaling.items()))
        return seen

    def _probe(self) -> list[Tensor]:
        """One tensor for each device and dtype."""
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for view in self._views:
            groups.setdefault((view.device, view.dtype), []).append(view)
        return [torch.cat(group) for group in groups.values()]
