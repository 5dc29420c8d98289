"""Buckets: tables of sizes, the nearest size, and an order of batches that treats every row alike."""

from __future__ import annotations

import math

import pytest

from stepdistill.data.buckets import SDXL, generated, nearest, taken_in_turn


def test_generated_buckets_fill_their_budget_from_tall_to_wide() -> None:
    table = generated(512 * 512, 64, 2.0)
    assert (512, 512) in table and len(table) == len(set(table))
    for height, width in table:
        assert height % 64 == width % 64 == 0 and (width, height) in table
        assert height * width <= 512 * 512 < max(height, width) * min(height, width) + 64 * min(height, width)
        assert max(height, width) / min(height, width) <= 2
    assert max(width / height for height, width in table) > 1.6


def test_a_step_larger_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.bucket_step 64: a bucket has 256 pixels; use a smaller step"):
        generated(16 * 16, 64, 2.0)


def test_sdxls_table_is_that_of_its_report() -> None:
    """Appendix I: 40 rows from 0.25 to 4.0 in multiples of 64, none far from a megapixel."""
    assert len(SDXL) == len(set(SDXL)) == 40
    assert all(h % 64 == w % 64 == 0 and 0.86 < h * w / 2**20 <= 1.0 for h, w in SDXL)
    ratios = [h / w for h, w in SDXL]
    assert ratios == sorted(ratios) and (ratios[0], ratios[-1]) == (0.25, 4.0)
    assert {(1024, 1024), (832, 1216), (1216, 832), (704, 1344), (768, 1344), (1536, 640)} <= set(SDXL)


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 10), (512, 512)), ((3000, 2000), (576, 448)), ((100, 900), (384, 640))]
)
def test_an_image_goes_to_the_closest_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    table = ((512, 512), (576, 448), (384, 640))
    assert nearest(size, table) == expected
    by_hand = min(table, key=lambda t: abs(math.log((t[1] / t[0]) / (size[1] / size[0]))))
    assert nearest(size, table) == by_hand


@pytest.mark.parametrize(("counts", "batch"), [((7, 30, 1), 4), ((100, 3, 50, 2), 8), ((2, 1), 16), ((5,), 2)])
def test_every_row_of_every_bucket_counts_the_same(counts: tuple[int, ...], batch: int) -> None:
    """Also those of buckets that are smaller than a batch; numbers within a bucket follow one another."""
    turn = taken_in_turn(counts, batch, 0)
    epochs = 60
    total = sum(epochs * n // batch for n in counts)
    seen = [turn(i) for i in range(total)]
    for bucket, n in enumerate(counts):
        numbers = [number for b, number in seen if b == bucket]
        assert numbers == list(range(epochs * n // batch))  # rows seen = batch * len = 60 n, to within a batch
    assert [taken_in_turn(counts, batch, 0)(i) for i in reversed(range(total))] == seen[::-1]


def test_buckets_are_mixed_anew_with_every_epoch_and_seed() -> None:
    turn, other = taken_in_turn((40, 40), 4, 0), taken_in_turn((40, 40), 4, 1)
    first, second = ([turn(i + start)[0] for i in range(20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == [0] * 10 + [1] * 10
    assert first != second and first != sorted(first) and [other(i)[0] for i in range(20)] != first
