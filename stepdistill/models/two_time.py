"""Networks of two times: beside the time they stand at, they are told the time they head for.

A second embedding is added to the network's own embedding of time, by a hook that lives as long as one call: nobody's
forward is copied, and a network that several roles share is changed for none of the others. At inference the second
time is a function of the first, so that the second embedding goes into the first one's weights: see ``fold``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.models.lora import Around, network_of

WAVES = 32
"""Frequencies of the gap's sinusoids."""
FASTEST = 8.0
"""Radians over the whole range of times: far slower than networks' own, since flow maps are smooth in the gap, and
learning from derivatives is stable only where these are small."""

_EMBEDDERS = ("time_embedding", "timestep_embedder", "time_embedder", "t_embedder")


class TwoTime(Around):
    """A network that is told a second time; its last projection starts at zero, so that at first nothing changes.

    What is embedded is the gap between both times and whether the second is negative, which methods use for "the same
    time on the student's own distribution".

    Args:
        net: a denoising network of diffusers, or adapters on one; anything with one embedding of time.
        at: the linear layer to whose output the second embedding is added; None finds the last one of the network's
            time embedding.

    Raises:
        ValueError: if there is no such layer, or more than one.
    """

    def __init__(self, net: nn.Module, at: str | None = None):
        super().__init__()
        self.net = net
        self.at = time_layer(network_of(net)) if at is None else at
        width = network_of(net).get_submodule(self.at).out_features
        self.second = nn.Sequential(nn.Linear(2 * WAVES + 2, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.second[2].weight)
        nn.init.zeros_(self.second[2].bias)
        rates = FASTEST ** torch.linspace(0, 1, WAVES)
        self.register_buffer("rates", rates, persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """The network itself."""
        return network_of(self.net)

    @property
    def config(self) -> Any:
        """The network's."""
        return self.backbone.config

    def embedding(self, gap: Tensor, own: Tensor) -> Tensor:
        """What is added.

        Args:
            gap: from the second time to the first, as fractions of ``t_max``, (B,).
            own: the second time is negative, (B,), boolean.

        Returns:
            (B, width of the time embedding).
        """
        gap = gap.to(self.rates.dtype)[:, None]
        waves = gap * self.rates
        return self.second(torch.cat([waves.cos(), waves.sin(), gap, own[:, None].to(gap)], 1))

    def forward(self, gap: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The network at second times given as to ``embedding``."""
        extra = self.embedding(gap, own)

        def add(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
            return out + extra.to(out.dtype)

        hook = self.backbone.get_submodule(self.at).register_forward_hook(add)
        try:
            return self.net(*args, **kwargs)
        finally:
            hook.remove()


class Towards:
    """A network of two times with the second filled in: what a family calls as it calls the bare network."""

    def __init__(self, net: TwoTime, t: Tensor, s: Tensor, t_max: float):
        self.net = net
        self.gap, self.own = (t - s.abs()) / t_max, s < 0

    @property
    def config(self) -> Any:
        """The network's."""
        return self.net.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's."""
        return self.net(self.gap, self.own, *args, **kwargs)


def time_layer(net: nn.Module) -> str:
    """The name of the last linear layer of a network's embedding of time.

    Raises:
        ValueError: if the network has none, several, or one that depends on more than time.
    """
    modules = {n: m for n, m in net.named_modules() if ".base_layer" not in n and ".lora_" not in n}
    found = [name for name in modules if name.rpartition(".")[2] in _EMBEDDERS]
    if len(found) != 1:
        places = f"embeds time in {len(found)} places" if found else "has no embedding of time that is known here"
        raise ValueError(f"{type(net).__name__} {places}, so it cannot be told a second one; take a one-time method")
    if getattr(modules[found[0]], "cond_proj", None) is not None:
        raise ValueError(
            f"{type(net).__name__}'s embedding of time holds the guidance scale too, which leaves no room for a second "
            "time; set student.told_guidance to False"
        )
    return [n for n, m in modules.items() if n.startswith(f"{found[0]}.") and hasattr(m, "out_features")][-1]


class _Reached(Exception):
    """Raised at the layer that was looked for, so that the rest of the network does not run."""


@torch.no_grad()
def fold(net: TwoTime, bare: nn.Module, run: Callable[[nn.Module], object], gap: Tensor) -> None:
    """Put the second embedding into a bare network's own: at K times the two then give the same, without custom code.

    The last layer's weights and bias move by as little as makes its output at those times right; what it gives at
    other times is nobody's concern.

    Args:
        net: the network of two times.
        bare: its network as a copy without adapters, changed in place.
        run: calls the network it is given at the K times, in one batch.
        gap: from second times to first ones, as fractions of ``t_max``, (K,).

    Raises:
        ValueError: if the network tells some of the times too little apart, or a weight is not finite.
    """
    layer, seen = bare.get_submodule(net.at), []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])
        raise _Reached

    hook = layer.register_forward_pre_hook(look)
    try:
        run(bare)
    except _Reached:
        pass
    finally:
        hook.remove()
    (hidden,) = seen
    wanted = net.embedding(gap, torch.zeros_like(gap, dtype=torch.bool)).double()  # (K, width)
    inputs = hidden.double()  # (K, inputs of the layer)
    if not bool(wanted.isfinite().all() and inputs.isfinite().all()):
        raise ValueError("the student's embedding of time is not finite; export an earlier checkpoint")
    if layer.bias is not None:
        # in units of the inputs, so that weights and bias share the change as they share the output
        unit = inputs.norm(dim=1).mean() / math.sqrt(inputs.shape[1])
        inputs = torch.cat([inputs, unit.expand(len(inputs), 1)], 1)
    change = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution  # (inputs, width): the least of all exact ones
    worst = (inputs @ change - wanted).abs().max()
    if worst > 1e-6 * wanted.abs().max():
        raise ValueError(
            f"the second time cannot be folded into {net.at}: the network tells {len(gap)} times too little apart "
            f"(off by {float(worst):.1e}); use fewer steps"
        )
    weight = change[:-1] if layer.bias is not None else change
    layer.weight.copy_(layer.weight.double() + weight.T)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() + change[-1] * unit)
