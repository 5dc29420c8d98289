"""Kernel distances against slow loops and what their expectations must be."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from stepdistill.evaluation import mmd
from stepdistill.evaluation.mmd import cmmd, kid, kid_blocks


def bank(n: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def cubic(x: Tensor, y: Tensor) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def loop_kid(real: Tensor, fake: Tensor) -> float:
    def within(bank: Tensor) -> float:
        return statistics.mean(cubic(x, y) for i, x in enumerate(bank) for j, y in enumerate(bank) if i != j)

    return within(real) + within(fake) - 2 * statistics.mean(cubic(x, y) for x in real for y in fake)


def test_kid_equals_an_explicit_loop(monkeypatch):
    monkeypatch.setattr(mmd, "CHUNK", 4)
    real, fake = bank(11, 3, 0), bank(7, 3, 1, shift=0.5)
    assert kid(real, fake) == pytest.approx(loop_kid(real, fake), rel=1e-10)


def test_kid_of_equal_distributions_is_zero_on_average():
    """Unbiased: the mean over 200 draws lies within four standard errors of 0, where the biased form is far off."""
    draws = torch.tensor([kid(bank(30, 8, 2 * i), bank(30, 8, 2 * i + 1)) for i in range(200)])
    error = float(draws.std()) / math.sqrt(200)
    assert abs(float(draws.mean())) < 4 * error < 0.1
    assert float(draws.min()) < 0
    assert kid(bank(300, 8, 0), bank(300, 8, 1, shift=1.0)) > 100 * error


def test_kid_equals_torchmetrics_on_one_subset_of_all_samples():
    from torchmetrics.image.kid import KernelInceptionDistance  # slow to import

    class Identity(torch.nn.Module):
        num_features = 6

        def forward(self, features: Tensor) -> Tensor:
            return features

    real, fake = bank(40, 6, 0).float(), bank(40, 6, 1, shift=0.3).float()
    peer = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=40)
    peer.update(real, real=True)
    peer.update(fake, real=False)
    assert kid(real, fake) == pytest.approx(float(peer.compute()[0]), rel=1e-4)


def test_blocks_are_disjoint_and_use_every_sample():
    """Each block's value is a loop over its own part of a permutation."""
    real, fake = bank(20, 2, 0), bank(12, 2, 1, shift=0.4)
    values = kid_blocks(real, fake, blocks=4, seed=3)
    rng = torch.Generator().manual_seed(3)
    rows, columns = torch.randperm(20, generator=rng).view(4, 5), torch.randperm(12, generator=rng).view(4, 3)
    expected = [loop_kid(real[i], fake[j]) for i, j in zip(rows, columns, strict=True)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_standard_error_of_blocks_is_that_of_fresh_samples():
    """The spread of the blocks' mean over fresh samples is what the blocks of one sample say it is."""
    said, means = [], []
    for i in range(150):
        values = kid_blocks(bank(100, 4, 2 * i), bank(100, 4, 2 * i + 1, shift=0.5), blocks=10)
        said.append(float(values.var()) / 10)
        means.append(float(values.mean()))
    assert statistics.mean(said) == pytest.approx(statistics.variance(means), rel=0.3)


def test_cmmd_equals_an_explicit_loop(monkeypatch):
    monkeypatch.setattr(mmd, "CHUNK", 5)
    real, fake = bank(9, 4, 0), bank(13, 4, 1, shift=1.0)

    def kernel(x: Tensor, y: Tensor) -> float:
        return math.exp(-float(((x / x.norm() - y / y.norm()) ** 2).sum()) / (2 * 10**2))

    def mean(a: Tensor, b: Tensor) -> float:
        return statistics.mean(kernel(x, y) for x in a for y in b)

    expected = 1000 * (mean(real, real) + mean(fake, fake) - 2 * mean(real, fake))
    assert cmmd(real, fake) == pytest.approx(expected, rel=1e-9)
    assert cmmd(real, 7 * fake) == pytest.approx(expected, rel=1e-9)  # lengths do not count


def test_cmmd_of_a_bank_with_itself_is_zero_and_small_banks_are_biased_upwards():
    x = bank(50, 8, 0)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-10)
    small = statistics.mean(cmmd(bank(10, 8, i), bank(10, 8, 100 + i)) for i in range(20))
    large = statistics.mean(cmmd(bank(80, 8, i), bank(80, 8, 100 + i)) for i in range(20))
    assert small == pytest.approx(8 * large, rel=0.3)  # the bias is c (1 / N + 1 / M)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(bank(9, 2, 0), torch.full((9, 2), math.nan)), "fake features hold NaN"),
        (lambda: kid(bank(1, 2, 0), bank(9, 2, 0)), "at least 2 real samples, got 1"),
        (lambda: kid_blocks(bank(9, 2, 0), bank(9, 2, 0), blocks=5), "5 blocks need at least 10 real samples, got 9"),
        (lambda: kid_blocks(bank(9, 2, 0), bank(9, 2, 0), blocks=1), "at least 2, got 1"),
        (lambda: cmmd(bank(9, 2, 0), torch.zeros(3, 2)), "fake features have a row of zeros"),
        (lambda: cmmd(bank(9, 2, 0), bank(9, 3, 0)), r"2 \(real\) and 3 \(fake\)"),
    ],
)
def test_bad_banks_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
