"""Aspect-ratio buckets: sizes of about the same number of pixels, and which bucket each batch is taken from.

NovelAI's scheme of 2022; SDXL's table is appendix I of arXiv:2307.01952.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence

import torch

from stepdistill.models.families.base import Size
from stepdistill.objective import Step

_SDXL_WIDTHS = {
    512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536), 704: (1472, 1408, 1344),
    768: (1344, 1280), 832: (1216, 1152), 896: (1152, 1088), 960: (1088, 1024), 1024: (1024, 960), 1088: (960, 896),
    1152: (896, 832), 1216: (832,), 1280: (768,), 1344: (768,), 1408: (704,), 1472: (704,), 1536: (640,),
    1600: (640,), 1664: (576,), 1728: (576,), 1792: (576,), 1856: (512,), 1920: (512,), 1984: (512,), 2048: (512,),
}  # fmt: skip
SDXL: tuple[Size, ...] = tuple((height, width) for height, widths in _SDXL_WIDTHS.items() for width in widths)
"""Heights and widths that SDXL was trained at."""


def generated(budget: int, step: int, aspect: float) -> tuple[Size, ...]:
    """Sizes (height, width) in multiples of ``step``, each the widest for its height within ``budget`` pixels.

    Args:
        budget: pixels of an image at most.
        step: of both sides.
        aspect: largest ratio of the longer side to the shorter, at least 1.

    Raises:
        ValueError: if not even one step by one step is within the budget.
    """
    if step * step > budget:
        raise ValueError(f"data.bucket_step {step}: a bucket has {budget} pixels; use a smaller step")
    sizes = set()
    for height in range(step, math.isqrt(budget) + 1, step):
        width = budget // height // step * step
        if width / height <= aspect:
            sizes |= {(height, width), (width, height)}
    return tuple(sorted(sizes))


def nearest(size: Size, table: Sequence[Size]) -> Size:
    """The size of ``table`` whose aspect ratio is closest to that of ``size`` on a log scale."""
    wanted = math.log(size[1] / size[0])
    return min(table, key=lambda one: (abs(math.log(one[1] / one[0]) - wanted), one))


def taken_in_turn(counts: Sequence[int], batch: int, seed: int) -> Callable[[int], tuple[int, int]]:
    """Which bucket batch ``index`` is taken from, and how many came from it before: a function of the index alone.

    By the end of epoch e a bucket of n rows has given floor(e n / batch) batches, so that every row counts the same in
    the long run, those of buckets smaller than a batch too. Within an epoch the buckets' order is drawn.
    """

    def given(epoch: int) -> list[int]:
        return [epoch * n // batch for n in counts]

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> list[tuple[int, int]]:
        before, after = given(epoch), given(epoch + 1)
        turns = [b for b in range(len(counts)) for _ in range(after[b] - before[b])]
        found = []
        for i in torch.randperm(len(turns), generator=Step.at(epoch, seed, len(counts)).rng).tolist():
            bucket = turns[i]
            found.append((bucket, before[bucket]))
            before[bucket] += 1
        return found

    def turn(index: int) -> tuple[int, int]:
        if len(counts) == 1:
            return 0, index
        # sum(given(e)) is at most e N / batch and at least that less the number of buckets
        low = index * batch // sum(counts)
        high = (index + len(counts) + 1) * batch // sum(counts) + 2
        epoch = bisect.bisect_right(range(low, high), index, key=lambda e: sum(given(e))) + low - 1
        return order(epoch)[index - sum(given(epoch))]

    return turn
