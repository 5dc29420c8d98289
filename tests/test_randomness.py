"""However many processes share a batch, each sample meets the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepdistill.objective import Step
from stepdistill.parts.times import LogitNormal, LogNormal, OnGrid, Uniform, UShaped
from stepdistill.randomness import Part
from stepdistill.sampling import Renoise, Sampler, trailing
from stepdistill.schedule import DiscreteVP

VP = DiscreteVP.linear()
DRAWS: dict[str, Callable[[Step, int], Tensor]] = {
    "randn": lambda step, n: step.randn((n, 1, 8, 8)),
    "odd": lambda step, n: step.randn((n, 3)),
    "rand": lambda step, n: step.rand(n),
    "integers": lambda step, n: step.integers(1000, n),
    "stratified": lambda step, n: step.stratified(n),
    **{type(t).__name__: lambda step, n, t=t: t(VP, n, step) for t in (Uniform(0.1, 0.7), UShaped(), LogNormal())},
    "logit": lambda step, n: LogitNormal()(VP, n, step),
    "grid": lambda step, n: OnGrid((0.2, 0.5, 1.0))(VP, n, step),
    "sampler": lambda step, n: Sampler(trailing(4), Renoise()).run(_nothing, torch.zeros(n, 5), {}, step.rng),
}


def _nothing(x_t: Tensor, t: Tensor, cond: dict, *, want: str = "x0") -> Tensor:
    return torch.zeros_like(x_t)


_nothing.schedule = VP


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", DRAWS)
def test_parts_of_a_batch_side_by_side_are_the_whole(name: str, parts: int) -> None:
    """Twice, with a number for all in between: generators stay in step."""
    draw, whole = DRAWS[name], Step.at(3, 7)
    shares = [Step.at(3, 7, part=Part(i, parts, 8 // parts)) for i in range(parts)]
    for _ in range(2):
        assert torch.equal(torch.cat([draw(share, 8 // parts) for share in shares]), draw(whole, 8))
        assert {share.shared_integer(10**9) for share in shares} == {whole.shared_integer(10**9)}
        assert {float(share.shared_rand()) for share in shares} == {float(whole.shared_rand())}


def test_a_draw_that_is_not_one_row_a_sample_is_refused_where_it_would_be_cut_wrongly() -> None:
    assert len(Step.at(0).randn((8, 2))) == 8
    with pytest.raises(ValueError, match="a draw of 8 rows in a batch of 4"):
        Step.at(0, part=Part(1, 2, 4)).randn((8, 2))


def test_strata_are_those_of_the_whole_batch() -> None:
    """One draw in each of eight cells, though each process draws two."""
    found = torch.cat([Step.at(0, part=Part(i, 4, 2)).stratified(2) for i in range(4)])
    assert (found * 8).long().sort().values.tolist() == [*range(8)]


def test_rows_are_chosen_by_a_samples_number_in_the_run() -> None:
    """Every third of 24, whether in batches of 12, 6 or 2, on one process or two, as micro-batches or not."""
    chosen = []
    for batch, parts in ((12, 1), (6, 1), (2, 1), (6, 2), (2, 2)):
        n, found = batch // parts, []
        for number in range(24 // batch):
            for i in range(parts):
                step = Step.at(number, part=Part(i, parts, n))
                of_micro = Step.at(number // 2, part=Part(i, parts, n), number=number)
                mine = step.rows(n, lambda g: g % 3 == 1)
                assert torch.equal(mine, of_micro.rows(n, lambda g: g % 3 == 1))
                found += [number * batch + i * n + int(k) for k in mine]
        chosen.append(found)
    assert all(found == [*range(1, 24, 3)] for found in chosen)


def test_who_has_no_row_evaluates_the_first_where_others_may_have_some() -> None:
    none, some = torch.zeros(0, dtype=torch.long), torch.tensor([1, 2])
    assert Step.at(0).evaluated(none).tolist() == []
    assert Step.at(0, part=Part(0, 2, 4)).evaluated(none).tolist() == [0]
    assert all(Step.at(0, part=Part(0, of, 4)).evaluated(some).tolist() == [1, 2] for of in (1, 2))
