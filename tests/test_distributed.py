"""Several processes on a batch are one: the same losses, the same weights, and nobody waits for ever."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stepdistill import distributed
from stepdistill.build import build
from stepdistill.data import DigitsData
from stepdistill.functional.distances import L2
from stepdistill.objective import Objective
from stepdistill.objectives import DMD2, PCM, DiffusionGAN, FDistill, MeanFlow, TwinFlow
from stepdistill.parts.gan import Gan
from stepdistill.placement import Placement
from stepdistill.recipe import Heads, Recipe, Teacher, Weights
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.trainer import AdamW, Run
from tests.processes import together

STEPS = 3
LORA = Weights("lora", rank=4, targets=("conv1", "conv2", "time_emb_proj"))


def recipe(objective: Objective, sampler: Sampler | None = None, batch: int = 8, **fields: object) -> Recipe:
    """Three steps on digits in batches of eight, or of another size."""
    movers = {name for turn in objective.turns() for name in turn.moves}
    return Recipe(
        teacher=fields.pop("teacher", Teacher("bundled:digits")),
        objective=objective,
        data=DigitsData(),
        optim=dict.fromkeys(movers, AdamW(1e-4, eps=1e-6)),  # at 1e-8 rounding decides where small gradients go
        sampler=sampler or Sampler(trailing(1)),
        run=Run(steps=STEPS, batch=batch),
        **fields,
    )


RECIPES = {
    # the discriminator reads the critic, and both move in one turn; the student does in every other step only
    "dmd2": recipe(DMD2(student_every=2), heads=Heads("critic")),
    "shared backbone": recipe(DMD2(student_every=2, gan=Gan(weight=0.0)), student=LORA, critic=LORA),
    "target": recipe(PCM(gan=Gan(weight=0.1), target_decay=0.9), Sampler(trailing(4), Ddim())),
    "two times, by forward derivatives": recipe(MeanFlow(velocity="teacher", unequal=1.0), Sampler(trailing(2))),
    "other tasks for some": recipe(MeanFlow(velocity="teacher", unequal=0.25), Sampler(trailing(2))),
    # of a student that starts as its teacher residuals are rounding, which a small c would make a direction of
    "four tasks": recipe(TwinFlow(velocity="teacher", guidance=0.0, delta=0.1, c=0.3), Sampler(trailing(2))),
    # one sample each: whoever has none of a kind evaluates the network for it all the same
    "other tasks, a sample each": recipe(
        MeanFlow(velocity="teacher", unequal=0.5, distance=L2()), Sampler(trailing(2)), batch=2
    ),
    "four tasks, a sample each": recipe(
        TwinFlow(velocity="teacher", guidance=0.0, delta=0.1, c=0.3), Sampler(trailing(2)), batch=2
    ),
    "running means": recipe(FDistill(base=DMD2(student_every=2, gan=Gan(weight=0.1, times=DMD2().times)))),
    "chain": recipe(DiffusionGAN(every=1)),
}
SHARDED = (
    "dmd2", "shared backbone", "two times, by forward derivatives", "other tasks, a sample each",
    "four tasks, a sample each",
)  # fmt: skip


def train(names: Sequence[str], placement: Placement, accumulate: int = 1) -> dict[str, tuple[list, dict]]:
    """Means of what is logged in each step, and the last weights, whole."""
    torch.set_num_threads(1)
    found = {}
    for name in names:
        r = RECIPES[name]
        run = replace(r.run, batch=r.run.batch // accumulate, accumulate=accumulate)
        trainer = build(replace(r, run=run, placement=placement)).trainer
        logs = []
        for index in range(1, STEPS + 1):  # at 0 critic and teacher are one, and their gap is rounding
            logs.append({term: float(distributed.mean(value)) for term, value in trainer.step(index).items()})
        state = trainer.nets.trainable_state().items()
        whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state}
        found[name] = logs, {k: v.detach().clone() for k, v in whole.items()}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list, dict]]:
    """What one process comes to."""
    return train(tuple(RECIPES), Placement())


def assert_same(many: dict[str, tuple[list, dict]], one: dict[str, tuple[list, dict]], tolerance: float = 1e-5) -> None:
    """Losses within the tolerance, and weights in the norm of each network."""
    for name, (logs, state) in many.items():
        expected, weights = one[name]
        for index, (mine, theirs) in enumerate(zip(logs, expected, strict=True)):
            assert mine.keys() == theirs.keys()
            for term in mine:
                assert mine[term] == pytest.approx(theirs[term], rel=tolerance, abs=1e-7), (name, index, term)
        assert state.keys() == weights.keys()
        for role in {key.partition(".")[0] for key in weights}:
            a, b = (_vector(found, role) for found in (state, weights))
            assert float((a - b).norm()) <= tolerance * float(b.norm()), (name, role)


def _vector(state: dict[str, Tensor], role: str) -> Tensor:
    return torch.cat([v.double().flatten() for k, v in state.items() if k.startswith(f"{role}.")])


def test_two_processes_equal_one_with_the_same_batch(alone: dict) -> None:
    first, second = together(2, train, tuple(RECIPES), Placement())
    assert_same(first, alone)
    for name, (_, state) in first.items():  # and each other, bit for bit
        assert all(torch.equal(value, second[name][1][key]) for key, value in state.items()), name


def test_four_processes_that_accumulate_equal_one_that_does() -> None:
    """Micro-batches of four: their gradients add up before they are averaged."""
    one = train(("chain",), Placement(), 2)
    assert_same(together(4, train, ("chain",), Placement(), 2)[3], one)


def test_networks_in_shards_equal_whole_ones(alone: dict) -> None:
    """FSDP2: gradients through a frozen teacher's features, adapters on one network, forward derivatives."""
    assert_same(together(2, train, SHARDED, Placement(shard=True))[0], {name: alone[name] for name in SHARDED})


# The few things that processes do together


def _errands() -> dict[str, object]:
    rank = distributed.rank()
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    b.grad = torch.ones(2) if rank else None  # one process alone used it
    distributed.average_gradients([a, b, c])
    found: dict[str, object] = {"grads": [None if p.grad is None else p.grad.tolist() for p in (a, b, c)]}
    found["total"] = distributed.total(torch.tensor(rank + 1.0)).item()
    found["gathered"] = distributed.gathered([rank + 0.5, 2.0])
    found["any"] = [distributed.any_of(rank == 1), distributed.any_of(False)]
    found["said"] = distributed.on_main(lambda: f"by {rank}")
    try:
        distributed.on_main(lambda: 1 // rank)
    except ZeroDivisionError as error:
        found["raised"] = str(error)
    order = torch.tensor(0.0)
    with distributed.main_first():
        order += 1
    found["share"] = distributed.share(8)
    try:
        distributed.share(7)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def test_what_processes_say_to_each_other() -> None:
    for found in together(2, _errands):
        assert found["grads"] == [[1.5, 3.0], [0.5, 0.5], None]
        assert found["total"] == 3 and found["gathered"] == [[0.5, 2.0], [1.5, 2.0]]
        assert found["any"] == [True, False] and found["said"] == "by 0"
        assert "division" in found["raised"]
        assert found["share"] == 4 and found["refused"] == "run.batch 7 is shared by 2 processes: use a multiple of 2"


@pytest.mark.parametrize("limit", [0.5, math.inf])
def test_gradients_are_unscaled_before_they_are_clipped(limit: float) -> None:
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    p.grad, q.grad = torch.tensor([24.0]), torch.tensor([32.0])
    assert float(distributed.clip_gradients([p, q], limit, scale=8.0)) == pytest.approx(5.0)
    factor = min(1.0, limit / 5)
    assert [float(p.grad), float(q.grad)] == pytest.approx([3 * factor, 4 * factor], rel=1e-5)
