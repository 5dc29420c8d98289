"""Weights that stay as they start: never trained, always saved, and no name of a layer goes unnoticed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepdistill.build import Built, build, new_network, open_teacher
from stepdistill.export import load_student, save_pipeline
from stepdistill.models.families import Opened
from stepdistill.models.nets import Nets, freeze, only_trains, update_average
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.recipes import find
from stepdistill.trainer import Run

INNATE = ("conv1", "conv2", "conv")


@pytest.fixture(scope="module")
def digits() -> Opened:
    return open_teacher(Teacher("bundled:digits"))


class Net(nn.Module):
    """Two blocks with layers of the same names, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "norm": nn.GroupNorm(1, 2)}) for _ in "ab"
        )
        self.conv_in = nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block["norm"](block["conv"](x))
        return x


def test_layers_are_found_by_the_end_of_their_names() -> None:
    net = Net()
    names = list(net.state_dict())
    freeze(net, ("conv",))
    moving = {name for name, _ in net.named_parameters()}
    assert moving == {"conv_in.weight", "conv_in.bias"} | {
        f"blocks.{i}.norm.{p}" for i in (0, 1) for p in ("weight", "bias")
    }
    assert sorted(net.state_dict()) == sorted(names)
    freeze(net, ("blocks.0",))
    assert {name for name, _ in net.named_parameters()} == {n for n in moving if not n.startswith("blocks.0")}


def test_a_frozen_network_computes_as_before_and_lets_gradients_through() -> None:
    net = Net()
    x = torch.randn(2, 1, 3, 3, requires_grad=True)
    before = net(x)
    grad = torch.autograd.grad(before.square().sum(), x)[0]
    freeze(net, ("conv", "norm"))
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    net(x).square().sum().backward()
    torch.testing.assert_close(x.grad, grad, rtol=0, atol=0)
    assert net.conv_in.weight.grad is not None and not net.blocks[0]["conv"].weight.requires_grad


def test_what_moves_what_is_averaged_and_what_is_copied() -> None:
    net = Net()
    freeze(net, ("conv",))
    nets = Nets({"student": net, "other": Net()})
    with only_trains(nets, ("student",)) as moved:
        assert {id(p) for p in moved} == {id(p) for p in net.parameters()} and len(moved) == 6
    average = copy.deepcopy(net)
    for p in average.parameters():
        p.data.zero_()
    update_average(average, net, 0.75)
    assert torch.equal(average.blocks[1]["conv"].weight, net.blocks[1]["conv"].weight)
    torch.testing.assert_close(average.conv_in.weight, 0.25 * net.conv_in.weight)


def test_weights_that_two_layers_share_are_frozen_in_both_and_stay_shared() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    freeze(net, ("a",))
    assert {name for name, _ in net.named_parameters()} == {"b.bias"}
    assert net["a"].weight is net["b"].weight


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        (("conv", "cnv"), "freeze: 'cnv' names no layer with weights of Net"),
        (("onv",), "freeze: 'onv' names no layer"),
        (("conv", "norm", "conv_in"), "freeze: conv, norm, conv_in are all weights of Net; leave some to move"),
    ],
)
def test_a_layer_that_is_not_there_or_a_network_that_cannot_move_is_refused(layers: tuple[str, ...], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        freeze(Net(), layers)


def test_a_lora_has_nothing_to_freeze() -> None:
    with pytest.raises(ValueError, match=r"a LoRA freezes the whole network: freeze \['conv1'\] needs form 'full'"):
        Weights(form="lora", freeze=("conv1",))


def test_gdd_i_moves_a_sixth_of_the_digits_network(digits: Opened) -> None:
    """Norms, time, labels, shortcuts, first and last layer: EDM's names in diffusers' spelling."""
    net = new_network(digits, Weights(freeze=INNATE))
    teacher = dict(digits.denoiser.net.named_parameters())
    moving = {name for name, _ in net.named_parameters()}
    by_hand = {name for name in teacher if name.split(".")[-2] not in ("conv1", "conv2", "conv")}
    assert moving == by_hand
    assert {"conv_in.weight", "conv_out.bias", "class_embedding.weight", "time_embedding.linear_1.weight"} <= moving
    assert "up_blocks.0.resnets.1.conv_shortcut.weight" in moving and "mid_block.resnets.0.norm1.weight" in moving
    share = sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in teacher.values())
    assert 0.1 < share < 0.2
    assert teacher.keys() == digits.denoiser.net.state_dict().keys()  # the teacher's own are parameters still


def recipe(**changes: object) -> Recipe:
    base = find("digits_gdd_innate")
    return replace(
        base, run=Run(steps=4, batch=4, ema=0.5, clip=10.0, save_every=2, threads=1), evaluation=None, **changes
    )


def test_training_leaves_frozen_weights_bit_for_bit_and_moves_all_others(digits: Opened, tmp_path: Path) -> None:
    built = build(recipe(), opened=digits, out=tmp_path / "run")
    trainer, teacher = built.trainer, digits.denoiser.net.state_dict()
    start = {k: v.clone() for k, v in trainer.nets.student.net.state_dict().items()}
    assert all(torch.equal(start[k], teacher[k]) for k in teacher)
    moving = {name for name, _ in trainer.nets.student.net.named_parameters()}
    owned = {id(p) for group in trainer.optimizers["student"].param_groups for p in group["params"]}
    assert owned == {id(p) for p in trainer.nets.student.parameters()}
    trainer.fit()
    for net in (trainer.nets.student.net, trainer.nets.ema.net):
        unchanged = {k for k, v in net.state_dict().items() if torch.equal(v, teacher[k])}
        assert unchanged == teacher.keys() - moving

    save_pipeline(trainer.nets.ema, digits, tmp_path / "pipeline", teacher="bundled:digits", method="gdd")
    again = load_student(tmp_path / "pipeline", opened=digits).net.state_dict()
    assert all(torch.equal(again[k], v) for k, v in trainer.nets.ema.net.state_dict().items())


def test_a_stopped_run_with_frozen_weights_goes_on_bit_for_bit(digits: Opened, tmp_path: Path) -> None:
    def run(folder: str) -> Built:
        return build(recipe(), opened=digits, out=tmp_path / folder)

    whole, first, second = run("whole").trainer, run("cut").trainer, run("cut").trainer
    whole.fit()
    for index in range(2):
        first.step(index)
    first.index = 2
    first.save()
    first.checkpoints.finish()
    assert second.resume() and second.index == 2
    second.fit()
    for name in ("student", "ema", "disc"):
        states = (t.nets[name].state_dict() for t in (whole, second))
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
