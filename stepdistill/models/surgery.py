"""New networks out of a teacher's: copies, fewer layers, one more input."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.models.lora import Adapted, bare_state, merged_state

GUIDANCE_WIDTH = 256
"""Of the embedded guidance scale, as in LCM (arXiv:2310.04378)."""


def bare_copy(net: nn.Module) -> nn.Module:
    """A copy without the adapters that other roles may have put into ``net``."""
    state = bare_state(net)
    if len(state) == len(net.state_dict()):
        return copy.deepcopy(net)
    new = _like(net)
    new.load_state_dict(state)
    return new.train(net.training)


def unadapted(net: nn.Module) -> nn.Module:
    """The network without adapters: those of a LoRA role are added in, other roles' are left out.

    A copy, or ``net`` itself where there is nothing to take away.
    """
    if not isinstance(net, Adapted):
        return bare_copy(net) if any(".lora_" in key for key in net.state_dict()) else net
    merged = bare_copy(net.backbone)
    merged.load_state_dict(merged_state(net))
    return merged


def told_guidance(net: nn.Module) -> nn.Module:
    """A copy of a UNet that is told the guidance scale; at the start the input changes nothing.

    Raises:
        ValueError: if the network's class has no such input.
    """
    if "time_cond_proj_dim" not in net.config:
        raise ValueError(
            f"student.told_guidance: {type(net).__name__} has no input for the guidance scale (time_cond_proj_dim); "
            "use a fixed teacher.guidance"
        )
    new = _like(net, time_cond_proj_dim=GUIDANCE_WIDTH)
    missing, unexpected = new.load_state_dict(bare_state(net), strict=False)
    assert not unexpected and missing == ["time_embedding.cond_proj.weight"], (missing, unexpected)
    nn.init.zeros_(new.time_embedding.cond_proj.weight)
    return new.train(net.training)


def with_layers(net: nn.Module, layers: int) -> nn.Module:
    """A copy with ``layers`` of the teacher's layers, evenly spaced, the first and (from two on) the last among them.

    For transformers these are blocks (``num_layers``), for UNets the layers of each block (``layers_per_block``; up
    blocks have one more). SNOOPI, LCM-SSD and BK-SDM start smaller students so.

    Raises:
        ValueError: if the network does not have more layers than that, or none that can be counted.
    """
    key = next((k for k in ("num_layers", "layers_per_block") if isinstance(net.config.get(k), int)), None)
    if key is None:
        raise ValueError(f"student.layers: {type(net).__name__} has no num_layers or layers_per_block; use 0")
    have = net.config[key]
    if not 1 <= layers < have:
        raise ValueError(f"student.layers {layers}: {type(net).__name__} has {have} ({key}); use 1 to {have - 1}, or 0")
    new = _like(net, **{key: layers})
    theirs, wanted = bare_state(net), new.state_dict()
    kept = {name: _kept(name, wanted, theirs) for name in wanted}
    wrong = [name for name, source in kept.items() if theirs.get(source, _NONE).shape != wanted[name].shape]
    if wrong:
        raise ValueError(f"student.layers {layers}: weight {wrong[0]} has no counterpart in the teacher; use 0")
    new.load_state_dict({name: theirs[source] for name, source in kept.items()})
    return new.train(net.training)


def _like(net: nn.Module, **changes: Any) -> nn.Module:
    """A network of the same class and config, with changes."""
    # "_" keys would put values that were left at their defaults back there, changed or not
    return type(net).from_config({k: v for k, v in net.config.items() if not k.startswith("_")} | changes)


_NONE = torch.empty(0)


def _kept(name: str, wanted: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """The teacher's name of a student's weight: lists of layers that are shorter here are thinned out evenly."""
    mine = source = ""
    for part in name.split("."):
        kept = part
        if part.isdigit():
            few, many = _length(mine, wanted), _length(source, theirs)
            if few < many:
                kept = str(round(int(part) * (many - 1) / max(few - 1, 1)))
        mine, source = f"{mine}{part}.", f"{source}{kept}."
    return source[:-1]


def _length(prefix: str, state: Mapping[str, Tensor]) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})
