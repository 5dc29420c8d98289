"""Overhead: which evaluations an update consists of, and what autograd holds for it, on hand-made networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.nets import Nets
from stepdistill.models.taps import Tap
from stepdistill.objective import Batch, Loss, Objective, Step, Turn
from stepdistill.objectives import CD, DMD2, KD
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim
from stepdistill.parts.tangents import Jvp
from stepdistill.profiling import cost, evaluations, measure, saved_bytes
from stepdistill.sampling import Sampler, trailing
from stepdistill.schedule import DiscreteVP
from stepdistill.student import Student
from stepdistill.trainer import AdamW, Run, Trainer

N = 1000  # floats, 4 bytes each


class Net(nn.Module):
    """Any module will do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        known = (t + labels)[:, None, None, None].expand_as(x_t)
        return self.last(F.silu(self.first(torch.cat([x_t, known], 1))))


def trainer_of(
    objective: Objective, guidance: float = 1.0, backbone: str = "teacher", sampler: Sampler | None = None
) -> Trainer:
    """A trainer over copies of one hand-made network."""
    teacher = Denoiser(Net(), DiscreteVP.linear(), "v")
    nets = Nets()
    nets["teacher"] = Guided(teacher, guidance, {"labels": torch.tensor([0.0])})
    net = copy.deepcopy(teacher.net).requires_grad_(True)
    nets["student"] = Student(sampler or Sampler(trailing(1)), net, teacher.schedule, teacher.kind)
    movers = {name for turn in objective.turns() for name in turn.moves}
    if "critic" in movers:
        nets["critic"] = Denoiser(Net(), teacher.schedule, teacher.kind)
    if "disc" in movers:
        nets["disc"] = Discriminator(nets.critic if backbone == "critic" else teacher, [Tap("first", 8)], 8)
    optimizers = {name: AdamW().build(nets[name].parameters()) for name in movers}
    return Trainer(nets, objective, optimizers, batches, Run(batch=4))


def batches(step: Step) -> Batch:
    """Four samples."""
    x0 = step.randn((4, 1, 8, 8))
    return Batch({"labels": step.rand(4).float()}, x0.shape, x0=x0, path=torch.stack([step.randn(x0.shape), x0], 1))


NO_GAN = Gan(weight=0.0)
UPDATES = {
    "kd": (KD(), 0, ["student forward + backward (batch 4)"]),
    "cd": (
        CD(),
        0,
        ["teacher forward (batch 4)", "target forward (batch 4)", "student forward + backward (batch 4)"],
    ),
    "dmd2, no gan, both turns": (
        DMD2(gan=NO_GAN, student_every=2),
        0,
        [
            "student forward + backward (batch 4)",
            "teacher forward (batch 4)",
            "critic forward (batch 4)",
            "critic forward + backward (batch 4)",
        ],
    ),
    "dmd2, the critic's turn": (
        DMD2(gan=NO_GAN, student_every=2),
        1,
        ["student forward (batch 4)", "critic forward + backward (batch 4)"],
    ),
    "dmd2 with its gan": (
        DMD2(student_every=1),
        0,
        [
            "student forward + backward (batch 4)",
            "teacher forward (batch 4)",
            "critic forward (batch 4)",
            "disc forward + backward (batch 4)",
            "critic forward + backward (batch 4)",
            "disc forward + backward (batch 8)",
        ],
    ),
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("backbone", ["teacher", "critic"])
def test_the_evaluations_of_an_update_are_listed_in_order(name: str, backbone: str) -> None:
    """A discriminator counts once, with what it runs of its backbone, whoever that is."""
    objective, index, expected = UPDATES[name]
    assert [str(call) for call in evaluations(trainer_of(objective, backbone=backbone), index)] == expected


@pytest.mark.parametrize("backbone, adversarial", [("teacher", (2, 2)), ("critic", (2, 6))])
def test_what_an_update_costs_counted_by_hand(backbone: str, adversarial: tuple[int, int]) -> None:
    """One forward is 1, with its backward pass 3; an update of heads alone costs the backbone's forward."""
    assert cost(trainer_of(KD()), [0]) == 3
    assert cost(trainer_of(CD()), [0]) == 1 + 1 + 3
    assert cost(trainer_of(DMD2(gan=NO_GAN, student_every=2)), [0, 1]) == ((3 + 1 + 1 + 3) + (1 + 3)) / 2
    # the student's adversarial gradient is the input's; the discriminator sees twice as many samples
    assert cost(trainer_of(DMD2(student_every=1), backbone=backbone), [0]) == 3 + 1 + 1 + 3 + sum(adversarial)


def test_a_tangent_is_seen_and_counted() -> None:
    trainer = trainer_of(KD())
    net = trainer.nets.student

    def loss(nets: Nets, batch: Batch, step: Step) -> Loss:
        x, t = batch.x0, torch.full((4,), 0.5)
        Jvp()(lambda x, t: net(x, t, batch.cond), (x, t), (x, torch.ones_like(t)))
        return Loss(net(x, t, batch.cond).square().mean())

    trainer.turns = (Turn(loss, moves=("student",)),)
    calls = evaluations(trainer, 0)
    assert [str(call) for call in calls] == [
        "student forward + tangent (batch 4)",
        "student forward + backward (batch 4)",
    ]
    assert [call.cost for call in calls] == [8, 12]
    calls[0].run()


def test_guidance_shows_as_a_batch_of_twice_the_size() -> None:
    calls = evaluations(trainer_of(CD(), guidance=2.0), 0)
    assert str(calls[0]) == "teacher forward (batch 8)"


def test_steps_of_a_rollout_that_are_taken_without_a_graph_show_no_backward_pass() -> None:
    objective = DMD2(BackwardSim(last_only=True), gan=NO_GAN)
    calls = evaluations(trainer_of(objective, sampler=Sampler(trailing(2))), 0)
    assert [str(call) for call in calls[:2]] == ["student forward (batch 4)", "student forward + backward (batch 4)"]


def test_looking_at_a_step_takes_it_and_leaves_no_hooks() -> None:
    looked, plain = trainer_of(KD()), trainer_of(KD())
    plain.nets.load_state_dict(looked.nets.state_dict())
    evaluations(looked, 0)
    plain.step(0)
    for p, q in zip(looked.nets.parameters(), plain.nets.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in looked.nets.modules())


def test_a_replayed_evaluation_leaves_no_gradients() -> None:
    trainer = trainer_of(DMD2(student_every=1))
    for call in evaluations(trainer, 0):
        call.run()
    assert all(p.grad is None for p in trainer.nets.parameters())


@pytest.mark.parametrize("name", ["kd", "cd", "dmd2, no gan, both turns", "dmd2, the critic's turn"])
def test_an_update_is_measured_against_its_bare_evaluations(name: str) -> None:
    objective, index, expected = UPDATES[name]
    cost = measure(trainer_of(objective), index, repeats=3)
    assert cost.evaluations == tuple(expected)
    assert cost.seconds > 0 and cost.bare_seconds > 0
    assert math.isfinite(cost.ratio) and cost.ratio > 0
    assert cost.bytes >= cost.minimum_bytes > 4 * 8 * 64 * 4  # the largest feature map
    assert cost.bytes_ratio == cost.bytes / cost.minimum_bytes


# Bytes held for backward


def leaf(n: int = N) -> Tensor:
    """A float32 tensor of ``n`` elements that wants a gradient."""
    return torch.randn(n, requires_grad=True)


def test_a_square_holds_its_input_once_until_its_backward_pass() -> None:
    x = leaf()
    with saved_bytes() as held:
        y = (x * x).sum()
        assert held.now == held.peak == 4 * N
        y.backward()
        del y
    assert held.now == 0 and held.peak == 4 * N


def test_a_product_holds_both_factors_and_an_exponential_its_result() -> None:
    x, z = leaf(), leaf()
    with saved_bytes() as held:
        product = x * z
        assert held.now == 8 * N
        exponential = product.exp()
        assert held.now == 12 * N
        del product, exponential
    assert held.now == 0 and held.peak == 12 * N


def test_what_is_saved_twice_or_in_views_counts_once() -> None:
    x = leaf()
    with saved_bytes() as held:
        y = x * x, x.view(10, 100) * x.view(10, 100), x.exp()
        assert held.now == 4 * N + 4 * N  # x itself, and the exponential
        del y


def test_graphs_that_never_coexist_do_not_add_up() -> None:
    x = leaf()
    with saved_bytes() as held:
        for _ in range(3):
            (x * x).sum().backward()
    assert held.peak == 4 * N


def test_parameters_do_not_count_not_even_as_the_views_that_layers_take_of_them() -> None:
    """A linear layer saves its weight transposed, which is another tensor over the same memory."""
    layer, x = nn.Linear(50, 30), torch.randn(20, 50, requires_grad=True)
    with saved_bytes() as held:
        y = layer(x)
        assert held.now == 4 * 20 * 50  # the input
        del y


def test_nothing_is_held_without_a_graph() -> None:
    with saved_bytes() as held, torch.no_grad():
        leaf() * leaf()
    assert held.peak == 0
