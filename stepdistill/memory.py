"""Peak memory of a recipe, before it runs.

A rehearsal builds a recipe's networks and takes its steps, by the code of a real run, on fake tensors: what is alive
at once in it will be alive in the run.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stepdistill import distributed
from stepdistill.build import build
from stepdistill.data import Data, DigitsData, Setting, TeacherPairs
from stepdistill.data.base import MEMORY, to_device
from stepdistill.data.classes import load_digits
from stepdistill.data.hub import HubImages
from stepdistill.data.images import ImageSource
from stepdistill.data.prompts import PromptSource
from stepdistill.models.denoiser import Cond
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.families import Opened
from stepdistill.models.lora import network_of
from stepdistill.objective import Batch, Step
from stepdistill.recipe import Recipe
from stepdistill.rehearsal import rehearsal
from stepdistill.trainer import Trainer


@dataclass(frozen=True)
class Noise(Data):
    """Noise under a data source's conditions, with the fields that the source provides: costs nothing to make."""

    source: Data
    cond: Cond

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """The source's."""
        return self.source.provides

    def open(self, setting: Setting) -> Callable[[Step], Batch]:
        """See ``Data``."""
        cond = to_device(self.cond, setting.device)
        shape = (setting.batch, *setting.opened.sample_shape)

        def batch(step: Step) -> Batch:
            path = step.randn((shape[0], setting.sampler.steps + 1, *shape[1:])).to(setting.device)
            given = {"x0": path[:, -1], "path": path}
            return Batch({k: v.clone() for k, v in cond.items()}, shape, **{k: given[k] for k in self.provides})

        return batch


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: dict[str, int]
    """By role, buffers included, each tensor once: adapters on the teacher's network count without it."""
    optimizer: int
    """States of all movers."""
    gradients: int
    """Of those who move in one turn, at most."""
    data: int
    """Tables of conditions and samples that stay on the device."""
    peak: int
    """At most at once, all of the above and the activations included."""
    away: tuple[str, ...] = ()
    """Roles that are on the CPU between turns."""

    @property
    def standing(self) -> int:
        """What is there between turns."""
        return sum(n for role, n in self.weights.items() if role not in self.away) + self.optimizer + self.data

    def parts(self) -> dict[str, int]:
        """What the peak is made of, in bytes; they add up to it."""
        here = {role: size for role, size in self.weights.items() if role not in self.away}
        given = here | {"optimizers": self.optimizer, "data": self.data}
        return given | {"gradients, activations": self.peak - self.standing}


def held_by(
    nets: nn.ModuleDict, which: Callable[[nn.Module, str], bool] = lambda module, name: True
) -> dict[str, list[Tensor]]:
    """Parameters and buffers by role, each with the first role that has it; of each module ``which`` names count.

    Networks that adapters are on, and that a discriminator reads from, are no part of those modules; they come last,
    so that each role's adapters are its own.
    """
    own = {role: list(net.modules()) for role, net in nets.items() if role != "teacher"}
    around = {role: [m for part in _around(net) for m in part.modules()] for role, net in nets.items()}
    seen: set[int] = set()
    found: dict[str, list[Tensor]] = {role: [] for role in nets}
    for modules in (own, {"teacher": list(nets["teacher"].modules())} if "teacher" in nets else {}, around):
        for role, several in modules.items():
            for module in several:
                for name, tensor in (module._parameters | module._buffers).items():
                    if tensor is not None and id(tensor) not in seen and which(module, name):
                        seen.add(id(tensor))
                        found[role].append(tensor)
    return found


def _around(net: nn.Module) -> Iterator[nn.Module]:
    for module in net.modules():
        if isinstance(module, Discriminator):
            yield module.backbone
        if network_of(module) is not module:
            yield network_of(module)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once; of sharded ones, this process's part."""
    storages = [distributed.local(t).untyped_storage() for t in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def rehearse(
    recipe: Recipe,
    opened: Opened,
    *,
    as_on_cuda: bool = False,
    devices: int = 1,
    limit: float = math.inf,
    steps: Callable[[Trainer], None] | None = None,
) -> Memory:
    """Take every kind of step of a recipe's last stage once, on fake tensors.

    Args:
        recipe: the stage; a warm start changes nothing here.
        opened: its teacher; real, or on the meta device.
        as_on_cuda: let autocast choose dtypes as it does on a card.
        devices: how many share the batch and, by the recipe's placement, the networks; the result is for one of them.
        limit: take no step, and call what stands between turns the peak, if that alone is more than so many bytes.
        steps: takes them instead, all kinds at least once.

    Raises:
        ValueError: as ``build``.
    """
    run = recipe.run
    if run.batch % devices:
        raise ValueError(f"run.batch {run.batch} is shared by {devices} devices: use a multiple of {devices}")
    cond = recipe.data.examples(opened, run.batch // devices)
    micro = min(run.accumulate, 2)  # from the second on, gradients are there while activations are made
    noise = replace(run, device="cpu", accumulate=micro, trackers=())
    stage = replace(recipe, data=Noise(recipe.data, cond), run=noise)
    with rehearsal(as_on_cuda=as_on_cuda, devices=devices) as books:
        trainer = build(stage, opened=replace(opened, denoiser=copy.deepcopy(opened.denoiser))).trainer
        held = held_by(trainer.nets)
        for tensor in (t for tensors in held.values() for t in tensors):
            books.hold(distributed.local(tensor))  # whatever came by other ways
        gc.collect()  # sharding leaves whole weights behind in reference cycles
        books.peak = books.now  # networks are made on the CPU and come to the device one by one
        for optimizer in trainer.optimizers.values():
            _make_states(optimizer)
        if books.peak <= limit:
            (steps or _one_of_each)(trainer)
        states = [v for one in trainer.optimizers.values() for state in one.state.values() for v in state.values()]
        moved = [[p for name in turn.moves for p in trainer.nets[name].parameters()] for turn in trainer.turns]
        optimizer, gradients = size_of(states), max(size_of(params) for params in moved)
        weights = {role: size_of(tensors) for role, tensors in held.items()}
    more = (run.accumulate - micro) * sum(v.nbytes for v in cond.values())  # each micro-batch waits with its conditions
    tables = table_bytes(
        recipe.data, {k: v[:1] for k, v in cond.items()}, opened.sample_shape, recipe.sampler.steps + 1
    )
    return Memory(weights, optimizer, gradients, tables, books.peak + more + tables, recipe.placement.offload)


def table_bytes(data: Data, cond: Cond, sample: tuple[int, ...], states: int) -> int:
    """Bytes that a source keeps on the run's device; images of several sizes count with the teacher's own.

    Args:
        data: the source.
        cond: conditions of one sample.
        sample: shape of one sample.
        states: of a trajectory that are kept.
    """
    one, number = sum(v.nbytes for v in cond.values()), 4 * math.prod(sample)

    def if_small(size: int, memory: float) -> int:
        return size if size <= memory * 1e9 else 0

    if isinstance(data, PromptSource):
        return if_small(one * len(set(data.texts())), data.memory)
    if isinstance(data, HubImages) and data.streaming:
        return 0
    if isinstance(data, ImageSource):
        rows = data.rows(lambda name, problem: None)
        classes = sum(one for row in rows if row.label is not None)
        texts = {row.text for row in rows if row.label is None}
        return classes + if_small(one * len(texts), data.memory) + if_small(number * len(rows), data.memory)
    if isinstance(data, TeacherPairs):
        memory = data.prompts.memory if data.prompts else MEMORY
        given = table_bytes(data.prompts, cond, sample, states) if data.prompts else one * data.count
        return given + if_small(data.count * states * number, memory)
    if isinstance(data, DigitsData):
        return (number + one) * len(load_digits("train").labels)
    return 0


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _one_of_each(trainer: Trainer) -> None:
    for index in whole_steps(trainer):
        trainer.step(index)


def whole_steps(trainer: Trainer) -> list[int]:
    """One index for each set of turns that is not part of another one."""
    first: dict[frozenset[int], int] = {}
    for index in range(trainer.run.steps):
        first.setdefault(frozenset(k for k, turn in enumerate(trainer.turns) if turn.due(index)), index)
    return [index for kind, index in first.items() if not any(kind < other for other in first)]
