"""Seconds of a Fréchet distance over those of torchmetrics' ``compute``, statistics known, and how far the two differ.

    python eval/frechet.py --out eval/frechet.json

Both are given the statistics of the same 50,000 features: rectified, correlated Gaussians, as Inception's are. Timings
alternate; medians are compared. torchmetrics takes eigenvalues of the unsymmetric product of the covariances.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stepdistill.evaluation.metrics import MeanCov, Moments, frechet_distance
from stepdistill.evaluation.records import device_name, installed_versions


@dataclass(frozen=True)
class Arguments:
    """Time Fréchet distances."""

    dims: tuple[int, ...] = (1024, 2048)
    """Numbers of features."""
    n: int = 50_000
    """Samples of either side."""
    repeats: int = 3
    """Pairs of timings."""
    threads: int = 1
    """Of torch."""
    device: str = "cpu"
    """Where both run."""
    out: Path | None = None
    """JSON file to write; rows of the same device, threads and features are replaced, others stay."""


class Identity(nn.Module):
    """Features as they are; torchmetrics asks for their number."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_features = dim

    def forward(self, features: Tensor) -> Tensor:
        return features


def batches(n: int, dim: int, scale: float, seed: int) -> Iterator[Tensor]:
    """Features (B, dim) float32 of one side."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) * torch.arange(1, dim + 1) ** -0.5
    rng = torch.Generator().manual_seed(seed)
    sizes = [min(5000, n - start) for start in range(0, n, 5000)]
    return ((scale * torch.randn(size, dim, generator=rng) @ mix).relu() for size in sizes)


def timed(call: Callable[[], float], device: str) -> tuple[float, float]:
    """Seconds and value of a call."""
    start = time.perf_counter()
    value = call()  # a float: whatever runs on a device has ended
    return time.perf_counter() - start, value


def measure(dim: int, given: Arguments) -> dict[str, object]:
    """One row."""
    peer = FrechetInceptionDistance(feature=Identity(dim)).set_dtype(torch.float64).to(given.device)
    sides = []
    for real, scale in ((True, 1.0), (False, 1.05)):
        side = MeanCov(dim, given.device)
        for features in batches(given.n, dim, scale, int(real)):
            side.update(features.to(given.device))
            peer.update(features.double().to(given.device), real=real)
        sides.append(Moments(side.mean, side.cov))

    def theirs() -> float:
        peer._computed = None  # or it answers from memory
        return float(peer.compute())

    frechet_distance(*sides)  # warm up
    pairs = [
        (timed(lambda: frechet_distance(*sides), given.device), timed(theirs, given.device))
        for _ in range(given.repeats)
    ]
    ours_seconds, theirs_seconds = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
    (_, ours), (_, their) = pairs[0]
    return {
        "features": dim,
        "samples": given.n,
        "device": device_name(given.device),
        "threads": given.threads,
        "load": round(os.getloadavg()[0], 1),
        "repeats": given.repeats,
        "seconds": ours_seconds,
        "torchmetrics_seconds": theirs_seconds,
        "ratio": ours_seconds / theirs_seconds,
        "value": ours,
        "relative_difference": abs(ours - their) / ours,
    }


def main(given: Arguments) -> None:
    """Measure, print and write."""
    torch.set_num_threads(given.threads)
    rows = [measure(dim, given) for dim in given.dims]
    for r in rows:
        print(
            f"D = {r['features']}: {r['seconds']:.2f} s, torchmetrics {r['torchmetrics_seconds']:.2f} s, "
            f"ratio {r['ratio']:.2f}, differ by {r['relative_difference']:.1e}"
        )
    if given.out:
        kept = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
        versions = installed_versions() | {"torchmetrics": version("torchmetrics")}
        new = {(r["features"], r["device"], r["threads"]) for r in rows}
        rows = [r for r in kept if (r["features"], r["device"], r["threads"]) not in new] + rows
        given.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
