"""Where networks lie and what of them is kept: sharding, recomputed activations, rest on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill import distributed
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.lora import has_adapters, network_of
from stepdistill.models.nets import Nets
from stepdistill.models.two_time import TwoTime


def check_device(field: str, device: str) -> None:
    """Make sure that a device is there and has float64, in which all times and coefficients are.

    Raises:
        ValueError: naming the field.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises any, by device
        reason = str(error).splitlines()[0]
        raise ValueError(f"{field} {device!r}: cannot be used on this machine ({reason})") from error


@dataclass(frozen=True)
class Placement:
    """Where networks lie: it changes memory and time, and results by no more than rounding. A resumed run may have
    another one.
    """

    shard: bool = False
    """Split every denoising network, the frozen teacher's too, with its gradients and its optimizer over all processes
    (FSDP2). ``accelerate launch`` switches it on where its config says FSDP. Nothing happens in a single process."""
    checkpointing: tuple[str, ...] = ()
    """Networks (teacher, student, critic) whose activations are computed again in backward passes instead of kept."""
    offload: tuple[str, ...] = ()
    """Networks that lie on the CPU and come to the device while they are needed: the teacher, ema, target, and others
    that no optimizer moves."""

    def __post_init__(self) -> None:
        """Check what excludes what."""
        if self.shard and self.offload:
            raise ValueError("placement.offload is for networks that are not sharded; leave one of the two out")


def sharded(placement: Placement) -> bool:
    """Whether networks are split over the processes.

    Raises:
        ValueError: if accelerate's config asks for more than that.
    """
    launcher = _says("ACCELERATE_USE_FSDP")
    if launcher and _says("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("accelerate's fsdp_offload_params: shards stay on their device here; set it to false")
    if launcher and _says("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError("accelerate's fsdp_activation_checkpointing: name networks in placement.checkpointing instead")
    if launcher and placement.offload:
        raise ValueError("placement.offload is for networks that are not sharded, and accelerate's config says FSDP")
    return (placement.shard or launcher) and distributed.world() > 1


def _says(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def recompute(nets: Nets, roles: Iterable[str]) -> None:
    """Let networks compute activations again in backward passes, as diffusers does it: block by block.

    Adapters share their network, and so this setting; the recomputation plays the role that ran (see ``lora``).

    Raises:
        ValueError: if a network cannot.
    """
    for role in roles:
        for denoiser in _of_role(nets, role, "placement.checkpointing"):
            net = network_of(denoiser.net)
            if not getattr(net, "_supports_gradient_checkpointing", False):
                raise ValueError(f"placement.checkpointing {role!r}: {type(net).__name__} cannot do that")
            net.enable_gradient_checkpointing()


def shard(nets: Nets, device: str) -> list[nn.Module]:
    """Split all denoising networks over the processes, on whose devices they then lie.

    Each member of a network's own lists of blocks is gathered for itself, whatever is left with the network. Before
    this nobody may have listed their parameters, and no optimizer may hold them. Heads and a method's other modules
    are small and stay whole.

    Returns:
        Modules that stay gathered until they are told to ``reshard``. FSDP gathers a network for a backward pass when
        the pass reaches the network's output, and the features that a discriminator reads never get there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (distributed.world(),))
    for denoiser in _denoisers(nets):
        network = network_of(denoiser.net)
        blocks = [b for part in network.children() if isinstance(part, nn.ModuleList) for b in part]
        second = [denoiser.net.second] if isinstance(denoiser.net, TwoTime) else []
        for module in (*blocks, network, *second):
            if not isinstance(module, FSDPModule) and any(True for _ in module.parameters()):
                # the outermost too: what stays gathered from one turn to the next is older than its shards
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
    gathered = []
    for disc in (net for net in nets.values() if isinstance(net, Discriminator)):
        disc.stops_early = False
        gathered += [m for m in network_of(disc.backbone.net).modules() if isinstance(m, FSDPModule)]
    for module in gathered:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
    return gathered


class Resting:
    """A network that lies on the CPU, and is on the device from its first call until it is sent back.

    Args:
        denoiser: whose network; on the CPU.
        device: where it computes.
        pin: lock its place on the CPU in memory, which makes the way to a card faster.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device | str, *, pin: bool = True):
        self.device, self.here = torch.device(device), False
        self.tensors: list[Tensor] = [*denoiser.net.parameters(), *denoiser.net.buffers()]
        pin = pin and self.device.type == "cuda"
        self.home = [t.data.pin_memory() if pin else t.data for t in self.tensors]
        self._rest()
        self.hook = denoiser.net.register_forward_pre_hook(lambda *_: self.arrive())

    def arrive(self) -> None:
        """Be on the device."""
        if not self.here:
            self.here = True
            for tensor, home in zip(self.tensors, self.home, strict=True):
                tensor.data = self.sent(home)

    def sent(self, home: Tensor) -> Tensor:
        """What lies at home, on the device."""
        return home.to(self.device, non_blocking=True)

    def leave(self, *, changed: bool = False) -> None:
        """Be on the CPU again; no graph may still need the network. What has ``changed`` is taken along."""
        if self.here:
            self.here = False
            if changed:
                for tensor, home in zip(self.tensors, self.home, strict=True):
                    home.copy_(tensor.data)
            self._rest()

    def _rest(self) -> None:
        for tensor, home in zip(self.tensors, self.home, strict=True):
            tensor.data = home


@contextmanager
def visiting(denoiser: Denoiser, device: torch.device | str) -> Iterator[None]:
    """Within the block a network comes to the device when it is called; then it is where it was."""
    if next(denoiser.net.parameters()).device.type == torch.device(device).type:
        yield
        return
    guest = Resting(denoiser, device, pin=False)
    try:
        yield
    finally:
        guest.leave()
        guest.hook.remove()


class Placed:
    """Networks that are on the CPU, or in pieces, between turns.

    Args:
        resting: on the CPU, by role.
        gathered: sharded modules that turns leave whole.
    """

    def __init__(self, resting: Mapping[str, list[Resting]] | None = None, gathered: Sequence[nn.Module] = ()):
        self.resting, self.gathered = dict(resting or {}), tuple(gathered)

    @contextmanager
    def awake(self, role: str) -> Iterator[None]:
        """A network is on the device within the block, also one that rests; it may be changed there."""
        for one in self.resting.get(role, ()):
            one.arrive()
        yield
        for one in self.resting.get(role, ()):
            one.leave(changed=True)

    def after_turn(self) -> None:
        """Everyone goes back; no graph needs them any more."""
        for one in (one for role in self.resting.values() for one in role):
            one.leave()
        for module in self.gathered:
            module.reshard()


def place(nets: Nets, placement: Placement, device: str) -> Placed:
    """Put all networks where they belong, in place.

    Args:
        nets: on the CPU where they are to be sharded or to rest; nobody has listed their parameters yet.
        placement: the rules.
        device: where networks compute.

    Raises:
        ValueError: if a network that shall rest is none of the run's, or is never idle.
    """
    gathered = shard(nets, device) if sharded(placement) else []
    resting = {role: _of_role(nets, role, "placement.offload") for role in placement.offload}
    for role, denoisers in resting.items():
        if any(has_adapters(denoiser.net) for denoiser in denoisers):
            raise ValueError(f"placement.offload {role!r}: others adapt its network, and so use it all the time")
    for role, net in nets.items():
        if role not in resting:
            net.to(device)
            for denoiser in _denoisers(net):
                network_of(denoiser.net).to(device)  # what adapters are on is no part of them
    if "disc" in nets:
        nets["disc"].backbone.to(device)  # no part of it
    return Placed(
        {role: [Resting(denoiser, device) for denoiser in found] for role, found in resting.items()}, gathered
    )


def _denoisers(net: nn.Module) -> list[Denoiser]:
    return [module for module in net.modules() if isinstance(module, Denoiser)]


def _of_role(nets: Nets, role: str, field: str) -> list[Denoiser]:
    found = _denoisers(nets[role]) if role in nets else []
    if not found:
        known = sorted(name for name, net in nets.items() if _denoisers(net))
        raise ValueError(f"{field}: {role!r} is none of the denoising networks of this run: {', '.join(known)}")
    return found
