"""Segments against brute force over all grid points."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stepdistill.parts.segments import Segments
from stepdistill.sampling import Sampler, trailing

CASES = [(1, 1), (1, 16), (2, 6), (4, 16), (8, 64), (5, 5)]


@pytest.mark.parametrize(("count", "steps"), CASES)
def test_the_lower_edge_is_the_nearest_edge_strictly_below(count: int, steps: int) -> None:
    """A point on an edge therefore belongs to the segment below it, and every segment has a start at its top."""
    segments = Segments(count, steps)
    edges = [k * steps // count for k in range(count + 1)]  # grid indices of all edges, 0 among them
    index = torch.arange(1, steps + 1)
    expected = [max(e for e in edges if e < i) for i in range(1, steps + 1)]
    assert segments.lower_edge(index).tolist() == expected
    assert segments.lower_edge(index).dtype == torch.int64
    assert bool((segments.lower_edge(index) < index).all())
    per_edge = segments.lower_edge(index).bincount()
    assert per_edge[per_edge > 0].tolist() == [steps // count] * count


@pytest.mark.parametrize(("count", "steps"), CASES)
def test_upper_edges_are_grid_points_and_the_students_own_grid(count: int, steps: int) -> None:
    segments = Segments(count, steps)
    assert segments.edges == trailing(count) == Sampler(segments.edges).times
    index = [steps - k * steps // count for k in range(count)]
    assert_close(segments.time(torch.tensor(index)), torch.tensor(segments.edges, dtype=torch.float64))


def test_grid_times_run_from_the_data_to_the_noise_in_equal_steps() -> None:
    t = Segments(2, 6).time(torch.arange(7))
    assert t.dtype == torch.float64
    assert_close(t, torch.tensor([k / 6 for k in range(7)], dtype=torch.float64), rtol=0, atol=0)


def test_four_segments_of_sixteen_steps_by_hand() -> None:
    segments = Segments(4, 16)
    index = torch.tensor([16, 13, 12, 9, 8, 5, 4, 1])
    assert segments.lower_edge(index).tolist() == [12, 12, 8, 8, 4, 4, 0, 0]
    assert segments.edges == (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize(("count", "steps"), [(3, 16), (0, 16), (4, 2)])
def test_edges_off_the_solvers_grid_are_refused(count: int, steps: int) -> None:
    with pytest.raises(ValueError, match=f"got {steps} steps and {count} segments"):
        Segments(count, steps)
