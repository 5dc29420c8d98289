"""Activations of a network's submodules, by forward hooks: no copy of anybody's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Tap(NamedTuple):
    """A submodule whose output a discriminator may read."""

    name: str
    """As ``named_modules`` spells it."""
    channels: int
    output: int = 0
    """Which output, where it answers with a tuple."""
    tokens: bool = False
    """(B, L, C) tokens in raster order instead of (B, C, H, W)."""
    patch: int = 0
    """Side of a token's patch, where tokens of something else follow the image's; 0 if all are the image's."""


class _Reached(Exception):
    """Raised after the last tap, so that layers nobody asked about do not run."""


def tapped(
    net: nn.Module,
    names: Sequence[str],
    run: Callable[[], object],
    *,
    outputs: Sequence[int] | None = None,
    stop: bool = True,
) -> list[Tensor]:
    """The outputs of ``names`` while ``run()`` calls ``net``, in the order of ``names``.

    Args:
        net: the network that ``run`` evaluates.
        names: submodules as ``named_modules`` spells them.
        run: evaluates the network once.
        outputs: which element of a block that returns a tuple; None takes the first of each.
        stop: leave the forward after the last tap has been seen. Switch off under wrappers whose post-forward hooks
            must run.

    Returns:
        One tensor per name, with its graph.

    Raises:
        ValueError: if a name is no submodule, or was not reached by the forward.
    """
    modules = dict(net.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"no submodule {unknown[0]!r} to tap; the network has {', '.join(n for n in modules if n)}")
    found: dict[str, Tensor] = {}
    element = dict(zip(names, outputs or [0] * len(names), strict=True))

    def record(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            found[name] = output[element[name]] if isinstance(output, tuple) else output
            if stop and len(found) == len(names):
                raise _Reached

        return hook

    handles = [modules[name].register_forward_hook(record(name)) for name in names]
    try:
        run()
    except _Reached:
        pass  # every tap is in; the rest of the forward is not needed
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"tap {missing[0]!r} was not reached by the forward")
    return [found[name] for name in names]
