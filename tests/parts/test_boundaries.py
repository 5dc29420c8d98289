"""Given edges against brute force over all grid points, and against equal segments."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stepdistill.parts.segments import Boundaries, Segments
from stepdistill.sampling import trailing

CASES = [((1.0,), 5), ((1.0, 0.78, 0.52, 0.26), 50), ((1.0, 0.7, 0.34), 50), ((1.0, 0.9, 0.1), 10)]


@pytest.mark.parametrize(("edges", "steps"), CASES)
def test_edges_are_the_nearest_on_either_side_and_never_the_point_itself(edges: tuple[float, ...], steps: int) -> None:
    boundaries = Boundaries(edges, steps)
    points = [0.0, *reversed(edges)]
    index = torch.arange(1, steps + 1)
    below = [max(p for p in points if p < k / steps - 1e-9) for k in index.tolist()]
    above = [min(p for p in points if p > k / steps + 1e-9) for k in (index - 1).tolist()]
    lower, upper = boundaries.lower_edge(index), boundaries.upper_edge(index - 1)
    assert lower.dtype == upper.dtype == torch.int64
    assert_close(boundaries.time(lower), torch.tensor(below, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(boundaries.time(upper), torch.tensor(above, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("count", "steps"), [(1, 16), (4, 16), (8, 64)])
def test_equal_edges_make_equal_segments(count: int, steps: int) -> None:
    given, equal, index = Boundaries(trailing(count), steps), Segments(count, steps), torch.arange(1, steps + 1)
    assert given.edges == equal.edges
    assert torch.equal(given.lower_edge(index), equal.lower_edge(index))
    assert torch.equal(given.upper_edge(index - 1), equal.lower_edge(index) + steps // count)
    assert torch.equal(given.time(index), equal.time(index))


@pytest.mark.parametrize(
    ("edges", "complaint"),
    [
        ((), "must fall from 1"),
        ((0.9, 0.5), "must fall from 1"),
        ((1.0, 0.5, 0.5), "must fall from 1"),
        ((1.0, 0.5, 0.0), "must fall from 1"),
        ((1.0, 0.33), "0.33 is no point of a grid of 10"),
    ],
)
def test_edges_that_cannot_be_walked_are_refused(edges: tuple[float, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Boundaries(edges, 10)
