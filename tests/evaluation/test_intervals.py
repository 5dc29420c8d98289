"""Intervals against tables, scipy, and a fast simulation with known truth; eval/intervals.py has the long one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from eval import intervals as simulation
from stepdistill.evaluation.intervals import (
    Interval,
    bootstrap_mean,
    paired_bootstrap,
    supported_digits,
    t_difference,
    t_interval,
    wilson_interval,
)
from stepdistill.evaluation.mmd import kid
from stepdistill.evaluation.tables import format_value


@pytest.mark.parametrize(("m", "t"), [(2, 12.706), (3, 4.303), (5, 2.776)])
def test_t_interval_takes_the_tabulated_quantile(m, t):
    values = [10.0 + i for i in range(m)]
    got = t_interval(values)
    deviation = np.std(values, ddof=1)
    assert got.value == pytest.approx(np.mean(values))
    assert got.half_width == pytest.approx(t * deviation / math.sqrt(m), rel=1e-3)
    assert (got.low, got.high) == pytest.approx(stats.t.interval(0.95, m - 1, np.mean(values), stats.sem(values)))


def test_seedwise_difference_drops_what_seeds_share():
    shared = torch.tensor([1.0, 5.0, -3.0, 2.0])
    a, b = shared + torch.tensor([0.30, 0.31, 0.29, 0.30]), shared
    assert t_difference(a, b).decides
    assert not Interval(0.3, t_interval(a).low - t_interval(b).high, 9, "student-t", 4).decides


def test_wilson_equals_scipys():
    for successes, n in ((0, 10), (3, 7), (98, 100), (100, 100)):
        expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        got = wilson_interval(successes, n)
        assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert got.low <= got.value <= got.high


def test_bootstrap_of_many_prompts_is_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double().exp()
    got = bootstrap_mean(values)
    error = float(values.std()) / 20
    assert got.high - got.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert got.high - got.value > got.value - got.low  # skewed as the values are


def test_bootstrap_averages_seeds_and_resamples_prompts():
    """Sixteen seeds alike are one value: counted as images they would make the interval 4 times too short."""
    prompts = torch.randn(50, generator=torch.Generator().manual_seed(1)).double()
    assert bootstrap_mean(prompts[:, None].expand(-1, 16)) == bootstrap_mean(prompts)


def test_bootstrap_in_small_parts_is_the_same_kind_of_interval(monkeypatch):
    from stepdistill.evaluation import intervals

    values = torch.randn(60, generator=torch.Generator().manual_seed(2)).double()
    whole = bootstrap_mean(values)
    monkeypatch.setattr(intervals, "AT_ONCE", 60 * 999)
    parts = bootstrap_mean(values)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def test_paired_bootstrap_finds_a_planted_shift():
    rng = torch.Generator().manual_seed(0)
    difficulty = 10 * torch.randn(80, generator=rng).double()
    b = difficulty + 0.1 * torch.randn(80, generator=rng)
    a = difficulty + 0.1 * torch.randn(80, generator=rng) + 0.2
    got = paired_bootstrap(a, b)
    assert got.difference.decides and got.difference.low < 0.2 < got.difference.high
    assert got.win_rate == pytest.approx(float((a > b).double().mean())) and got.win_rate > 0.8
    assert paired_bootstrap(b, b).win_rate == 0.5


def test_stated_intervals_cover_the_truth(monkeypatch):
    """Seeds, bootstrap and Wilson, 95 % each: 800 draws miss by less than three standard errors of a share, 2.3 %."""
    monkeypatch.setattr("stepdistill.evaluation.intervals.RESAMPLES", 1000)
    rng = torch.Generator().manual_seed(0)
    hits = {"t3": 0, "z3": 0, "bootstrap": 0, "wilson": 0}
    for i in range(800):
        seeds = 2 + torch.randn(3, generator=rng).double()
        interval = t_interval(seeds)
        hits["t3"] += interval.low < 2 < interval.high
        error = float(seeds.std()) / math.sqrt(3)
        hits["z3"] += abs(float(seeds.mean()) - 2) < 1.96 * error
        prompts = torch.rand(40, generator=rng).double()
        interval = bootstrap_mean(prompts, seed=i)
        hits["bootstrap"] += interval.low < 0.5 < interval.high
        right = int((torch.rand(300, generator=rng) < 0.93).sum())
        interval = wilson_interval(right, 300)
        hits["wilson"] += interval.low < 0.93 < interval.high
    share = {name: count / 800 for name, count in hits.items()}
    assert all(0.927 < share[name] < 0.973 for name in ("t3", "bootstrap", "wilson")), share
    assert share["z3"] < 0.85  # why the quantile of few seeds matters


def test_intervals_of_frechet_distance_recall_and_kid_cover_the_truth():
    """The simulation itself, shortened: 200 draws miss by less than three standard errors, 4.6 %."""
    rows = [*simulation.frechet_rows(200, n=50), *simulation.kid_rows(200, n=100)]
    rows += simulation.neighbour_rows(200, n=60)
    claimed = [row for row in rows if row.claimed]
    assert {row.metric for row in claimed} == {"FD", "recall", "precision", "KID"}
    assert all(row.coverage > 0.904 for row in claimed), claimed
    # 60 references support no finer recall than 6 %, and intervals as wide as that hold more often
    assert all(row.coverage < 0.996 for row in claimed if row.metric != "recall"), claimed
    assert all(row.coverage < 0.9 for row in rows if not row.claimed)


def test_kids_closed_form_is_its_mean():
    rng = torch.Generator().manual_seed(0)
    found = [kid(simulation.features(400, rng, 1.0, 0.0), simulation.features(400, rng)) for _ in range(60)]
    truth = simulation.kid_truth(simulation.SCALE, simulation.SHIFT)
    assert abs(np.mean(found) - truth) < 3 * stats.sem(found) < truth / 5
    assert simulation.kid_truth(1.0, 0.0) == 0


def test_published_coverage_is_that_of_the_record():
    """93 to 97 % of everything that is claimed, and the table shows the record."""
    folder = Path(simulation.__file__).parent
    rows = [simulation.Row(**row) for row in json.loads((folder / "intervals.json").read_text())["rows"]]
    assert all(0.93 <= row.coverage <= 0.97 for row in rows if row.claimed)
    assert {"FD", "KID", "recall", "accuracy"} <= {row.metric for row in rows if row.claimed}
    text = (folder / "metrics.md").read_text()
    assert (
        simulation.table(rows) == text.partition("<!-- coverage:begin -->\n")[2].partition("<!-- coverage:end -->")[0]
    )


@pytest.mark.parametrize(
    ("value", "half", "digits"),
    [
        (12.346, 0.0123, 2),
        (1234.0, 56.0, -1),
        (0.5, 0.097, 1),
        (0.5, 0.09, 2),
        (98.7, 3.0, 0),
        (5, 9.5, -1),
        (5, 10, -1),
    ],
)
def test_supported_digits_are_those_that_tables_show(value, half, digits):
    interval = Interval(value, value - half, value + half, "student-t", 3)
    assert supported_digits(interval) == digits
    shown = format_value(value, half).split(" ± ")[0]
    assert shown == f"{round(value, digits) + 0.0:.{max(digits, 0)}f}"


def test_an_interval_without_width_limits_nothing():
    assert supported_digits(t_interval([3.0, 3.0])) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_interval([1.0]), "at least 2 values, got 1"),
        (lambda: t_interval([1.0, math.nan]), "NaN or infinity in 1 of 2"),
        (lambda: t_difference([1.0, 2.0], [1.0]), "same seeds or prompts"),
        (lambda: bootstrap_mean([1.0]), "at least 2 prompts"),
        (lambda: bootstrap_mean(torch.zeros(2, 2, 2)), r"\(prompts, seeds\)"),
        (lambda: wilson_interval(5, 4), "5 of 4"),
        (lambda: wilson_interval(1, 4, level=95), "between 0 and 1, got 95"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
