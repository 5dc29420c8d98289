"""Distances against loops over elements and against their limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from stepdistill.functional.distances import L2, Distance, ElementHuber, Huber

ALL = [L2(), Huber(), Huber(0.5), ElementHuber(), ElementHuber(0.5)]


def test_squared_error_is_the_mean_over_a_samples_elements() -> None:
    a, b = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    by_hand = [sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) / 4 for p, q in rows(a, b)]
    assert_close(L2()(a, b), torch.tensor(by_hand, dtype=torch.float64))


def test_huber_is_the_papers_on_the_norm_over_root_d() -> None:
    """iCT: sqrt(|d|^2 + c^2) - c with c = .00054 sqrt(D)."""
    a, b = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(3, 2, 8, dtype=torch.float64)
    for scale in (0.00054, 0.7):
        c = scale * math.sqrt(16)
        by_hand = [
            (math.sqrt(sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) + c * c) - c) / 4 for p, q in rows(a, b)
        ]
        assert_close(Huber(scale)(a, b), torch.tensor(by_hand, dtype=torch.float64))
    assert Huber().scale == 0.00054


def test_element_huber_is_taken_element_by_element() -> None:
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    by_hand = [sum(math.sqrt((x - y) ** 2 + 0.01) - 0.1 for x, y in zip(p, q, strict=True)) / 5 for p, q in rows(a, b)]
    assert_close(ElementHuber(0.1)(a, b), torch.tensor(by_hand, dtype=torch.float64))


def test_hubers_are_absolute_far_out_and_squared_close_by() -> None:
    a, b = torch.full((1, 4), 3.0, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    for kind in (Huber, ElementHuber):
        assert_close(kind(1e-9)(a, b), torch.tensor([3.0], dtype=torch.float64), rtol=1e-6, atol=0)
        assert_close(kind(1e4)(a, b), torch.tensor([9.0 / 2e4], dtype=torch.float64), rtol=1e-4, atol=0)
    # what tells them apart: one outlier among zeros
    b[0, 0], a = 8.0, torch.zeros_like(a)
    assert_close(Huber(1e-9)(a, b), torch.tensor([4.0], dtype=torch.float64))
    assert_close(ElementHuber(1e-9)(a, b), torch.tensor([2.0], dtype=torch.float64))


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_a_distance_is_zero_at_home_even_symmetric_and_smooth(distance: Distance) -> None:
    a = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 4, dtype=torch.float64)
    assert_close(distance(a, a.detach()), torch.zeros(3, dtype=torch.float64))
    (still,) = torch.autograd.grad(distance(a, a.detach()).sum(), a)
    assert_close(still, torch.zeros_like(still))  # no nan from a square root at zero
    assert_close(distance(a, b), distance(b, a))
    assert torch.autograd.gradcheck(lambda x: distance(x, b), a)
    assert bool((distance(a, b) > 0).all())


@pytest.mark.parametrize("distance", ALL, ids=str)
def test_a_distance_does_not_depend_on_resolution(distance: Distance) -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    big_a, big_b = (x.repeat(1, 1, 2, 2) for x in (a, b))
    assert_close(distance(big_a, big_b), distance(a, b))


def rows(a: torch.Tensor, b: torch.Tensor) -> list[tuple[list[float], list[float]]]:
    return list(zip(a.flatten(1).tolist(), b.flatten(1).tolist(), strict=True))
