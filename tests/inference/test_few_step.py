"""The few-step loop against the library's own sampler, and as one static graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepdistill.inference import FewStep, plan_of
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Renoise, Sampler, StepRule, Tcd, sample_rngs, trailing
from stepdistill.schedule import EDM, DiscreteVP, Kind, RectifiedFlow, Schedule
from stepdistill.student import Student

CASES = [
    (DiscreteVP.scaled_linear(), "eps"),
    (DiscreteVP.linear(), "v"),
    (DiscreteVP.linear(), "x0"),
    (RectifiedFlow(), "velocity"),
    (EDM(), "x0"),
]
RULES = [Ddim(), Renoise(), Tcd(0.3), Tcd(0.0)]


class Net(nn.Module):
    """Something of x, time and a condition; counts its calls."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6, dtype=torch.float64)
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.inner(torch.tanh(x.double() + t.double()[:, None] + prompt)).to(x.dtype)


def student(schedule: Schedule, kind: Kind, rule: StepRule, steps: int) -> Student:
    return Student(Sampler(trailing(steps), rule), Net(), schedule, kind)


def draws(steps: int) -> tuple[Tensor, Tensor]:
    """Of two samples what each one's generator draws: the start, then a tensor a step."""
    rngs = sample_rngs(0, range(2))
    each = [[torch.randn(6, generator=rng) for _ in range(steps)] for rng in rngs]
    start, *fresh = (torch.stack(column) for column in zip(*each, strict=True))
    return start, torch.stack(fresh) if fresh else None


def looped(made: Student, steps: int, guidance: float | None = None, null: Tensor | None = None) -> Tensor:
    loop, (start, fresh) = FewStep(made, guidance), draws(steps)
    cond = loop.conditions({"prompt": prompts()}, None if null is None else {"prompt": null})
    with torch.no_grad():
        return loop.run(start, fresh if loop.plan.draws else None, cond, *loop.table(2, start.device))


def prompts() -> Tensor:
    return torch.linspace(-1, 1, 12).view(2, 6)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("schedule", "kind"), CASES, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_loop_makes_what_the_sampler_makes(schedule: Schedule, kind: Kind, rule: StepRule, steps: int) -> None:
    """The same numbers are drawn in the same order; coefficients are rounded once here and step by step there."""
    made = student(schedule, kind, rule, steps)
    rngs = sample_rngs(0, range(2))
    start = torch.stack([torch.randn(6, generator=rng) for rng in rngs])
    with torch.no_grad():
        want = made.sampler.run(made, start, {"prompt": prompts()}, rngs)
    got = looped(made, steps)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_coefficients_of_two_hand_worked_steps() -> None:
    """Flow, from t = 1 over 1/2 to 0. DDIM is Euler: x - v / 2 twice. Re-noising: x0 = x - t v, then s = 1/2."""
    sampler = Sampler((1.0, 0.5), Ddim())
    plan = plan_of(sampler, RectifiedFlow(), "velocity")
    assert plan.times == (1.0, 0.5) and plan.start == 1.0 and plan.draws == 0
    torch.testing.assert_close(torch.tensor(plan.rows), torch.tensor([[1, -0.5, 0], [1, -0.5, 0]]))
    plan = plan_of(Sampler((1.0, 0.5), Renoise()), RectifiedFlow(), "velocity")
    torch.testing.assert_close(torch.tensor(plan.rows), torch.tensor([[0.5, -0.5, 0.5], [1, -0.5, 0]]))
    assert plan.draws == 1


@pytest.mark.parametrize("rule", [Heun(), DpmPP2M()], ids=str)
def test_rules_that_no_student_is_exported_with_are_refused(rule: StepRule) -> None:
    with pytest.raises(ValueError, match=r"the few-step loop goes by Ddim\(\)"):
        plan_of(Sampler(trailing(2), rule), RectifiedFlow(), "velocity")


def test_without_guidance_no_negative_branch_runs() -> None:
    made = student(*CASES[1], Ddim(), 4)
    looped(made, 4)
    assert made.net.calls == [2, 2, 2, 2]


def test_guidance_leads_away_from_the_null_in_one_batch() -> None:
    """Against the formula with two evaluations a step, by the library's own sampler."""
    made, null = student(*CASES[3], Ddim(), 2), torch.full((1, 6), 0.3)
    got = looped(made, 2, 3.0, null)
    assert made.net.calls == [4, 4]

    def predict(x_t: Tensor, t: Tensor, cond: dict[str, Tensor], **options: object) -> Tensor:
        away = made(x_t, t, {"prompt": null.expand(2, -1)}, **options)
        return away + 3 * (made(x_t, t, cond, **options) - away)

    predict.schedule = made.schedule
    with torch.no_grad():
        want = made.sampler.run(predict, draws(1)[0], {"prompt": prompts()}, torch.Generator())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance 3\.0 needs a null condition"):
        looped(made, 2, 3.0)


@pytest.mark.parametrize("rule", [Ddim(), Tcd(0.3)], ids=str)
def test_the_whole_sampler_is_one_static_graph(rule: StepRule) -> None:
    """Traced without a break, and traced once: other values and prompts need no new graph."""
    made = student(*CASES[0], rule, 4)
    made.net.calls = None  # a list that grows would be a new graph each time
    type(made.net).forward, forward = lambda net, x, t, prompt: _quiet(net, x, t, prompt), type(made.net).forward
    try:
        loop, graphs = FewStep(made), []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
            graphs.append(graph)
            return graph.forward

        whole = torch.compile(loop.run, fullgraph=True, dynamic=False, backend=backend)
        times, rows = loop.table(2, torch.device("cpu"))
        for scale in (1.0, -2.0):
            start, fresh = draws(4)
            given = scale * start, fresh if loop.plan.draws else None, {"prompt": scale * prompts()}, times, rows
            with torch.no_grad():
                torch.testing.assert_close(whole(*given), loop.run(*given), rtol=0, atol=0)
        assert len(graphs) == 1
    finally:
        type(made.net).forward = forward


def _quiet(net: Net, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    return net.inner(torch.tanh(x.double() + t.double()[:, None] + prompt)).to(x.dtype)
