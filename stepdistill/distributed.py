"""The processes of a run: which one this is, and the few things they do together. One process alone needs none of it.

``accelerate launch -m stepdistill distill R``, ``torchrun -m stepdistill distill R`` and SLURM's tasks under either
start the same program several times. Each process has every network, or its shard of it, and a part of every batch.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

PATIENCE = datetime.timedelta(hours=3)
"""How long a process waits for the others: for the first one to make the data, say."""
BUCKET = 2**24
"""Gradients that travel together, in numbers: 64 MB."""

T = TypeVar("T")

_store: dist.Store | None = None


def launched() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Find the other processes, if a launcher has started any; done once.

    Raises:
        ValueError: if accelerate's config asks for what is not done here.
    """
    global _store
    if launched() == 1 or dist.is_initialized():
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise ValueError("accelerate's distributed_type DEEPSPEED: use MULTI_GPU, or FSDP to shard; see train/launch/")
    _store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(store=_store, rank=rank, world_size=world, timeout=PATIENCE)  # gloo, and NCCL for cards
    if not is_main():
        warnings.simplefilter("ignore")  # the main process says it


def take_card(device: str) -> None:
    """Let "cuda" be the card of this process's number on its machine.

    Raises:
        ValueError: if one card is named for all.
    """
    if world() > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise ValueError(f"run.device {device!r} with {world()} processes: use 'cuda'; each takes its own card")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def refuse_other_precision(dtype: str) -> None:
    """Recipes say the arithmetic, since results depend on it.

    Raises:
        ValueError: if accelerate's config says another one.
    """
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    meant = {"bf16": "bfloat16", "fp16": "float16"}.get(said, said)
    if said != "no" and meant != dtype:
        raise ValueError(f"accelerate's mixed_precision is {said!r} and run.dtype is {dtype!r}: let it be 'no'")


def leave() -> None:
    """Part from the other processes."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def share(batch: int) -> int:
    """This process's samples of a global batch.

    Raises:
        ValueError: if it cannot be shared evenly.
    """
    if batch % world():
        raise ValueError(f"run.batch {batch} is shared by {world()} processes: use a multiple of {world()}")
    return batch // world()


def first_to_fail() -> bool:
    """Whether no other process has failed before: it alone says why, the others merely lost it."""
    if _store is None:
        return True
    try:
        return _store.add("stepdistill/failures", 1) == 1
    except RuntimeError:  # whoever kept the store is gone
        return False


@contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL alike
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ConnectionError(
            f"process {rank()} of {world()} lost the others ({reason}); the last checkpoint is intact, and the same "
            "command goes on from it"
        ) from error


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        any_of(False)


@contextmanager
def main_first() -> Iterator[None]:
    """The block runs in the main process, then in the others, which find what it left on disk."""
    if not is_main():
        wait()
    try:
        yield
    finally:
        if is_main():
            wait()


def on_main(do: Callable[[], T]) -> T:
    """What ``do`` returns, or raises, in the main process, in all of them; the others do not run it."""
    if world() == 1:
        return do()
    found: list[T | None] = [None]
    error: Exception | None = None
    if is_main():
        try:
            found = [do()]
        except Exception as caught:
            error = caught
    told = [found[0], error]
    with _in_touch():
        dist.broadcast_object_list(told, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    return told[0]


def any_of(flag: bool) -> bool:
    """Whether it is so in any process; over the network of CPUs, so that no card is waited for."""
    if world() == 1:
        return flag
    found = torch.tensor(int(flag))
    with _in_touch():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def total(value: Tensor) -> Tensor:
    """The sum over all processes, without a graph."""
    if world() == 1:
        return value.detach()
    found = value.detach().clone()
    with _in_touch():
        dist.all_reduce(found)
    return found


def mean(value: Tensor) -> Tensor:
    """The mean over all processes of what is a mean over this one's part of the batch, without a graph."""
    return total(value) / world()


def gathered(values: Sequence[float]) -> list[list[float]]:
    """Each process's values, in float64, by its number."""
    mine = torch.tensor(values, dtype=torch.float64)
    if world() == 1 or not len(mine):
        return [mine.tolist() for _ in range(world())]
    found = [torch.empty_like(mine) for _ in range(world())]
    with _in_touch():
        dist.all_gather(found, mine)
    return [part.tolist() for part in found]


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor that FSDP has sharded, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their means over all processes, so that n parts of a batch make one.

    Plain sums after the backward passes, whatever was computed in them: who has no part in a turn is not waited for. A
    parameter that has a gradient in some processes only counts as 0 in the others; one that has none stays without.
    Shards are left alone: FSDP has averaged theirs.
    """
    if world() == 1:
        return
    bucket: list[nn.Parameter] = []
    for p in params:
        if hasattr(p, "to_local"):
            continue
        if bucket and sum(q.numel() for q in bucket) + p.numel() > BUCKET:
            _average(bucket)
            bucket = []
        bucket.append(p)
    if bucket:
        _average(bucket)


def _average(bucket: list[nn.Parameter]) -> None:
    grads = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket]
    there = grads[0].new_tensor([float(p.grad is not None) for p in bucket])
    flat = torch.cat([*grads, there])
    with _in_touch():
        dist.all_reduce(flat)
    *means, there = flat.div_(world()).split([*(p.numel() for p in bucket), len(bucket)])
    complete = all(p.grad is not None for p in bucket)  # then there is nothing to look up, and nothing to wait for
    found = [1.0] * len(bucket) if complete else there.tolist()
    for p, grad, share in zip(bucket, means, found, strict=True):
        p.grad = grad.view_as(p) if share > 0 else None


@torch.no_grad()
def clip_gradients(params: Sequence[nn.Parameter], limit: float, scale: float = 1.0) -> Tensor:
    """Divide gradients by ``scale``, then shorten them to ``limit`` if together they are longer.

    Args:
        params: sharded or whole; whole ones have the same gradients in all processes.
        limit: the largest norm; infinity changes nothing.
        scale: what the loss was multiplied by.

    Returns:
        The norm between the two, over all processes.
    """
    shards = [p.grad.to_local() for p in params if p.grad is not None and hasattr(p, "to_local")]
    whole = [p.grad for p in params if p.grad is not None and not hasattr(p, "to_local")]
    if scale != 1.0:
        torch._foreach_mul_([*shards, *whole], 1 / scale)
    if not shards:
        return clip_grad_norm_(params, limit, foreach=True)
    norm = (total(get_total_norm(shards).square()) + get_total_norm(whole).square().to(shards[0].device)).sqrt()
    torch._foreach_mul_([*shards, *whole], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
