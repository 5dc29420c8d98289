"""DisBack: who stands still while the record is made, what is recorded, who is the teacher when, and where it ends."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.nets import Nets
from stepdistill.objective import Batch, Objective, Step
from stepdistill.objectives import DMD2, DisBack
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import OneStep
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.schedule import DiscreteVP
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher, mlp
from stepdistill.trainer import AdamW, Run, Trainer

from .conftest import drawn, pretrained, student_like

ONE = Sampler(trailing(1), Ddim())
OPTIM = {"student": AdamW(1e-3, (0.0, 0.99), decay="linear"), "critic": AdamW(2e-3, (0.0, 0.99), decay="linear")}
BASE = DMD2(gan=Gan(weight=0.0), student_every=2)
SHORT = DisBack(base=BASE, record_steps=12, record_every=3, target_steps=4)


def trainer_of(
    objective: Objective,
    teacher: nn.Module,
    start: Denoiser,
    *,
    steps: int = 40,
    batch: int = 32,
    seed: int = 0,
    out: Path | None = None,
) -> Trainer:
    """Student and critic begin at ``start``; what the method keeps of its own is there as well."""
    nets = Nets({"teacher": teacher, "student": student_like(start, ONE)})
    nets["critic"] = Denoiser(student_like(start, ONE).net, start.schedule, start.kind)
    for name, module in objective.extras(nets.student).items():
        nets[name] = module
    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in OPTIM.items()}
    run = Run(steps=steps, batch=batch, ema=0.98, clip=10.0, seed=seed)
    return Trainer(nets, objective, optimizers, lambda step: Batch({}, (batch, 2)), run, specs=OPTIM, out=out)


def weights(net: nn.Module) -> Tensor:
    """All parameters in one vector, copied."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_the_targets_go_back_to_the_true_teacher() -> None:
    """12 updates recorded every third: states after 9, 6 and 3, four steps each, and the teacher from then on."""
    assert SHORT.recorded == 3
    assert [SHORT.target(i) for i in range(12, 30)] == [3] * 4 + [2] * 4 + [1] * 4 + [0] * 6
    assert DisBack().recorded == 9  # 1000 updates in hundreds; the last is where the critic goes on from
    assert DisBack(record_steps=100, record_every=100).target(100) == 0


def test_the_student_stands_still_while_the_critic_is_recorded(gaussian: GaussianTeacher) -> None:
    trainer = trainer_of(SHORT, gaussian, pretrained(gaussian, 20))
    nets, student, seen = trainer.nets, weights(trainer.nets.student), []
    for index in range(20):
        seen.append(weights(nets.critic))
        logs = trainer.step(index)
        who = {name.split("/")[0] for name in logs}
        assert who == ({"record"} if index < 12 else {"critic"} if index % 2 else {"student", "critic"})
        if index == 11:
            assert torch.equal(weights(nets.student), student) and torch.equal(weights(nets.ema), student)
    assert not torch.equal(weights(nets.student), student)
    assert len(nets.record) == 3
    for record, updates in zip(nets.record, (3, 6, 9), strict=True):
        assert torch.equal(weights(record), seen[updates])  # nor did the second stage touch them
        assert all(not p.requires_grad and p.grad is None for p in record.parameters())


def test_the_record_leads_from_the_teacher_to_the_law_of_the_student(gaussian: GaussianTeacher) -> None:
    """The later the state, the better it denoises the student's samples, over the noise levels of both stages."""
    start = pretrained(gaussian, 200)
    trainer = trainer_of(DisBack(base=BASE, record_steps=40, record_every=10), gaussian, start, batch=128)
    for index in range(40):
        trainer.step(index)
    with torch.no_grad():
        x0 = OneStep()(trainer.nets.student, Batch({}, (4000, 2)), Step.at(1))
        t = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6 + 0.05
        x_t = start.schedule.add_noise(x0, Step.at(2).randn((4000, 2)), t)
        states = (start, *trainer.nets.record, trainer.nets.critic)
        wrong = [float((net(x_t, t, {}) - x0).square().mean()) for net in states]
    assert wrong == sorted(wrong, reverse=True) and wrong[-1] < 0.5 * wrong[0], wrong


def nets_of_classes(scale: float) -> Nets:
    """Networks of labels under a guided teacher."""
    torch.manual_seed(0)
    nets, schedule = Nets(), DiscreteVP.linear()
    nets["teacher"] = Guided(Denoiser(mlp(2, 16, 2, 3), schedule, "v"), scale, {"labels": torch.tensor([3])})
    nets["student"] = Student(ONE, mlp(2, 16, 2, 3), schedule, "v")
    nets["critic"] = Denoiser(mlp(2, 16, 2, 3), schedule, "v")
    nets["record"] = nn.ModuleList(Denoiser(mlp(2, 16, 2, 3), schedule, "v") for _ in range(3))
    return nets


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("index", "number"), [(12, 3), (16, 2), (20, 1), (24, 0)])
def test_the_student_is_pulled_to_the_target_of_its_step_under_the_teachers_guidance(
    scale: float, index: int, number: int
) -> None:
    nets, batch = nets_of_classes(scale), Batch({"labels": torch.arange(8) % 3}, (8, 2))
    swapped = Nets({**nets})
    if number:
        swapped["teacher"] = Guided(copy.deepcopy(nets.record[number - 1]), scale, nets.teacher.null)
    got = SHORT.student_loss(nets, batch, Step.at(index)).total
    expected = BASE.student_loss(swapped, batch, Step.at(index)).total
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    direct = BASE.student_loss(nets, batch, Step.at(index)).total
    assert torch.equal(direct, expected) == (number == 0)


def test_without_a_record_it_is_dmd2_bit_for_bit(gaussian: GaussianTeacher) -> None:
    start = pretrained(gaussian, 1)
    one, other = (trainer_of(o, gaussian, start) for o in (BASE, DisBack(base=BASE, record_steps=0)))
    for index in range(5):
        one.step(index), other.step(index)
    assert "record" not in other.nets
    for name in ("student", "critic"):
        assert torch.equal(weights(one.nets[name]), weights(other.nets[name]))
    assert not torch.equal(weights(one.nets.student), weights(start))


def test_a_run_cut_off_in_either_stage_goes_on_bit_for_bit(gaussian: GaussianTeacher, tmp_path: Path) -> None:
    start = pretrained(gaussian, 1)
    whole = trainer_of(SHORT, gaussian, start, steps=22)
    for index in range(22):
        whole.step(index)
    for cut in (8, 17):
        out = tmp_path / str(cut)
        first = trainer_of(SHORT, gaussian, start, steps=22, out=out)
        for index in range(cut):
            first.step(index)
        first.index = cut
        first.save()
        first.checkpoints.finish()
        again = trainer_of(SHORT, gaussian, pretrained(gaussian, 2), steps=22, out=out)
        assert again.resume() and again.index == cut
        for index in range(cut, 22):
            again.step(index)
        for name in ("student", "critic", "record", "ema"):
            assert torch.equal(weights(again.nets[name]), weights(whole.nets[name])), (cut, name)


def test_a_critic_unlike_the_student_is_refused(gaussian: GaussianTeacher) -> None:
    trainer = trainer_of(SHORT, gaussian, pretrained(gaussian, 1))
    trainer.nets["critic"] = Denoiser(mlp(2, 16), gaussian.schedule, "v")
    with pytest.raises(ValueError, match="states of the critic in copies of the student"):
        SHORT.record_loss(trainer.nets, Batch({}, (4, 2)), Step.at(3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"record_steps": 250}, "record_steps must be a multiple of record_every"),
        ({"record_every": 0}, "record_every"),
        ({"target_steps": 0}, "target_steps must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DisBack(**fields)


def test_data_and_grid_are_those_of_the_base() -> None:
    assert DisBack().data == {"x0"} and DisBack(base=BASE).data == frozenset()
    with pytest.raises(ValueError, match="OneStep trains the first"):
        DisBack(base=DMD2(rollout=OneStep())).check(Sampler(trailing(4)))


def test_by_way_of_the_record_the_student_reaches_the_exact_law(gaussian: GaussianTeacher) -> None:
    """Over three seeds 0.015 and 0.14; at the start the covariance is off by 1.0, all of it."""
    objective = DisBack(base=BASE, record_steps=60, record_every=20, target_steps=40)
    trainer = trainer_of(objective, gaussian, pretrained(gaussian, 500), steps=600, batch=128)
    for index in range(600):
        trainer.step(index)
    got, exact = drawn(trainer.nets.ema), gaussian.cov.float()
    assert (got.mean(0) - gaussian.mean).abs().max() < 0.05
    assert (torch.cov(got.T) - exact).norm() / exact.norm() < 0.28
