"""Two sets of feature vectors: Frechet distance, precision, recall, density, coverage. Kernel distances are in ``mmd``.

Every function takes a bank of real and a bank of generated features, float tensors of shape (N, D), works in float64
on the device of its first argument, and knows nothing about images. Each number is biased by the number of samples:
compare only numbers made with equal counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Of a Frechet distance, relative; where rounding may cost more, a slower form is taken."""
CHUNK = 1024
"""Rows per block of a pairwise matrix: 1024 x 50,000 float64 distances are 0.4 GB."""


class MeanCov:
    """Mean and unbiased covariance of a stream of feature vectors, in float64.

    Blocks are folded in with the pairwise update of Chan, Golub and LeVeque (1979), which subtracts means before it
    squares. The plain sums of x and x xT would cancel where the mean is large against the spread.

    Args:
        dim: the number of features D.
        device: where the state lives; features are moved there.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)  # (D,)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # (D, D), sum of (x - mean)(x - mean)T

    @classmethod
    def of(cls, features: Tensor) -> MeanCov:
        """The statistics of one bank, shape (N, D), on the bank's device.

        Raises:
            ValueError: if the bank is not a finite float (N, D) tensor.
        """
        check_bank("features", features)
        return cls(features.shape[1], features.device).update(features)

    def update(self, features: Tensor) -> MeanCov:
        """Folds in a block of shape (N, D), N >= 0, and returns itself.

        Raises:
            ValueError: if the block has another D, is not float, or holds a NaN or an infinity.
        """
        check_bank("features", features)
        if features.shape[1] != len(self.mean):
            raise ValueError(f"features have {features.shape[1]} dimensions, expected {len(self.mean)}")
        if not len(features):
            return self
        features = features.to(self.mean)
        block = MeanCov(len(self.mean), self.mean.device)
        block.count = len(features)
        block.mean = features.mean(0)
        centred = features - block.mean
        block.scatter = centred.T @ centred
        return self.merge(block)

    def merge(self, other: MeanCov) -> MeanCov:
        """Folds in the statistics of another stream, for example another process's share, and returns itself.

        Raises:
            ValueError: if the other stream has another number of features.
        """
        if len(other.mean) != len(self.mean):
            raise ValueError(f"cannot merge statistics of {len(other.mean)} into those of {len(self.mean)} dimensions")
        total = self.count + other.count
        if not total:
            return self
        gap = other.mean.to(self.mean) - self.mean
        self.scatter = self.scatter + other.scatter.to(self.scatter)
        self.scatter += torch.outer(gap, gap) * (self.count * other.count / total)
        self.mean = self.mean + gap * (other.count / total)
        self.count = total
        return self

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (divided by N - 1), (D, D) float64.

        Raises:
            ValueError: if fewer than two samples came in.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)


class Moments(NamedTuple):
    """Mean and covariance alone, as a statistics file holds them; unlike ``MeanCov`` they cannot be merged."""

    mean: Tensor  # (D,) float64
    cov: Tensor  # (D, D) float64, unbiased


def frechet_distance(a: MeanCov | Moments, b: MeanCov | Moments) -> float:
    """Squared Frechet distance of two Gaussians; arXiv:1706.08500.

    ``|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)``, where the last trace is the sum of the singular values of
    ``A1^T A2`` for any ``C = A A^T``: symmetric problems only, no eigenvalues of the unsymmetric product ``C1 C2``.

    Args:
        a: statistics of one set, at least 2 samples.
        b: statistics of the other set, same number of features, at least 2 samples.

    Returns:
        A number >= 0 up to rounding, in squared units of the features.

    Raises:
        ValueError: if the dimensions differ or a set has fewer than two samples.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features have {len(a.mean)} and {len(b.mean)} dimensions; both sets need the same extractor")
    cov_a, cov_b = a.cov, b.cov.to(a.mean)
    gap = a.mean - b.mean.to(a.mean)
    apart = gap @ gap + cov_a.trace() + cov_b.trace()
    lower_a, lower_b = _cholesky(cov_a), _cholesky(cov_b)
    if lower_a is None or lower_b is None:
        return float(apart - 2 * torch.linalg.svdvals(_square_root(cov_a).T @ _square_root(cov_b)).sum())
    product, gram = _product_and_gram(lower_a, lower_b)
    squares = torch.linalg.eigvalsh(gram)
    rounding = squares[-1] * torch.finfo(squares.dtype).eps
    roots = squares.clamp(min=0).sqrt()
    distance = apart - 2 * roots.sum()
    # Rounding moves each square by about eps times the largest, hence its root r by that over 2 r.
    error = (rounding / roots.clamp(min=rounding.sqrt())).sum()
    if error > TOLERANCE * distance.abs():
        distance = apart - 2 * torch.linalg.svdvals(product).sum()  # twice the time, and no squares
    return float(distance)


def percent_of_variance(real: MeanCov | Moments, fake: MeanCov | Moments) -> float:
    """Frechet distance over the real features' total variance, in percent: 100 is one point, at the real mean."""
    return 100 * frechet_distance(real, fake) / float(real.cov.trace())


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]; read them together, since noise has high recall and a collapsed generator high precision."""

    precision: float  # of generated samples inside the real manifold: quality
    recall: float  # of real samples inside the generated manifold: diversity


def precision_recall(real: Tensor, fake: Tensor, k: int = 5) -> PrecisionRecall:
    """Improved precision and recall, arXiv:1904.06991.

    A set's manifold is the union of balls around its samples, each reaching (``<=``) that sample's k-th neighbour in
    the same set, itself not counted. Distances are taken difference by difference, so that ties are ties; that costs
    O(N M D) without matrix products. Move banks beyond ten thousand samples to an accelerator.

    Args:
        real: features of real samples, (N, D) float, N > k.
        fake: features of generated samples, (M, D) float, M > k.
        k: which neighbour bounds a ball; the paper takes 3, the digits benchmark 5.

    Raises:
        ValueError: if a bank is not finite, too small for k, or the dimensions differ.
    """
    real, fake = check_pair(real, fake, k)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, distances in _distances(real, fake):  # (chunk, M)
        fake_inside |= (distances <= real_radii[rows, None]).any(0)
        real_inside[rows] = (distances <= fake_radii).any(1)
    return PrecisionRecall(_fraction(fake_inside), _fraction(real_inside))


class DensityCoverage(NamedTuple):
    """Both count balls of real samples only, so that outliers among the generated ones cannot inflate them."""

    density: float  # mean number of real balls around a generated sample, over k; about 1 or more when the sets agree
    coverage: float  # fraction of real balls that hold a generated sample, in [0, 1]


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage, arXiv:2002.09797, with balls that end before (``<``) the k-th real neighbour.

    Args:
        real: features of real samples, (N, D) float, N > k.
        fake: features of generated samples, (M, D) float, M > k.
        k: which neighbour bounds a ball.

    Raises:
        ValueError: if a bank is not finite, too small for k, or the dimensions differ.
    """
    real, fake = check_pair(real, fake, k)
    radii = _radii(real, k)
    hits = 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, distances in _distances(real, fake):
        inside = distances < radii[rows, None]  # (chunk, M)
        hits += int(inside.sum())
        covered[rows] = inside.any(1)
    return DensityCoverage(hits / (k * len(fake)), _fraction(covered))


def _cholesky(cov: Tensor) -> Tensor | None:
    """The lower triangular root, or None of a covariance that is singular to rounding."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    pivots = lower.diagonal().square()
    whole = not bool(failed) and bool(pivots.min() > 1e3 * _rounding(pivots.max(), len(cov)))
    return lower if whole else None


def _product_and_gram(lower_a: Tensor, lower_b: Tensor) -> tuple[Tensor, Tensor]:
    """``P = lower_a^T lower_b`` and the lower triangle of ``P P^T``; in panels, without what triangles make zero."""
    product, gram = torch.zeros_like(lower_a), torch.zeros_like(lower_a)
    panel = max(64, len(lower_a) // 16)
    for start in range(0, len(lower_a), panel):
        rows, end = slice(start, start + panel), start + panel
        torch.mm(lower_a[start:, rows].T, lower_b[start:], out=product[rows])
        gram[rows, :end] = product[rows] @ product[:end].T
    return product, gram


def _square_root(cov: Tensor) -> Tensor:
    """Some A, (D, D), with ``A A^T = cov``; directions whose variance is rounding error get exactly none.

    An eigenvalue that is zero but for rounding, 1e-16, would count as 1e-8 after the root, and with fewer samples than
    features there are many of them.
    """
    values, vectors = torch.linalg.eigh(cov)
    return vectors * torch.where(values > _rounding(values[-1].clamp(min=0), len(values)), values, 0.0).sqrt()


def _rounding(largest: Tensor, dim: int) -> Tensor:
    """What rounding may leave in place of a zero eigenvalue."""
    return largest * dim * torch.finfo(largest.dtype).eps


def _distances(rows_of: Tensor, columns_of: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances block by block: a slice of rows and its (rows, M) float64 block."""
    for start in range(0, len(rows_of), CHUNK):
        rows = slice(start, start + CHUNK)
        # Not by matrix product: it rounds |x - y| of equal vectors to 1e-8 instead of 0, and d = r becomes a lottery.
        yield rows, torch.cdist(rows_of[rows], columns_of, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(bank: Tensor, k: int) -> Tensor:
    """Distance of each sample to its k-th neighbour within the bank, itself not counted; (N,)."""
    # The sample itself, at distance 0, is among the k + 1 nearest; copies of it are neighbours like any other.
    nearest = [block.topk(k + 1, dim=1, largest=False).values for _, block in _distances(bank, bank)]  # ascending
    return torch.cat(nearest)[:, k]


def _fraction(mask: Tensor) -> float:
    return float(mask.double().mean())


def check_bank(name: str, bank: Tensor) -> None:
    """Makes sure that a bank is a finite float (N, D) tensor; ``name`` stands in the message.

    Raises:
        ValueError: if it is not.
    """
    if bank.ndim != 2 or not bank.is_floating_point():
        raise ValueError(f"{name} must be a float tensor of shape (N, D), got {tuple(bank.shape)} of {bank.dtype}")
    finite = bank.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"{name} hold NaN or infinity in {int((~finite).sum())} of {len(bank)} rows")


def check_pair(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both banks in float64 on the first one's device, after the checks that all pairwise metrics share.

    Raises:
        ValueError: if a bank is not finite, has not more than k samples, or the dimensions differ.
    """
    check_bank("real features", real)
    check_bank("fake features", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features have {real.shape[1]} (real) and {fake.shape[1]} (fake) dimensions; both need the same extractor"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, bank in (("real", real), ("fake", fake)):
        if len(bank) <= k:
            raise ValueError(f"k={k} needs at least {k + 1} {name} samples, got {len(bank)}")
    return real.double(), fake.to(real.device, torch.float64)
