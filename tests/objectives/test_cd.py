"""CD against the exact consistency function and the exact fixed point of its discrete loss."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Predictor
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Step
from stepdistill.objectives import CD, TSCD
from stepdistill.parts.discretisation import Doubling
from stepdistill.sampling import Ddim, Move, Renoise, Sampler, StepRule, at, trailing
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, exact_student
from stepdistill.trainer import AdamW

from .conftest import distilled, pretrained


@dataclass(frozen=True)
class ExactOde(StepRule):
    """The teacher's ODE without error."""

    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        return predict.flow_map(x_t, move.t, move.s), predict(x_t, move.t, move.cond)


def batch_of(teacher: GaussianTeacher, n: int) -> Batch:
    return Batch({}, (n, 2), x0=teacher.sample(n, torch.Generator().manual_seed(2), dtype=torch.float64))


def test_the_exact_consistency_function_has_no_loss_under_the_exact_ode(gaussian: GaussianTeacher) -> None:
    student = exact_student(gaussian, Sampler(trailing(1), Renoise())).double()
    nets = Nets({"student": student, "target": student, "teacher": gaussian})
    loss = CD(solver=ExactOde(), intervals=Doubling(8, 8)).student_loss(nets, batch_of(gaussian, 256), Step.at(0))
    assert loss.total.item() < 1e-14


def test_a_swapped_time_or_a_wrong_step_would_cost(gaussian: GaussianTeacher) -> None:
    """The same student under a solver of finite steps is off by the solver's error, which shrinks with the grid."""
    student = exact_student(gaussian, Sampler(trailing(1), Renoise())).double()
    nets = Nets({"student": student, "target": student, "teacher": gaussian})
    losses = [
        CD(intervals=Doubling(n, n)).student_loss(nets, batch_of(gaussian, 4000), Step.at(0)).total.item()
        for n in (4, 16, 64)
    ]
    assert losses[0] > 3 * losses[1] > 9 * losses[2] > 0


class PerTime(nn.Module):
    """An affine map per grid time: the model class in which the fixed point is known."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n
        self.slope, self.offset = nn.Parameter(torch.ones(n + 1, 1)), nn.Parameter(torch.zeros(n + 1, 1))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        i = (t * self.n).round().long()
        return torch.where(i[:, None] == 0, x_t, self.slope[i] * x_t + self.offset[i])


def test_the_fixed_point_is_the_solvers_own_composition() -> None:
    """On one-dimensional Gaussian data the loss's only fixed point is the product of DDIM's contractions, not the
    exact map: trained from scratch, the learned slopes are those products within one per cent."""
    from stepdistill.schedule import RectifiedFlow
    from stepdistill.trainer import Run, Trainer

    n, mean, variance = 4, 0.7, 0.36
    teacher = GaussianTeacher(torch.tensor([mean]), torch.tensor([[variance]]), RectifiedFlow())
    torch.manual_seed(0)
    net = PerTime(n)
    nets = Nets()
    nets["teacher"] = teacher
    nets["student"] = Student(Sampler(trailing(1), Renoise()), net, teacher.schedule, "x0")
    spec = AdamW(0.03, (0.9, 0.99), decay="cosine", final=0.001)

    def data(step: Step) -> Batch:
        return Batch({}, (1024, 1), x0=teacher.sample(1024, step.rng))

    objective = CD(intervals=Doubling(n, n), target_decay=0.9)
    optim = {"student": spec.build(net.parameters())}
    trainer = Trainer(nets, objective, optim, data, Run(steps=900, clip=0), specs={"student": spec})
    for index in range(900):
        trainer.step(index)
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    factors = teacher.ddim_contraction(grid[1:], grid[:-1])[:, 0].cumprod(0)  # slope of the map from t_i to 0
    exact = torch.sqrt(torch.tensor(variance) / ((1 - grid[1:]) ** 2 * variance + grid[1:] ** 2))
    learned = net.slope.detach()[1:, 0].double()
    torch.testing.assert_close(learned[:-1], factors[:-1], rtol=0.01, atol=0.01)
    assert (learned[:-1] - exact[:-1]).abs().max() > 0.02  # so the test can tell the two apart
    alpha = 1 - grid[1:]
    torch.testing.assert_close(
        net.offset.detach()[1:, 0].double(), mean - factors * alpha * mean, rtol=0.01, atol=0.015
    )


def test_nothing_flows_back_through_the_target(gaussian: GaussianTeacher) -> None:
    student = exact_student(gaussian, Sampler(trailing(1), Renoise())).double()
    target = exact_student(gaussian, Sampler(trailing(1), Renoise())).double()
    nets = Nets({"student": student, "target": target, "teacher": gaussian})
    CD().student_loss(nets, batch_of(gaussian, 16), Step.at(0)).total.backward()
    assert student.net.scale.grad is not None
    assert target.net.scale.grad is None


def test_distillation_reaches_the_exact_ode_map(gaussian: GaussianTeacher) -> None:
    optim = {"student": AdamW(2e-3, decay="linear")}
    start = pretrained(gaussian)
    before = error_of(gaussian, Student(Sampler(trailing(1), Renoise()), start.net, start.schedule, start.kind))
    student = distilled(
        CD(intervals=Doubling(8, 16, 400), solver=Ddim()), gaussian, start,
        Sampler(trailing(1), Renoise()), optim, 800,
    )  # fmt: skip
    after = error_of(gaussian, student)
    assert after < 0.15 and after < before / 3


def error_of(teacher: GaussianTeacher, student: Student) -> float:
    """Root mean square distance of the one-step map to the exact ODE's."""
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = student(noise, at(1.0, noise), {})
    return (got - teacher.consistency(noise, at(1.0, noise))).square().mean().sqrt().item()


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_the_target_is_the_running_average_it_declares(decay: float) -> None:
    assert CD(target_decay=decay).averages() == {"target": decay}


@pytest.mark.parametrize("method", [CD, TSCD])
def test_a_decay_out_of_range_is_named(method: type[CD] | type[TSCD]) -> None:
    with pytest.raises(ValueError, match=r"objective\.target_decay must lie in \[0, 1\); got 1"):
        method(target_decay=1.0)
