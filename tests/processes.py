"""Several processes that have found each other, forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["stepdistill.cli", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.optim"])


def started(do: Callable[..., object], *args: Any) -> BaseProcess:
    """A process at work."""
    process = forks.Process(target=do, args=args)
    process.start()
    return process


def together(world: int, do: Callable[..., T], *args: Any) -> list[T]:
    """What ``do(*args)`` returns in each of ``world`` processes, by number."""
    with tempfile.TemporaryDirectory() as folder:
        all_ = [started(_joined, rank, world, folder, do, args) for rank in range(world)]
        for process in all_:
            process.join(300)
        with contextlib.ExitStack() as stack:
            for process in all_:
                stack.callback(process.kill)
            assert [process.exitcode for process in all_] == [0] * world
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _joined(rank: int, world: int, folder: str, do: Callable[..., object], args: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    torch.save(do(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
