"""One loop over turns: who moves, by what, on which randomness, and what is held in memory meanwhile."""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill.logging import MetricsFile
from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.nets import Nets, only_trains, update_average
from stepdistill.models.taps import Tap
from stepdistill.objective import Batch, Loss, Objective, Step, Turn
from stepdistill.objectives import CD, DMD2, KD, LADD, TSCD
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import OneStep
from stepdistill.profiling import saved_bytes
from stepdistill.sampling import Sampler, trailing
from stepdistill.schedule import DiscreteVP
from stepdistill.student import Student
from stepdistill.trainer import AdamW, LossScale, Run, Trainer, due

NULL = 3
SHAPE = (1, 8, 8)
NO_GAN = Gan(weight=0.0)
ONE_STEP = Sampler(trailing(1))
OBJECTIVES = {
    "kd": KD(),
    "cd": CD(),
    "tscd": TSCD(),
    "ladd": LADD(),
    "dmd2": DMD2(student_every=1),
    "dmd2, no gan": DMD2(student_every=1, gan=NO_GAN),
}


class Net(nn.Module):
    """Two convolutions between embeddings: features to tap, labels to guide by."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.label = nn.Embedding(NULL + 1, width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        h = self.first(x_t) + (self.time(t[:, None]) + self.label(labels))[:, :, None, None]
        return self.last(F.silu(self.body(F.silu(h))))


def players(objective: Objective, guidance: float = 1.0, sampler: Sampler = ONE_STEP, seed: int = 0) -> Nets:
    """Everyone the objective needs; the student starts as the teacher."""
    torch.manual_seed(seed)
    teacher = Denoiser(Net(), DiscreteVP.linear(), "v")
    nets = Nets()
    nets["teacher"] = Guided(teacher, guidance, {"labels": torch.tensor([NULL])})
    net = copy.deepcopy(teacher.net).requires_grad_(True)
    nets["student"] = Student(sampler, net, teacher.schedule, teacher.kind)
    movers = {name for turn in objective.turns() for name in turn.moves}
    if "critic" in movers:
        nets["critic"] = Denoiser(Net(), teacher.schedule, teacher.kind)  # as the teacher it would pull nowhere
    if "disc" in movers:
        nets["disc"] = Discriminator(teacher, [Tap("body", 16)], 8)
    return nets


def batches(step: Step, size: int = 4) -> Batch:
    """Real samples, labels and one-step paths, all from the step's randomness."""
    x0, noise = step.randn((size, *SHAPE)).tanh(), step.randn((size, *SHAPE))
    return Batch({"labels": step.integers(NULL, size)}, x0.shape, x0=x0, path=torch.stack([noise, x0], 1))


def trainer_of(
    objective: Objective,
    run: Run | None = None,
    *,
    nets: Nets | None = None,
    data: Callable[[Step], Batch] = batches,
    spec: AdamW | None = None,
) -> Trainer:
    """A trainer of fresh players."""
    nets, spec = nets or players(objective), spec or AdamW(1e-3)
    movers = {name for turn in objective.turns() for name in turn.moves}
    optimizers = {name: spec.build(nets[name].parameters()) for name in movers}
    return Trainer(nets, objective, optimizers, data, run or Run(), specs=dict.fromkeys(movers, spec))


def weights(net: nn.Module) -> Tensor:
    """All parameters and buffers in one vector, copied."""
    return torch.cat([v.detach().flatten() for v in net.state_dict().values()]).clone()


def hashes(nets: Nets) -> dict[str, str]:
    """SHA-256 of every network's state."""
    return {name: hashlib.sha256(weights(net).numpy().tobytes()).hexdigest() for name, net in nets.items()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Who moved."""
    return {name for name in before if before[name] != after[name]}


@contextmanager
def recorded(net: nn.Module) -> Iterator[list[Tensor]]:
    """Outputs of a network within the block."""
    outputs: list[Tensor] = []
    handle = net.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


# Who moves


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_turn_moves_its_own_networks_and_no_other(name: str) -> None:
    trainer = trainer_of(OBJECTIVES[name])
    turns = trainer.turns
    for turn in turns:
        trainer.turns = (turn,)
        before = hashes(trainer.nets)
        trainer.step(0)
        expected = set(turn.moves) | (set(trainer.averages) if "student" in turn.moves else set())
        assert changed(before, hashes(trainer.nets)) == expected


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_teacher_never_moves_and_averages_get_no_gradients(name: str) -> None:
    trainer = trainer_of(OBJECTIVES[name])
    teacher = hashes(trainer.nets)["teacher"]
    for index in range(3):
        trainer.step(index)
    assert hashes(trainer.nets)["teacher"] == teacher
    fixed = [trainer.nets.teacher, *(trainer.nets[average] for average in trainer.averages)]
    assert all(p.grad is None and not p.requires_grad for net in fixed for p in net.parameters())


def test_a_gradient_does_not_outlive_its_turn() -> None:
    trainer = trainer_of(DMD2(student_every=1))
    trainer.step(0)
    assert all(p.grad is None for p in trainer.nets.parameters())


def test_only_those_who_move_require_gradients() -> None:
    nets = players(DMD2())
    with only_trains(nets, ("critic", "disc")) as params:
        expected = [*nets.critic.parameters(), *nets.disc.parameters()]
        assert {id(p) for p in params} == {id(p) for p in expected}
        assert {id(p) for p in nets.parameters() if p.requires_grad} == {id(p) for p in expected}


def test_averages_are_the_weighted_sum_of_all_weights_so_far() -> None:
    """After n updates: decay^n w_0 + (1 - decay) sum_k decay^(n - k) w_k, for the EMA and the target alike."""
    trainer = trainer_of(CD(target_decay=0.6), Run(ema=0.9))
    history = [weights(trainer.nets.student).double()]
    for index in range(6):
        trainer.step(index)
        history.append(weights(trainer.nets.student).double())
    n = len(history) - 1
    for name, decay in (("ema", 0.9), ("target", 0.6)):
        expected = decay**n * history[0]
        for k in range(1, n + 1):
            expected += (1 - decay) * decay ** (n - k) * history[k]
        torch.testing.assert_close(weights(trainer.nets[name]).double(), expected, rtol=0, atol=1e-6)
        assert not torch.equal(weights(trainer.nets[name]), weights(trainer.nets.student))


def test_an_average_copies_buffers_whole() -> None:
    average, source = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    source.running_mean.fill_(3.0)
    source.num_batches_tracked.fill_(7)
    update_average(average, source, 0.5)
    assert average.running_mean.tolist() == [3.0, 3.0] and int(average.num_batches_tracked) == 7


def test_a_turn_is_taken_at_the_multiples_of_its_every() -> None:
    trainer = trainer_of(DMD2(student_every=3))
    moved = []
    for index in range(7):
        before = hashes(trainer.nets)
        logs = trainer.step(index)
        who = changed(before, hashes(trainer.nets))
        assert {"critic", "disc"} <= who
        assert ("student" in who) == ("ema" in who) == ("student/loss" in logs)
        moved.append("student" in who)
    assert moved == [True, False, False, True, False, False, True]


@dataclass(frozen=True)
class Passing(Objective):
    """The student moves for a while only, the critic from some index on."""

    needs = frozenset({"student", "critic"})

    def turns(self) -> tuple[Turn, ...]:
        """Two."""
        return (
            Turn(self.student_loss, moves=("student",), every=2, start=1, stop=6),
            Turn(self.critic_loss, moves=("critic",), start=3),
        )

    def student_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """The sum of all weights."""
        return Loss(sum(p.sum() for p in nets.student.parameters()))

    def critic_loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """The sum of all weights."""
        return Loss(sum(p.sum() for p in nets.critic.parameters()))


def test_a_turn_is_taken_from_its_start_and_before_its_stop() -> None:
    """Divisibility counts from 0, not from the start, so that a later turn keeps step with the others."""
    trainer = trainer_of(Passing())
    moved: list[set[str]] = []
    for index in range(8):
        before = hashes(trainer.nets)
        logs = trainer.step(index)
        moved.append(changed(before, hashes(trainer.nets)))
        assert {name.split("/")[0] for name in logs} == moved[-1] - {"ema"}
    student = {"student", "ema"}
    assert moved == [set(), set(), student, {"critic"}, student | {"critic"}, {"critic"}, {"critic"}, {"critic"}]


@pytest.mark.parametrize(("every", "start", "stop"), [(1, 0, None), (3, 0, None), (3, 4, None), (2, 3, 9), (5, 1, 4)])
def test_turns_that_will_be_taken_are_counted_without_walking(every: int, start: int, stop: int | None) -> None:
    turn = Turn(moves=("student",), every=every, start=start, stop=stop)
    for steps in range(20):
        assert turn.taken(steps) == sum(turn.due(index) for index in range(steps))


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (3, 3), (5, 2)])
def test_a_turn_that_would_never_be_taken_is_refused(start: int, stop: int | None) -> None:
    with pytest.raises(ValueError, match=f"0 <= start < stop; got start {start} and stop {stop}"):
        Turn(Passing().student_loss, moves=("student",), start=start, stop=stop)


# By what


def test_accumulating_four_times_two_samples_equals_one_batch_of_eight() -> None:
    def whole(index: int) -> Batch:
        return batches(Step.at(index, 99), 8)

    def parts(step: Step) -> Batch:
        index, part = divmod(step.index, 4)
        rows, batch = slice(2 * part, 2 * part + 2), whole(index)
        return Batch({"labels": batch.cond["labels"][rows]}, (2, *SHAPE), x0=batch.x0[rows], path=batch.path[rows])

    one = trainer_of(KD(), Run(batch=8), data=lambda step: whole(step.index))
    four = trainer_of(KD(), Run(batch=2, accumulate=4), data=parts)
    start = weights(one.nets.student)
    for index in range(3):
        logs = [trainer.step(index) for trainer in (one, four)]
        torch.testing.assert_close(logs[0], logs[1], rtol=1e-5, atol=0)
    moved = (weights(one.nets.student) - start).abs().mean()
    torch.testing.assert_close(weights(one.nets.student), weights(four.nets.student), rtol=0, atol=1e-3 * float(moved))


def test_no_two_micro_batches_share_an_index() -> None:
    """A source that picks rows by index gave every micro-batch of a step the same rows when it saw the step's own."""
    seen = []
    trainer = trainer_of(KD(), Run(accumulate=3), data=lambda step: (seen.append(step.index), batches(step))[1])
    for index in range(4):
        trainer.step(index)
    assert seen == list(range(12))


def test_all_turns_of_a_step_see_the_same_batch() -> None:
    trainer = trainer_of(DMD2(student_every=1))
    seen: list[tuple[str, int]] = []
    for turn in trainer.turns:
        turn.losses = tuple(_noting(loss, turn.name, seen) for loss in turn.losses)
    trainer.step(0)
    assert {name for name, _ in seen} == {"student", "critic+disc"}
    assert len({batch for _, batch in seen}) == 1


def _noting(loss: Callable, name: str, seen: list[tuple[str, int]]) -> Callable:
    def noted(nets: Nets, batch: Batch, step: Step) -> Loss:
        seen.append((name, id(batch)))
        return loss(nets, batch, step)

    return noted


@pytest.mark.parametrize(("clip", "expected"), [(1e-3, 1e-3), (0.0, None)])
def test_clipping_limits_the_step_and_not_the_logged_norm(clip: float, expected: float | None) -> None:
    """Plain gradient descent with rate 1 moves by the gradient itself."""
    nets = players(KD())
    optimizers = {"student": torch.optim.SGD(nets.student.parameters(), lr=1.0)}
    trainer = Trainer(nets, KD(), optimizers, batches, Run(clip=clip))
    before = weights(nets.student)
    norm = float(trainer.step(0)["student/grad_norm"])
    assert norm > 0.01
    torch.testing.assert_close(float((weights(nets.student) - before).norm()), expected or norm, rtol=1e-3, atol=0)


def test_learning_rates_follow_hand_worked_numbers() -> None:
    constant = AdamW(lr=2.0, warmup=4)
    assert [constant.rate(i, 14) for i in (0, 1, 2, 3, 4, 9, 13)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    linear = replace(constant, decay="linear", final=0.1)  # 10 steps from 2 towards 0.2
    assert [linear.rate(i, 14) for i in (3, 4, 9, 14)] == pytest.approx([2.0, 2.0, 1.1, 0.2], rel=1e-12)
    cosine = replace(linear, decay="cosine")
    third = 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 0.3))
    assert [cosine.rate(i, 14) for i in (4, 7, 9, 14)] == pytest.approx([2.0, third, 1.1, 0.2], rel=1e-12)
    assert AdamW(lr=1.0, warmup=9, decay="cosine").rate(5, 3) == pytest.approx(6 / 9)  # a run shorter than its warm-up


def test_the_optimizer_uses_the_rate_of_its_own_rule_at_that_step() -> None:
    specs = {"student": AdamW(1e-3, warmup=2), "critic": AdamW(5e-3, decay="linear", final=0.0)}
    objective = DMD2(student_every=1, gan=NO_GAN)
    nets = players(objective)
    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in specs.items()}
    trainer = Trainer(nets, objective, optimizers, batches, Run(steps=4), specs=specs)
    used = []
    for index in range(4):
        trainer.step(index)
        used.append([1e4 * optimizers[name].param_groups[0]["lr"] for name in ("student", "critic")])
    torch.testing.assert_close(used, [[5.0, 50.0], [10.0, 37.5], [10.0, 25.0], [10.0, 12.5]])


@pytest.mark.parametrize("field", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"warmup": -1}, {"final": 1.5}, {"eps": 0.0}])
def test_an_optimizer_setting_out_of_range_is_named(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"AdamW.{next(iter(field))} must"):
        AdamW(**field)


@pytest.mark.parametrize(
    "field",
    [
        {"steps": 0},
        {"batch": 0},
        {"accumulate": 0},
        {"keep_last": 0},
        {"log_every": 0},
        {"ema": 1.0},
        {"clip": -1.0},
        {"clip": math.nan},
        {"save_every": -1},
        {"preview_every": -1},
        {"health_every": -1},
        {"threads": -1},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_a_run_setting_out_of_range_is_named(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"run.{next(iter(field))} must"):
        Run(**field)


# On which randomness


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_does_not() -> None:
    def trained(seed: int) -> Tensor:
        trainer = trainer_of(DMD2(student_every=2), Run(seed=seed))
        for index in range(4):
            trainer.step(index)
        return torch.cat([weights(trainer.nets[name]) for name in ("student", "critic", "disc", "ema")])

    first = trained(0)
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))


def test_the_seed_reaches_the_data_and_the_turns() -> None:
    """One-step regression draws nothing but its batch; with batches held fast only the turns' own draws are left."""

    def trained(seed: int, objective: Objective, data: Callable[[Step], Batch]) -> Tensor:
        trainer = trainer_of(objective, Run(seed=seed), data=data)
        trainer.step(0)
        return weights(trainer.nets.student)

    for case in ((KD(), batches), (CD(), lambda step: batches(Step.at(step.index)))):
        assert torch.equal(trained(0, *case), trained(0, *case))
        assert not torch.equal(trained(0, *case), trained(1, *case))


def test_a_step_depends_on_its_index_and_not_on_the_steps_before() -> None:
    """The randomness of step 5 is the same whether or not others were taken: nothing but weights need be restored."""
    one, other = trainer_of(KD()), trainer_of(KD())
    other.data = lambda step: batches(Step.at(step.index, 7))
    other.step(0)
    other.data = batches
    other.nets.load_state_dict(one.nets.state_dict())
    assert torch.equal(one.step(5)["student/loss"], other.step(5)["student/loss"])


# What is evaluated, and what is held


def test_the_student_runs_once_per_step_and_the_critic_gets_that_very_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """At even indices the critic is fitted to the sample of the student's turn, made before the student moved."""
    from stepdistill.parts import game

    fitted: list[Tensor] = []
    monkeypatch.setattr(game, "denoising_loss", _noting_samples(game.denoising_loss, fitted))
    trainer = trainer_of(DMD2(student_every=2))
    for index in range(4):
        before = copy.deepcopy(trainer.nets.student)
        with recorded(trainer.nets.student.net) as forwards, recorded(trainer.nets.student) as samples:
            trainer.step(index)
        assert len(forwards) == 1
        assert torch.equal(fitted[-1], samples[0].detach())
        turn = 1 if index % 2 else 0  # whose randomness made the sample
        redone = OneStep()(before, batches(Step.at(index, 0, -1, 0)), _after_stop(Step.at(index, 0, turn, 0)))
        assert torch.equal(fitted[-1], redone)


def _noting_samples(loss: Callable, samples: list[Tensor]) -> Callable:
    def noted(net: Denoiser, x0: Tensor, *rest: object) -> Tensor:
        samples.append(x0)
        return loss(net, x0, *rest)

    return noted


def _after_stop(step: Step) -> Step:
    step.integers(1, 1)  # backward simulation draws where to stop first
    return step


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 4), (2.0, 8)])
@pytest.mark.parametrize("objective", [CD(), DMD2(student_every=1, gan=NO_GAN)], ids=["cd", "dmd2"])
def test_guidance_of_one_costs_one_teacher_evaluation_and_any_other_two_in_one_batch(
    guidance: float, rows: int, objective: Objective
) -> None:
    nets = players(objective, guidance)
    with recorded(nets.teacher.denoiser.net) as outputs:
        trainer_of(objective, nets=nets).step(0)
    assert [len(output) for output in outputs] == [rows]


@pytest.mark.parametrize("name", ["cd", "tscd", "dmd2, no gan"])
def test_frozen_networks_are_evaluated_without_a_graph(name: str) -> None:
    trainer = trainer_of(OBJECTIVES[name])
    trainer.turns = trainer.turns[:1]  # the student's
    frozen = [net for role, net in trainer.nets.items() if role not in ("student", "ema")]
    with recorded(frozen[0]) as one, recorded(frozen[1]) as other:
        trainer.step(0)
    assert one and other and not any(output.requires_grad for output in (*one, *other))


def test_the_dmd2_student_turn_holds_no_more_than_one_pass_through_the_student() -> None:
    """A teacher that is run with a graph holds a second and a third network's activations, for a gradient that the
    method does not want.
    """
    objective = DMD2(student_every=1, gan=NO_GAN)
    trainer = trainer_of(objective, data=lambda step: batches(step, 16))
    trainer.turns = trainer.turns[:1]
    student, step = trainer.nets.student, Step.at(0)
    batch = batches(step, 16)
    with saved_bytes() as alone:
        OneStep()(student, batch, step).sum().backward()
    student.zero_grad()
    with saved_bytes() as held:
        trainer.step(0)
    assert alone.peak > 16 * 64 * 16 * 4 * 3  # three feature maps at least
    assert alone.peak <= held.peak <= 1.10 * alone.peak


# Scaled losses


def test_scaling_a_loss_by_a_power_of_two_changes_no_bit() -> None:
    """In float32 networks nothing over- or underflows, so that scaling and its undoing must cancel."""
    plain, scaled = trainer_of(KD(), Run(clip=0.1)), trainer_of(KD(), Run(clip=0.1, dtype="float16"))
    for index in range(3):
        expected, found = plain.step(index), scaled.step(index)
        assert float(found.pop("student/loss_scale")) == 2**16
        assert found == expected
    assert torch.equal(weights(plain.nets.student), weights(scaled.nets.student))


def test_an_update_whose_scaled_gradient_overflows_is_left_out_and_the_scale_halved() -> None:
    trainer = trainer_of(KD(), Run(dtype="float16"))
    trainer.scales["student"].scale = 2.0**135
    before = hashes(trainer.nets)
    scales = []
    while not (logs := trainer.step(0)).keys() & {"student/grad_norm"}:
        assert not changed(before, hashes(trainer.nets)) and len(scales) < 200
        scales.append(float(logs["student/loss_scale"]))
    assert scales == [2.0 ** (135 - k) for k in range(len(scales))] and scales
    assert changed(before, hashes(trainer.nets)) == {"student", "ema"}


def test_a_scale_grows_after_2000_updates_and_gives_up_below_one() -> None:
    scale = LossScale(8.0)
    for _ in range(1999):
        scale.grow()
    assert (scale.scale, scale.clean) == (8.0, 1999)
    scale.grow()
    assert (scale.scale, scale.clean) == (16.0, 0)
    assert [scale.shrink() for _ in range(5)] == [True] * 4 + [False]


def test_a_gradient_that_no_scale_can_mend_stops_the_run() -> None:
    trainer = trainer_of(Unbounded(), Run(dtype="float16"))
    with pytest.raises(FloatingPointError, match="turn 'student': not finite at step 16"):
        for index in range(100):
            trainer.step(index)


@dataclass(frozen=True)
class Unbounded(Objective):
    """A finite loss with an infinite gradient."""

    needs = frozenset({"student"})

    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn(self.loss, moves=("student",)),)

    def loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """The root of zero."""
        return Loss(sum((p - p.detach()).sum() for p in nets.student.parameters()).abs().sqrt())


# What goes wrong


def _poisoned(step: Step) -> Batch:
    batch = batches(step)
    return replace(batch, x0=torch.full_like(batch.x0, math.nan), path=torch.full_like(batch.path, math.nan))


def test_a_gradient_that_is_not_finite_stops_the_run_and_nobody_moves() -> None:
    trainer = trainer_of(KD(), data=_poisoned)
    before = hashes(trainer.nets)
    with pytest.raises(FloatingPointError, match=r"turn 'student': not finite at step 7 \(loss nan") as caught:
        trainer.step(7)
    assert "\n" not in str(caught.value)
    assert not changed(before, hashes(trainer.nets))
    trainer.data = batches
    trainer.step(8)  # nothing of the bad gradient is left behind
    assert changed(before, hashes(trainer.nets)) == {"student", "ema"}
    assert bool(weights(trainer.nets.student).isfinite().all())


def test_the_turn_with_the_bad_gradient_is_the_one_named_and_those_before_it_stand() -> None:
    """Data-free, the student's turn does not see the bad images; the discriminator's does."""
    trainer = trainer_of(DMD2(student_every=1), data=_poisoned)
    before = hashes(trainer.nets)
    with pytest.raises(FloatingPointError, match=r"turn 'critic\+disc'"):
        trainer.step(0)
    assert changed(before, hashes(trainer.nets)) == {"student", "ema"}


@dataclass(frozen=True)
class Constant(Objective):
    """Adds a constant to a loss: its gradient stays finite whatever the loss is."""

    needs = frozenset({"student"})
    constant: float = math.inf

    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn(self.loss, moves=("student",), name="odd"),)

    def loss(self, nets: Nets, batch: Batch, step: Step) -> Loss:
        """The sum of all weights, and the constant."""
        return Loss(sum(p.sum() for p in nets.student.parameters()) + self.constant)


def test_a_loss_that_is_not_finite_stops_the_run_though_its_gradient_is() -> None:
    trainer_of(Constant(1.0)).step(0)
    trainer = trainer_of(Constant())
    before = hashes(trainer.nets)
    with pytest.raises(FloatingPointError, match=r"turn 'odd'.*loss inf"):
        trainer.step(0)
    assert not changed(before, hashes(trainer.nets))


def test_a_missing_network_is_named_at_construction() -> None:
    nets = players(DMD2())
    del nets["critic"]
    with pytest.raises(ValueError, match=r"^DMD2 needs \['critic'\]; got \['disc', 'student', 'teacher'\]$"):
        Trainer(nets, DMD2(), {}, batches, Run())


def test_a_missing_discriminator_is_named_though_a_dmd2_without_gan_does_not_need_one() -> None:
    nets = players(DMD2(gan=NO_GAN))
    optimizers = {name: AdamW().build(nets.student.parameters()) for name in ("student", "critic", "disc")}
    with pytest.raises(ValueError, match=r"^DMD2 needs \['disc'\]; got \['critic', 'student', 'teacher'\]$"):
        Trainer(nets, DMD2(), optimizers, batches, Run())


def test_a_missing_optimizer_is_named_at_construction() -> None:
    nets = players(CD())
    with pytest.raises(ValueError, match=r"^CD moves \['student'\], one optimizer each; got \[\]$"):
        Trainer(nets, CD(), {}, batches, Run())


# The loop


def test_fit_shows_previews_and_stops_at_its_last_step() -> None:
    shown: list[int] = []
    trainer = trainer_of(KD(), Run(steps=7, preview_every=3))
    trainer.preview = lambda net, index: shown.append(index if net is trainer.nets.ema else -1)
    trainer.fit()
    assert trainer.index == 7 and shown == [3, 6, 7]


def test_an_interrupt_lets_the_step_under_way_end() -> None:
    def interrupting(step: Step) -> Batch:
        if step.index == 3:
            signal.raise_signal(signal.SIGINT)
        return batches(step)

    before = signal.getsignal(signal.SIGINT)
    trainer = trainer_of(KD(), Run(steps=100), data=interrupting)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.index == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait() -> None:
    def impatient(step: Step) -> Batch:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal was kept waiting")

    trainer = trainer_of(KD(), data=impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.index == 0


def test_something_due_every_so_often_is_due_at_multiples_and_never_at_zero() -> None:
    assert [i for i in range(1, 9) if due(i, 3)] == [3, 6]
    assert not any(due(i, 0) for i in range(9))


# The discriminator's warning


def _watched(accuracies: list[float]) -> list[str]:
    """Warnings of a metrics file that is written every 20 steps."""
    metrics = MetricsFile(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, accuracy in enumerate(accuracies):
            for _ in range(20):
                metrics.add({"critic+disc/disc_accuracy": torch.tensor(accuracy), "student/loss": torch.tensor(0.1)})
            metrics.write(20 * (i + 1))
    return [str(warning.message) for warning in caught]


def test_a_discriminator_at_chance_for_300_steps_is_warned_about_once() -> None:
    assert _watched([0.5] * 14) == []
    (message,) = _watched([0.5] * 15)
    assert "critic+disc/disc_accuracy" in message and "300 steps" in message and "learning rate" in message
    assert len(_watched([0.5] * 60)) == 1


def test_a_discriminator_that_learns_is_not_warned_about() -> None:
    assert _watched([0.5] * 14 + [0.6] + [0.5] * 14) == []
    assert _watched([0.9] * 40) == []


def test_the_trainer_passes_the_discriminators_accuracy_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are all zero are on neither side: the run itself must say so."""
    monkeypatch.setattr("stepdistill.logging.PATIENCE", 20)
    trainer = trainer_of(LADD(), Run(steps=20, log_every=10), spec=AdamW(0.0))
    last = trainer.nets.disc.heads[0].layers[-1]
    last.weight.data.zero_()
    last.bias.data.zero_()
    with pytest.warns(UserWarning, match="disc/disc_accuracy has stayed below 0.55 for 20 steps"):
        trainer.fit()
