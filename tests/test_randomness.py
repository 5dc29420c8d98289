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
