"""Two processes give the numbers of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stepdistill.evaluation.distributed import gathered_moments, gathered_rows, share
from stepdistill.evaluation.metrics import MeanCov, frechet_distance, precision_recall
from stepdistill.evaluation.mmd import kid

COUNT, DIM = 101, 6  # an odd count: shares differ


def bank(seed: int) -> torch.Tensor:
    return torch.randn(COUNT, DIM, generator=torch.Generator().manual_seed(seed)) + 3


def scores(real: torch.Tensor, own: torch.Tensor) -> list[float]:
    """What each process computes of its share."""
    moments, rows = gathered_moments(MeanCov.of(own) if len(own) else MeanCov(DIM)), gathered_rows(own)
    values = [frechet_distance(MeanCov.of(real), moments), kid(real, rows), *precision_recall(real, rows)]
    return [float(moments.count), float(len(rows)), *values]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    real, fake = bank(0), 1.2 * bank(1)
    everything = fake if rank == 0 else fake[:0]
    results = {"share": scores(real, fake[share(COUNT)]), "one": scores(real, everything), "counts": share(COUNT)}
    results["rows"] = gathered_rows(fake[share(COUNT)])
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    alone = scores(bank(0), 1.2 * bank(1))
    assert alone[:2] == [COUNT, COUNT]
    assert first["share"] == second["share"]  # the same bits everywhere
    assert first["share"] == pytest.approx(alone, rel=1e-12)
    assert first["one"] == second["one"] == pytest.approx(alone, rel=1e-12)  # one process had nothing to give
    assert first["rows"].equal(1.2 * bank(1))  # in the order of one process
    assert (first["counts"].stop, second["counts"].start, second["counts"].stop) == (50, 50, COUNT)


def test_without_a_process_group_nothing_changes():
    x = bank(0)
    assert share(7) == slice(0, 7)
    assert gathered_rows(x) is x and gathered_moments(own := MeanCov.of(x)) is own
