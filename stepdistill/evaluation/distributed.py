"""Several processes, each with its share of the images, give the numbers of one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from stepdistill.evaluation.metrics import MeanCov


def share(n: int) -> slice:
    """Which of n images this process makes or judges: consecutive ones, equally many but for one."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if _together() else (0, 1)
    return slice(n * rank // world, n * (rank + 1) // world)


def gathered_moments(own: MeanCov) -> MeanCov:
    """The statistics of all processes' samples, alike in all of them; without a process group, ``own``.

    Merged in the order of ranks, so that every process gets the same bits. Sends D^2 + D + 1 numbers, whatever the
    number of samples.
    """
    if not _together():
        return own
    packed = torch.cat([own.mean.new_tensor([own.count]), own.mean, own.scatter.flatten()])
    merged, dim = MeanCov(len(own.mean), own.mean.device), len(own.mean)
    for part in _all(packed):
        other = MeanCov(dim, own.mean.device)
        other.count = int(part[0])
        other.mean, other.scatter = part[1 : dim + 1], part[dim + 1 :].view(dim, dim)
        merged.merge(other)
    return merged


def gathered_rows(own: Tensor) -> Tensor:
    """Rows (N, ...) of all processes in the order of ranks, (sum of N, ...), alike in all; any N, 0 included.

    With ``share`` that is the order of one process. Without a process group, ``own``.
    """
    if not _together():
        return own
    counts = [int(count) for count in _all(torch.tensor([len(own)], device=own.device))]
    # Collectives want equal shapes.
    padded = torch.cat([own, own.new_zeros(max(counts) - len(own), *own.shape[1:])])
    return torch.cat([part[:count] for part, count in zip(_all(padded), counts, strict=True)])


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all(own: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return parts
