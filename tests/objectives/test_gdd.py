"""GDD: its losses by hand, the penalty in closed form, where gradients go, and a run on a mixture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.discriminator import Discriminator
from stepdistill.models.nets import Nets
from stepdistill.models.taps import Tap
from stepdistill.models.vision import Vision
from stepdistill.objective import Batch, Step
from stepdistill.objectives import GDD, LADD
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import OneStep
from stepdistill.parts.times import LogitNormal, OnGrid
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.schedule import DiscreteVP, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, energy_distance, exact_student
from stepdistill.trainer import AdamW

from .conftest import distilled, drawn, pretrained

B = 16
ONE_STEP = Sampler(trailing(1), Ddim())


class Wave(nn.Module):
    """Logits w . x + sin(x_0), that keep what they were asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5, -0.5]))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.seen.append((x_t, t))
        return (x_t @ self.weight + x_t[:, 0].sin())[:, None]


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def logit(x: list[float]) -> float:
    return 1.5 * x[0] - 0.5 * x[1] + math.sin(x[0])


def game(schedule: Schedule) -> tuple[Nets, Batch]:
    teacher = GaussianTeacher(torch.tensor([0.4, -0.3]), torch.diag(torch.tensor([1.0, 0.2])), schedule)
    nets = Nets({"student": exact_student(teacher, ONE_STEP), "teacher": teacher, "disc": Wave()})
    return nets, Batch({}, (B, 2), x0=torch.linspace(-1, 1, 2 * B).view(B, 2))


@pytest.mark.parametrize("schedule", [DiscreteVP.linear(), RectifiedFlow()], ids=["vp", "flow"])
def test_both_losses_equal_a_loop_over_clean_samples(schedule: Schedule) -> None:
    nets, batch = game(schedule)
    objective, step = GDD(gan=Gan(weight=1.0, times=OnGrid((0.0,)))), Step.at(0, 1)
    by_student = objective.student_loss(nets, batch, step).total.item()
    by_disc = objective.disc_loss(nets, batch, step).total.item()
    fake, real = step.shared["student_x0"].tolist(), batch.x0.tolist()
    assert by_student == pytest.approx(sum(softplus(-logit(x)) for x in fake) / B, rel=1e-5)
    by_hand = sum(softplus(-logit(x)) for x in real) / B + sum(softplus(logit(x)) for x in fake) / B
    assert by_disc == pytest.approx(by_hand, rel=1e-5)
    assert all(bool((t == 0).all()) for _, t in nets.disc.seen)
    assert_close(nets.disc.seen[-1][0][:B], batch.x0, rtol=0, atol=0)


def test_the_default_penalty_is_half_of_gamma_times_the_squared_gradient_at_real_samples() -> None:
    """gamma / 2 |grad l|^2 with gamma 1e-4, by autograd; the finite difference is taken over many and small draws."""
    nets, _ = game(DiscreteVP.linear())
    n = 20_000
    batch = Batch({}, (n, 2), x0=torch.randn(n, 2, generator=torch.Generator().manual_seed(0)))
    default = GDD().gan
    assert (default.r1, default.weight, default.loss) == (0.5e-4, 1.0, "softplus")
    x = batch.x0.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nets.disc(x, torch.zeros(n), {}).sum(), x)
    by_hand = 0.5 * grad.square().sum(1).mean()
    step = Step.at(3)
    gan = Gan(weight=1.0, times=OnGrid((0.0,)), r1=0.5, r1_noise=1e-2)
    _, _, penalty = gan.verdicts(nets.disc, nets.teacher.schedule, batch.x0, torch.zeros_like(batch.x0), {}, step)
    assert_close(penalty.detach(), by_hand, rtol=0.03, atol=0)


def test_with_the_same_noise_levels_it_is_the_game_of_ladd() -> None:
    gan = Gan(weight=0.7, loss="hinge", times=LogitNormal(0.0, 1.0), r1=0.1)
    totals = []
    for objective in (GDD(rollout=OneStep(), gan=gan), LADD(rollout=OneStep(), gan=gan)):
        nets, batch = game(DiscreteVP.linear())
        step = Step.at(5)
        totals.append([loss(nets, batch, step).total for loss in (objective.student_loss, objective.disc_loss)])
    assert_close(totals[0], totals[1], rtol=0, atol=0)


def test_the_relativistic_game_compares_student_and_data() -> None:
    nets, batch = game(DiscreteVP.linear())
    objective, step = GDD(gan=Gan(weight=1.0, loss="relativistic", times=OnGrid((0.0,)))), Step.at(0, 1)
    totals = [loss(nets, batch, step).total.item() for loss in (objective.student_loss, objective.disc_loss)]
    pairs = list(zip(batch.x0.tolist(), step.shared["student_x0"].tolist(), strict=True))
    assert totals[0] == pytest.approx(sum(softplus(logit(r) - logit(f)) for r, f in pairs) / B, rel=1e-5)
    assert totals[1] == pytest.approx(sum(softplus(logit(f) - logit(r)) for r, f in pairs) / B, rel=1e-5)


def test_the_student_learns_through_frozen_features_and_the_discriminators_turn_reaches_heads_alone() -> None:
    torch.manual_seed(0)
    nets, _ = game(DiscreteVP.linear())
    vision = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh())
    student = nn.Conv2d(1, 1, 3, padding=1)
    nets["disc"] = Discriminator(Vision(vision), (Tap("1", 4),), width=8)
    nets["student"] = student
    batch = Batch({}, (4, 1, 8, 8), x0=torch.randn(4, 1, 8, 8))

    class Direct(OneStep):
        def __call__(self, student: nn.Module, batch: Batch, step: Step) -> Tensor:
            return student(step.randn(batch.shape))

    objective = GDD(rollout=Direct())
    objective.student_loss(nets, batch, Step.at(0)).total.backward()
    assert float(student.weight.grad.abs().sum()) > 0 and vision[0].weight.grad is None
    nets.zero_grad()
    objective.disc_loss(nets, batch, Step.at(1)).total.backward()
    assert student.weight.grad is None and vision[0].weight.grad is None
    assert all(p.grad is not None for p in nets.disc.parameters())


def test_a_student_of_several_steps_is_not_trained_at_its_first_alone() -> None:
    with pytest.raises(ValueError, match="OneStep trains the first of the sampler's 4 steps only"):
        GDD(rollout=OneStep()).check(Sampler(trailing(4)))
    GDD().check(Sampler(trailing(4)))


def test_turns_come_in_two_time_scales() -> None:
    student, disc = GDD(student_every=3).turns()
    assert (student.moves, student.every, disc.moves, disc.every) == (("student",), 3, ("disc",), 1)


def test_training_moves_the_student_onto_the_data(gaussian: GaussianTeacher) -> None:
    """From the pretrained network's one-step samples, by clean samples alone; over three seeds .007 to .023 of .47."""
    optim = {"student": AdamW(5e-4, (0.0, 0.99), decay="linear"), "disc": AdamW(2e-3, (0.0, 0.99), decay="linear")}
    start = pretrained(gaussian, 300)
    before = Student(ONE_STEP, start.net, start.schedule, start.kind)
    reference = gaussian.sample(4000, torch.Generator().manual_seed(3))
    far = energy_distance(drawn(before, 4000), reference)
    student = distilled(GDD(rollout=OneStep()), gaussian, start, ONE_STEP, optim, 350, batch=256)
    assert far > 0.4
    assert energy_distance(drawn(student, 4000), reference) < 0.05
