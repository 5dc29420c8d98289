"""Grids against the papers' own numbers, and the promise that the student's times are among the ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from stepdistill.parts.discretisation import Doubling, Even, Karras, Spacing, noise_level, time_of
from stepdistill.sampling import trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule

PATHS = [EDM(80.0), DiscreteVP.linear(), DiscreteVP.scaled_linear(), RectifiedFlow()]


def test_ict_has_eight_stages_from_ten_to_1280_intervals() -> None:
    """N(k) is 11, 21, 41, ..., 1281 points, one stage in 50,000 of 400,000 steps (arXiv:2310.14189 sec. 3.4)."""
    grid = Doubling(10, 1280, 400_000)
    expected = [10 * 2**i for i in range(8)]
    assert [grid.at(50_000 * i) for i in range(8)] == expected
    assert [grid.at(50_000 * i - 1) for i in range(1, 9)] == expected
    assert grid.at(10**9) == 1280


def test_the_last_stage_ends_at_the_end_even_where_that_is_no_power_of_two_away() -> None:
    assert [Doubling(2, 11, 40).at(i) for i in (0, 9, 10, 20, 30, 99)] == [2, 2, 4, 8, 11, 11]
    assert {Doubling(8, 8, 100).at(i) for i in range(0, 200, 7)} == {8}
    assert Doubling(4, 16, 0).at(0) == 4 and Doubling(4, 16, 0).at(2) == 16


@pytest.mark.parametrize(("start", "end"), [(0, 4), (8, 4)])
def test_grids_that_shrink_are_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match=f"got {start} and {end}"):
        Doubling(start, end)


def test_karras_levels_are_those_of_edm() -> None:
    """N = 18 on [.002, 80]: 80, 57.586, 40.786, ..., .007528, .002 (arXiv:2206.00364 eq. 5)."""
    grid = Karras().grid(EDM(80.0), (1.0,), 17)
    assert_close(grid[-3:], torch.tensor([40.78557, 57.58598, 80.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(grid[1], torch.tensor(0.00752802, dtype=torch.float64), rtol=1e-6, atol=0)
    assert grid[0] == 0  # in place of .002, where the paper's boundary is
    assert_close(Karras().levels(EDM(80.0), grid)[0], torch.tensor(0.002, dtype=torch.float64))


@pytest.mark.parametrize("schedule", PATHS, ids=lambda s: type(s).__name__)
def test_levels_mean_the_same_on_every_path(schedule: Schedule) -> None:
    levels = torch.tensor([0.0, 0.05, 0.7, 3.0], dtype=torch.float64)
    times = time_of(schedule, levels)
    assert times[0] == 0
    assert_close(noise_level(schedule, times), levels, rtol=1e-9, atol=0)
    assert noise_level(RectifiedFlow(), torch.ones(1)).isinf()


@pytest.mark.parametrize("spacing", [Even(), Karras(0.02), Karras(0.02, 10.0, 3.0)], ids=str)
@pytest.mark.parametrize("schedule", PATHS[1:], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("own", [trailing(1), trailing(4), (0.97, 0.9, 0.04), (1.0, 0.52, 0.51, 0.5)], ids=str)
def test_every_time_of_the_student_is_an_end_exactly(
    spacing: Spacing, schedule: Schedule, own: tuple[float, ...]
) -> None:
    for n in range(len(own), 24):
        grid = spacing.grid(schedule, own, n)
        assert grid.shape == (n + 1,) and grid.dtype == torch.float64
        assert bool((grid.diff() > 0).all())
        assert grid[0] == 0 and grid[-1] == own[0] * schedule.t_max
        assert {u * schedule.t_max for u in own} <= set(grid.tolist())


def test_only_the_nearest_ends_move() -> None:
    plain, moved = Karras().grid(RectifiedFlow(), (1.0,), 40), Karras().grid(RectifiedFlow(), (1.0, 0.5, 0.25), 40)
    changed = (plain != moved).nonzero()[:, 0].tolist()
    assert changed == sorted((plain - u).abs().argmin().item() for u in (0.5, 0.25))
    assert_close(Even().grid(RectifiedFlow(), trailing(4), 8), torch.arange(9, dtype=torch.float64) / 8, rtol=0, atol=0)


def test_the_noisiest_end_counts_as_sigma_max_where_nothing_is_left_of_the_data() -> None:
    grid = Karras().grid(RectifiedFlow(), (1.0,), 10)
    levels = Karras().levels(RectifiedFlow(), grid)
    assert levels[-1] == 80 and bool((levels.diff() > 0).all())
    u = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 11, dtype=torch.float64) ** 7
    assert_close(levels, u)
    highest = math.sqrt(1 / float((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).prod()) - 1)  # 157.4
    vp = Karras(0.02, 1000.0)
    assert_close(
        vp.levels(DiscreteVP.linear(), vp.grid(DiscreteVP.linear(), (1.0,), 9))[-1],
        torch.tensor(highest, dtype=torch.float64),
    )


def test_levels_beyond_the_nominal_ends_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma_max 80 must enclose all of the student's later times.* 99 there"):
        Karras().levels(RectifiedFlow(), Karras().grid(RectifiedFlow(), (1.0, 0.99), 10))
    with pytest.raises(ValueError, match="got 2, 1 and 7"):
        Karras(2, 1)
