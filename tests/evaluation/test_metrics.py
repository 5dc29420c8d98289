"""Set metrics against closed forms, slow loops, and torchmetrics."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from stepdistill.evaluation import metrics
from stepdistill.evaluation.metrics import MeanCov, Moments, density_coverage, frechet_distance, precision_recall


def bank(n: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    noise = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * noise + shift


def bank_with_moments(n: int, mean: Tensor, cov: Tensor, seed: int) -> Tensor:
    """A sample whose mean and unbiased covariance are exactly the given ones."""
    x = bank(n, len(mean), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # now of unit covariance
    return x @ torch.linalg.cholesky(cov).T + mean


def rotation(dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(bank(dim, dim, seed)).Q


# Mean and covariance


def test_streaming_equals_one_batch():
    x = bank(257, 5, 0, scale=3.0, shift=2.0)
    stream = MeanCov(5)
    for block in x.split([1, 100, 0, 56, 100]):
        stream.update(block)
    assert stream.count == 257
    torch.testing.assert_close(stream.mean, x.mean(0))
    torch.testing.assert_close(stream.cov, torch.cov(x.T))


def test_merged_shares_equal_the_whole():
    x = bank(90, 4, 1, shift=-1.0)
    merged = MeanCov.of(x[:20]).merge(MeanCov(4)).merge(MeanCov.of(x[20:]))
    torch.testing.assert_close(merged.mean, x.mean(0))
    torch.testing.assert_close(merged.cov, torch.cov(x.T))
    torch.testing.assert_close(MeanCov(4).merge(MeanCov.of(x)).cov, torch.cov(x.T))


def test_covariance_survives_a_mean_far_above_the_spread():
    """Sums of x and x xT lose everything here: 1e8 squared leaves no digit for a variance of 1."""
    x = bank(500, 3, 2, shift=1e8)
    stream = MeanCov(3)
    for block in x.split(37):
        stream.update(block)
    torch.testing.assert_close(stream.cov, torch.cov((x - 1e8).T), rtol=1e-6, atol=1e-6)


def test_float32_features_are_summed_in_float64():
    x = bank(100, 3, 3).float()
    assert MeanCov.of(x).cov.dtype == torch.float64
    torch.testing.assert_close(MeanCov.of(x).cov, torch.cov(x.double().T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MeanCov(0), "dim must be at least 1"),
        (lambda: MeanCov.of(torch.ones(3)), "shape"),
        (lambda: MeanCov.of(torch.ones(3, 2, dtype=torch.long)), "float"),
        (lambda: MeanCov(3).update(torch.ones(2, 4)), "4 dimensions, expected 3"),
        (lambda: MeanCov.of(torch.tensor([[1.0], [math.nan], [math.inf]])), "NaN or infinity in 2 of 3 rows"),
        (lambda: MeanCov(3).merge(MeanCov(4)), "cannot merge"),
        (lambda: MeanCov.of(torch.ones(1, 2)).cov, "at least 2 samples, got 1"),
        (lambda: frechet_distance(MeanCov.of(bank(5, 2, 0)), MeanCov.of(bank(5, 3, 0))), "2 and 3 dimensions"),
        (lambda: precision_recall(bank(5, 2, 0), bank(9, 2, 0), k=5), "at least 6 real samples, got 5"),
        (lambda: density_coverage(bank(9, 2, 0), bank(5, 2, 0), k=5), "at least 6 fake samples, got 5"),
        (lambda: precision_recall(bank(9, 2, 0), bank(9, 2, 0), k=0), "k must be"),
        (lambda: density_coverage(bank(9, 2, 0), bank(9, 3, 0)), r"2 \(real\) and 3 \(fake\)"),
        (lambda: precision_recall(bank(9, 2, 0), torch.full((9, 2), math.nan)), "fake features hold NaN"),
    ],
)
def test_bad_banks_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Frechet distance


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    """N(0, 4I) against N(0.5, 9I) in 8 dimensions: 8 * 0.25 + 8 * (2 - 3)^2 = 10."""
    a = bank_with_moments(64, torch.zeros(8).double(), 4 * torch.eye(8).double(), 0)
    b = bank_with_moments(50, torch.full((8,), 0.5).double(), 9 * torch.eye(8).double(), 1)
    assert frechet_distance(MeanCov.of(a), MeanCov.of(b)) == pytest.approx(10, abs=1e-10)


def test_frechet_distance_of_commuting_covariances():
    """With a common eigenbasis it is the sum of squared differences of standard deviations."""
    q = rotation(3, 5)
    cov_a = q @ torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()) @ q.T
    cov_b = q @ torch.diag(torch.tensor([16.0, 1.0, 9.0]).double()) @ q.T
    a, b = bank_with_moments(20, q[0], cov_a, 0), bank_with_moments(30, q[0], cov_b, 1)
    assert frechet_distance(MeanCov.of(a), MeanCov.of(b)) == pytest.approx(9 + 1 + 0, abs=1e-10)


@pytest.mark.parametrize("n", [200, 7])
def test_equal_banks_have_frechet_distance_zero(n):
    """For n < D, rooted rounding errors of the null directions would give some 1e-6."""
    stats = MeanCov.of(bank(n, 16, 0, scale=5.0))
    assert frechet_distance(stats, stats) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("n", "m"), [(200, 300), (6, 300), (6, 9)])
def test_frechet_distance_is_symmetric_and_ignores_rotations(n, m):
    a, b, q = bank(n, 12, 0), bank(m, 12, 1, scale=2.0, shift=0.3), rotation(12, 2)
    fd = frechet_distance(MeanCov.of(a), MeanCov.of(b))
    assert fd > 1
    assert frechet_distance(MeanCov.of(b), MeanCov.of(a)) == pytest.approx(fd, rel=1e-10)
    assert frechet_distance(MeanCov.of(a @ q), MeanCov.of(b @ q)) == pytest.approx(fd, rel=1e-10)


def naive_frechet_distance(a: Tensor, b: Tensor) -> float:
    """The formula on the banks themselves: tr (C1 C2)^(1/2) is the nuclear norm of Xc Yc^T over its counts."""
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    scale = math.sqrt((len(a) - 1) * (len(b) - 1))
    cross = torch.linalg.svdvals(centred_a @ centred_b.T).sum() / scale
    spread = centred_a.square().sum() / (len(a) - 1) + centred_b.square().sum() / (len(b) - 1)
    return float((a.mean(0) - b.mean(0)).square().sum() + spread - 2 * cross)


@pytest.mark.parametrize(("n", "m"), [(5, 40), (5, 9), (40, 60)])
def test_frechet_distance_with_fewer_samples_than_dimensions(n, m):
    a, b = bank(n, 24, 3), bank(m, 24, 4, scale=1.5, shift=0.2)
    assert frechet_distance(MeanCov.of(a), MeanCov.of(b)) == pytest.approx(naive_frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_with_constant_features():
    """Digits have corner pixels that never change: both covariances are singular with plenty of samples."""
    a, b = bank(100, 6, 0), bank(80, 6, 1, scale=2.0)
    a[:, 2:4], b[:, 3] = 1.0, -1.0
    assert frechet_distance(MeanCov.of(a), MeanCov.of(b)) == pytest.approx(naive_frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("dim", [3, 70, 200])
def test_frechet_distance_of_many_features_takes_every_panel(dim):
    """70 and 200 features are several panels, the last one short; condition numbers of 1e9, and singular ones."""
    scale = torch.logspace(0, -4.5, dim).double()
    a, b = bank(2 * dim, dim, 0) * scale @ rotation(dim, 2), bank(3 * dim, dim, 1) * scale @ rotation(dim, 3)
    assert frechet_distance(MeanCov.of(a), MeanCov.of(b)) == pytest.approx(naive_frechet_distance(a, b), rel=1e-9)
    flat = b - b[:, :1]  # one direction less
    assert frechet_distance(MeanCov.of(a), MeanCov.of(flat)) == pytest.approx(naive_frechet_distance(a, flat), rel=1e-9)
    loose = Moments(b.mean(0), torch.cov(b.T))
    assert frechet_distance(loose, MeanCov.of(a)) == pytest.approx(naive_frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("low", [1e-4, 1e-7, 1e-8, 1e-10, 1e-14])
def test_frechet_distance_is_exact_where_squares_would_round(low):
    """Half the directions have almost no variance; the truth is the sum over a common eigenbasis."""
    q = rotation(128, 0)
    one, other = (
        torch.cat([torch.full((64,), v), torch.full((64,), v * w * low)]).double() for v, w in ((1, 1), (1.1, 1.2))
    )
    a, b = (Moments(torch.zeros(128).double(), (q * spread) @ q.T) for spread in (one, other))
    exact = float((one.sqrt() - other.sqrt()).square().sum())
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)


def test_frechet_distance_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import

    class Identity(torch.nn.Module):
        num_features = 8

        def forward(self, features: Tensor) -> Tensor:
            return features

    a, b = bank(60, 8, 0), bank(70, 8, 1, scale=1.3, shift=0.2)
    peer = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    peer.update(a, real=True)
    peer.update(b, real=False)
    assert frechet_distance(MeanCov.of(a), MeanCov.of(b)) == pytest.approx(float(peer.compute()), rel=1e-6)


# Neighbours


def distance(x: Tensor, y: Tensor) -> float:
    return math.sqrt(sum((float(p) - float(q)) ** 2 for p, q in zip(x, y, strict=True)))


def radius(points: Tensor, i: int, k: int) -> float:
    return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def loop_precision(real: Tensor, fake: Tensor, k: int) -> float:
    radii = [radius(real, i, k) for i in range(len(real))]
    inside = [any(distance(f, r) <= radii[i] for i, r in enumerate(real)) for f in fake]
    return sum(inside) / len(inside)


def loop_density_coverage(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    hits, covered = 0, 0
    for i, r in enumerate(real):
        reach = radius(real, i, k)
        inside = sum(distance(f, r) < reach for f in fake)
        hits, covered = hits + inside, covered + (inside > 0)
    return hits / (k * len(fake)), covered / len(real)


@pytest.fixture(params=["continuous", "integer"])
def overlapping(request) -> tuple[Tensor, Tensor]:
    """Two half-overlapping clouds; the integer ones are full of ties and duplicates, where < and <= part."""
    real, fake = bank(40, 3, 0), bank(31, 3, 1, scale=1.2, shift=0.8)
    return (real, fake) if request.param == "continuous" else ((2 * real).round(), (2 * fake).round())


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_a_double_loop(overlapping, k, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)  # several blocks, the last one short
    real, fake = overlapping
    got = precision_recall(real, fake, k)
    assert got.precision == pytest.approx(loop_precision(real, fake, k), abs=1e-12)
    assert got.recall == pytest.approx(loop_precision(fake, real, k), abs=1e-12)
    assert 0 < got.precision < 1 or k > 1


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_equal_a_double_loop(overlapping, k, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    real, fake = overlapping
    assert density_coverage(real, fake, k) == pytest.approx(loop_density_coverage(real, fake, k), abs=1e-12)


def test_ball_ends_at_the_neighbour_by_hand():
    """Real 0, 1, 3 with k = 1: radii 1, 1, 2. A sample at 5 is on the last ball's rim: inside for <=, outside for <."""
    real = torch.tensor([[0.0], [1.0], [3.0]])
    fake = torch.tensor([[5.0], [9.0]])
    assert precision_recall(real, fake, k=1).precision == 0.5
    assert density_coverage(real, fake, k=1) == (0, 0)
    # 4.9 is within 2 of 3 only; generated radii are 4.1 around 4.9 and 9.0, so of 0, 1, 3 both 1 and 3 are recalled.
    near = torch.tensor([[4.9], [9.0]])
    assert density_coverage(real, near, k=1) == pytest.approx((0.5, 1 / 3))
    assert precision_recall(real, near, k=1) == pytest.approx((0.5, 2 / 3))


def test_disjoint_clusters_score_zero():
    real, fake = bank(30, 4, 0), bank(30, 4, 1, shift=100.0)
    assert precision_recall(real, fake) == (0, 0)
    assert density_coverage(real, fake) == (0, 0)


def test_identical_banks_score_one():
    x = bank(60, 4, 0)
    assert precision_recall(x, x) == (1, 1)
    # Strictly inside the ball of the k-th neighbour lie the sample itself and k - 1 others: density is exactly k / k.
    assert density_coverage(x, x) == (1, 1)


def test_copies_are_at_distance_zero():
    """Six copies of every sample leave balls of radius 0, which still hold copies; |x|^2 - 2xy + |y|^2 loses that."""
    samples = bank(20, 64, 0, shift=10.0)
    real, fake = samples.repeat(6, 1), samples.repeat_interleave(7, 0)
    assert precision_recall(real, fake) == (1, 1)
    assert density_coverage(real, fake) == (0, 0)


def test_collapse_keeps_precision_and_loses_coverage():
    x = bank(200, 4, 0)
    collapsed = x[:1] + bank(200, 4, 1, scale=1e-3)
    assert precision_recall(x, collapsed) == (1, pytest.approx(0, abs=0.01))
    assert density_coverage(x, collapsed).coverage < 0.15


def test_digits_sized_banks_are_quick():
    real, fake = bank(1437, 64, 0), bank(1437, 64, 1)
    start = time.process_time()
    precision_recall(real, fake)
    density_coverage(real, fake)
    assert time.process_time() - start < 3  # 0.6 s on one idle core
