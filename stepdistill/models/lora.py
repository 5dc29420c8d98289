"""LoRA on one frozen network: every role is a set of adapters, switched on for its own forward and no longer.

A teacher is the network as it is. A student, a critic and a running average may be adapters on that same network, so
that a method that needs three of them holds one. PEFT makes the layers; who is on is decided here, since its own switch
is one for the whole network and outlives the call.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_BOARD = "_stepdistill_roles"


class Switchboard:
    """Which role's adapters act in a network. None do outside ``playing``."""

    def __init__(self, net: nn.Module):
        self.net = net
        self.layers: list[LoraLayer] = []
        self.role: str | None = None
        self.count = 0

    @classmethod
    def of(cls, net: nn.Module) -> Switchboard:
        """The network's own, made at the first call."""
        if not hasattr(net, _BOARD):
            setattr(net, _BOARD, cls(net))
        return getattr(net, _BOARD)

    def add(self, rank: int, alpha: float, targets: Sequence[str]) -> str:
        """Inject adapters that change nothing yet; returns their role's name.

        Raises:
            ValueError: if no layer of the network is called by one of ``targets``.
        """
        names = [n for n, _ in self.net.named_modules() if ".base_layer" not in n and ".lora_" not in n]
        unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
        if unknown or not targets:
            raise ValueError(f"LoRA target {(*unknown, '')[0]!r} names no layer of {type(self.net).__name__}")
        role = f"role{self.count}"
        self.count += 1
        trained = [p for p in self.net.parameters() if p.requires_grad]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several roles are the point
            inject_adapter_in_model(config, self.net, adapter_name=role)
        for p in trained:
            p.requires_grad_(True)  # PEFT lets its newest adapter train and nobody else
        self.layers = [m for m in self.net.modules() if isinstance(m, LoraLayer)]
        self._replay_when_checkpointing()
        self.switch(None)
        return role

    def switch(self, role: str | None) -> None:
        """Let ``role``'s adapters act from now on; None lets nobody's. A few attributes, no walk over the network."""
        self.role = role
        for layer in self.layers:
            state = layer.__dict__  # nn.Module's own way of setting attributes is ten times as slow
            state["_disable_adapters"] = role is None
            if role is not None:
                state["_active_adapter"] = [role]

    @contextmanager
    def playing(self, role: str | None) -> Iterator[None]:
        """``role`` acts within the block, and whoever did before acts after it."""
        before = self.role
        self.switch(role)
        try:
            yield
        finally:
            self.switch(before)

    def checkpointed(self, module: nn.Module, *args: Any) -> Any:
        """Gradient checkpointing that recomputes as the role that ran: by then another one may be switched on."""
        role = self.role

        def run(*args: Any) -> Any:
            with self.playing(role):
                return module(*args)

        return checkpoint(run, *args, use_reentrant=False)

    def _replay_when_checkpointing(self) -> None:
        for module in self.net.modules():
            if hasattr(module, "gradient_checkpointing"):
                module._gradient_checkpointing_func = self.checkpointed
        if hasattr(type(self.net), "enable_gradient_checkpointing"):
            self.net.enable_gradient_checkpointing = self.enable_gradient_checkpointing

    def enable_gradient_checkpointing(self) -> None:
        """The network's own, for whoever switches it on later, with our recomputation."""
        type(self.net).enable_gradient_checkpointing(self.net, self.checkpointed)


class Around(nn.Module, ABC):
    """A module around a network that diffusers knows: calls it, and has weights of its own."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The network."""


class Adapted(Around):
    """One role on a shared network: called as the network is, and holds its own LoRA weights alone.

    The network is not part of this module's parameters or state; ``copy.deepcopy`` makes a new role on the same
    network with the same weights. At the start its output is the bare network's, bit for bit.

    Args:
        backbone: the network; frozen here, and adapted in place (a bare call of it is unchanged).
        rank: of the updates.
        alpha: their scale is alpha / rank.
        targets: ends of the names of the layers to adapt.

    Raises:
        ValueError: if a target names no layer.
    """

    def __init__(self, backbone: nn.Module, rank: int, alpha: float, targets: Sequence[str]):
        super().__init__()
        board = Switchboard.of(backbone)
        self._board = (board,)  # in a tuple: not a submodule
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)
        self.role = board.add(rank, alpha, targets)
        for name, p in backbone.named_parameters():
            if ".lora_" not in name:
                p.requires_grad_(False)
        for name, layer in backbone.named_modules():
            if isinstance(layer, LoraLayer) and self.role in layer.lora_A:
                self.add_module(_key(name, "lora_A"), layer.lora_A[self.role])
                self.add_module(_key(name, "lora_B"), layer.lora_B[self.role])
        self.requires_grad_(True)

    @property
    def backbone(self) -> nn.Module:
        """The shared network."""
        return self._board[0].net

    @property
    def config(self) -> Any:
        """The network's."""
        return self.backbone.config

    def lora_state(self) -> dict[str, Tensor]:
        """The weights under the names of PEFT: ``LAYER.lora_A.weight``."""
        return {key.replace("/", "."): value for key, value in self.state_dict().items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        """A new role with these weights."""
        new = Adapted(self.backbone, self.rank, self.alpha, self.targets)
        new.load_state_dict(self.state_dict())
        memo[id(self)] = new
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network with this role's adapters."""
        (board,) = self._board
        with board.playing(self.role):
            return board.net(*args, **kwargs)


def _key(layer: str, part: str) -> str:
    return f"{layer}.{part}".replace(".", "/")  # module names cannot hold dots


def network_of(net: nn.Module) -> nn.Module:
    """The network that runs when ``net`` is called: itself, or the one it is around."""
    return net.backbone if isinstance(net, Around) else net


def has_adapters(net: nn.Module) -> bool:
    """Whether roles are adapted on this very network."""
    return hasattr(net, _BOARD)


def bare_state(net: nn.Module) -> dict[str, Tensor]:
    """A network's own state, whether adapters have been injected or not."""
    return {key.replace(".base_layer.", "."): value for key, value in net.state_dict().items() if ".lora_" not in key}


def merged_state(net: Adapted) -> dict[str, Tensor]:
    """The adapted network as one without adapters: its state with this role's updates added in."""
    state = bare_state(net.backbone)
    for name, layer in net.backbone.named_modules():
        if isinstance(layer, LoraLayer) and net.role in layer.lora_A:
            key = f"{name}.weight"
            state[key] = state[key] + layer.get_delta_weight(net.role).to(state[key])
    return state
