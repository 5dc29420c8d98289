"""What an update costs beside the network evaluations that it cannot do without: time, and memory.

Works for any objective on any networks: the evaluations of one update are recorded by hooks and replayed bare.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function

from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.lora import Adapted
from stepdistill.trainer import Trainer


@dataclass(frozen=True)
class Evaluation:
    """One network call of an update, as it was made."""

    net: nn.Module
    role: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    moving: bool
    """Its parameters required gradients."""
    backward: bool
    """A graph was kept for it."""
    weights: bool = False
    """A gradient reached the network's weights; of a discriminator those of its backbone count, not its heads'."""
    tangent: bool = False
    """A derivative was carried along (``torch.func.jvp``)."""

    @property
    def batch(self) -> int:
        """Samples."""
        return next(a for a in self.args if isinstance(a, Tensor)).shape[0]

    @property
    def cost(self) -> int:
        """In evaluations of one sample: a backward pass counts 2, or 1 if it is for the input alone; a tangent 1."""
        back = 2 if self.weights else int(any(isinstance(a, Tensor) and a.requires_grad for a in self.args))
        return self.batch * (1 + back * self.backward + self.tangent)

    def __str__(self) -> str:
        also = " + backward" * self.backward + " + tangent" * self.tangent
        return f"{self.role} forward{also} (batch {self.batch})"

    def run(self) -> None:
        """Make the call again and nothing else, with its backward pass if it had one."""
        for p in _own(self.net):
            p.requires_grad_(self.moving)
        with torch.set_grad_enabled(self.backward):
            if self.tangent:
                with sdpa_kernel(SDPBackend.MATH):
                    torch.func.jvp(partial(self.net, **self.kwargs), self.args, self.args)
                return
            out = self.net(*self.args, **self.kwargs)
            if self.backward:
                out = out if isinstance(out, Tensor) else out[0]
                out.backward(torch.ones_like(out))
        for p in self.net.parameters():
            p.grad = None


def evaluations(trainer: Trainer, index: int, *, keep: bool = True) -> list[Evaluation]:
    """The network evaluations of ``trainer.step(index)``, in order; the step is taken.

    A discriminator counts as one network, with what it runs of its backbone.

    Args:
        trainer: it is trained on.
        index: of the step.
        keep: hold the arguments, to ``run`` them again; otherwise empty tensors stand for them.
    """
    found: list[Evaluation] = []
    inside = [0]
    handles = []

    def before(role: str) -> Any:
        def hook(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside[0] += 1
            if inside[0] > 1:
                return
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            moving = any(p.requires_grad for p in _own(net))
            backward = torch.is_grad_enabled() and (moving or any(a.requires_grad for a in tensors))
            tangent = any(_carries_tangent(a) for a in args if isinstance(a, Tensor))
            held = tuple((_kept if keep else _emptied)(a) if isinstance(a, Tensor) else a for a in args)
            inner = net.backbone if isinstance(net, Discriminator) else net
            weights = any(p.requires_grad for p in _own(inner))
            found.append(Evaluation(net, role, held, kwargs if keep else {}, moving, backward, weights, tangent))

        return hook

    def after(net: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inside[0] -= 1

    for role, module in trainer.nets.items():
        units = (
            [module]
            if isinstance(module, Discriminator)
            else [m.net for m in module.modules() if isinstance(m, Denoiser)]
        )
        for unit in units:
            handles.append(unit.register_forward_pre_hook(before(role), with_kwargs=True))
            handles.append(unit.register_forward_hook(after, always_call=True))
    try:
        trainer.step(index)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _own(net: nn.Module) -> list[nn.Parameter]:
    """A network's parameters without the adapters that other roles have put into it."""
    inside = net.net if isinstance(net, Denoiser) else net
    adapted = isinstance(inside, Adapted)
    return [p for name, p in net.named_parameters() if adapted or ".lora_" not in name]


def _carries_tangent(x: Tensor) -> bool:
    return torch.func.debug_unwrap(x) is not x


def _kept(x: Tensor) -> Tensor:
    """An argument to call the network with again: itself, cut off; behind a transform its value is out of reach."""
    if _carries_tangent(x):
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x.detach().requires_grad_(x.requires_grad)


def _emptied(x: Tensor) -> Tensor:
    """As many samples of nothing."""
    return torch.empty(*x.shape[:1], 0).requires_grad_(x.requires_grad)


def cost(trainer: Trainer, indices: Sequence[int]) -> float:
    """Network evaluations of one sample that an update takes on average, for each sample of its batch.

    Args:
        trainer: any objective over any networks; it is trained on by the measurement.
        indices: steps to average over, one period of the objective's turns.

    Returns:
        ``sum(Evaluation.cost) / (len(indices) * samples of a batch)``; a plain regression of one network has 3.
    """
    total = sum(call.cost for index in indices for call in evaluations(trainer, index, keep=False))
    return total / (len(indices) * trainer.run.batch * trainer.run.accumulate)


@dataclass(frozen=True)
class Overhead:
    """One kind of update against its bare network evaluations; medians of alternating runs."""

    seconds: float
    bare_seconds: float
    ratio: float
    """Median over pairs of update / bare."""
    bytes: int
    """Most that autograd held at once during the update, parameters not counted."""
    minimum_bytes: int
    """The same for the largest single evaluation with a backward pass."""
    evaluations: tuple[str, ...]

    @property
    def bytes_ratio(self) -> float:
        """Bytes held / the minimum."""
        return self.bytes / self.minimum_bytes


def measure(trainer: Trainer, index: int = 0, repeats: int = 15) -> Overhead:
    """Time ``trainer.step(index)`` against its bare evaluations, alternating, and count the bytes held for backward.

    The index chooses the turns: with ``student_every=5``, index 0 is a step of both players, index 1 the critic's.

    Args:
        trainer: any objective over any networks; it is trained on by the measurement.
        index: the step that is repeated.
        repeats: pairs of timings after two of warm-up.

    Returns:
        Medians.
    """
    calls = evaluations(trainer, index)

    def bare() -> None:
        for call in calls:
            call.run()

    pairs = []
    for i in range(repeats + 2):
        order = (lambda: trainer.step(index), bare) if i % 2 else (bare, lambda: trainer.step(index))
        seconds = [_seconds(run) for run in order]
        pairs.append(seconds if i % 2 else seconds[::-1])
    pairs = pairs[2:]
    with saved_bytes() as held:
        trainer.step(index)
    minimum = 0
    for call in calls:
        if call.backward:
            with saved_bytes() as alone:
                call.run()
            minimum = max(minimum, alone.peak)
    update, alone_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return Overhead(update, alone_s, ratio, held.peak, minimum, tuple(map(str, calls)))


def _seconds(run: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class SavedBytes:
    """Bytes that autograd keeps for backward passes: now, and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._users: dict[int, int] = {}

    def take(self, storage: int, size: int) -> None:
        """A tensor of this storage is saved; storages saved twice count once."""
        self._users[storage] = self._users.get(storage, 0) + 1
        if self._users[storage] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)

    def drop(self, storage: int, size: int) -> None:
        """One saved tensor of this storage is released."""
        self._users[storage] -= 1
        if self._users[storage] == 0:
            del self._users[storage]
            self.now -= size


class _Saved:
    """A tensor on autograd's tape; it leaves the books when the tape lets go of it.

    Detached, because a function that saves its own result would otherwise keep itself alive through it.
    """

    def __init__(self, books: SavedBytes, tensor: Tensor):
        self.books, self.tensor = books, tensor.detach()
        self.storage, self.size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        books.take(self.storage, self.size)

    def __del__(self) -> None:
        self.books.drop(self.storage, self.size)


@contextmanager
def saved_bytes() -> Iterator[SavedBytes]:
    """Counts what autograd saves within the block, parameters and views of them (which live anyway) excepted."""
    books = SavedBytes()

    def pack(tensor: Tensor) -> Tensor | _Saved:
        whole = tensor if tensor._base is None else tensor._base
        return tensor if isinstance(whole, nn.Parameter) else _Saved(books, tensor)

    def unpack(held: Tensor | _Saved) -> Tensor:
        return held.tensor if isinstance(held, _Saved) else held

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield books


def measured_peak(run: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> int:
    """Bytes that torch's CPU allocator has handed out at most during ``run(prepare())``, since before ``prepare()``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        made = prepare()
        with record_function("measured run"):
            run(made)
    events = prof.profiler.kineto_results.events()
    begun = next(e.start_ns() for e in events if e.name() == "measured run")
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now if event.start_ns() >= begun else 0)
    return peak
