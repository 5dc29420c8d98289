"""Feature taps and the discriminator on them: what runs, what is trained, where gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.discriminator import Discriminator, Head
from stepdistill.models.nets import Nets, only_trains
from stepdistill.models.taps import Tap, tapped
from stepdistill.schedule import RectifiedFlow


class Block(nn.Module):
    """A layer that counts its calls, and may answer in a tuple as diffusers' blocks do."""

    def __init__(self, channels: int, out: int, in_tuple: bool = False):
        super().__init__()
        self.conv, self.in_tuple, self.calls = nn.Conv2d(channels, out, 3, padding=1), in_tuple, 0

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, str]:
        self.calls += 1
        out = torch.tanh(self.conv(x))
        return (out, "skip") if self.in_tuple else out


class Net(nn.Module):
    """Four blocks in a row, with time and an optional label added at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(1, 4), Block(4, 6, in_tuple=True)
        self.third, self.last = Block(6, 8), Block(8, 1)
        self.unused = nn.Identity()

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = t if labels is None else t + labels
        h = self.first(x_t + shift[:, None, None, None])
        return self.last(self.third(self.second(h)[0]))


def inputs(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 5, 5), torch.rand(n)


def calls(net: Net) -> list[int]:
    return [b.calls for b in (net.first, net.second, net.third, net.last)]


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in net.modules())


# Taps


@pytest.mark.parametrize("names", [("first", "third"), ("third", "first"), ("second",), ("third.conv", "second")])
def test_taps_come_in_the_order_of_their_names_with_the_values_of_the_forward(names: tuple[str, ...]) -> None:
    net = Net()
    x, t = inputs()
    h1 = torch.tanh(net.first.conv(x + t[:, None, None, None]))
    h2 = torch.tanh(net.second.conv(h1))
    known = {"first": h1, "second": h2, "third.conv": net.third.conv(h2), "third": torch.tanh(net.third.conv(h2))}
    for stop in (True, False):
        found = tapped(net, names, lambda: net(x, t), stop=stop)
        assert len(found) == len(names)
        for name, features in zip(names, found, strict=True):
            assert_close(features, known[name])


def test_layers_behind_the_last_tap_do_not_run() -> None:
    net = Net()
    x, t = inputs()
    tapped(net, ("second", "first"), lambda: net(x, t))
    assert calls(net) == [1, 1, 0, 0]
    tapped(net, ("first",), lambda: net(x, t), stop=False)
    assert calls(net) == [2, 2, 1, 1]


def test_an_unknown_tap_is_named_before_anything_runs() -> None:
    net = Net()
    x, t = inputs()
    with pytest.raises(ValueError, match=r"no submodule 'fourth' to tap; the network has first, first\.conv"):
        tapped(net, ("first", "fourth"), lambda: net(x, t))
    assert calls(net) == [0, 0, 0, 0]


def test_a_tap_that_the_forward_does_not_reach_is_named() -> None:
    net = Net()
    x, t = inputs()
    with pytest.raises(ValueError, match="'unused' was not reached"):
        tapped(net, ("first", "unused"), lambda: net(x, t))
    assert hooks(net) == 0


def test_hooks_are_removed_after_success_early_stop_and_exceptions() -> None:
    net = Net()
    x, t = inputs()

    def fail() -> None:
        net.first(x)
        raise RuntimeError("in the middle")

    tapped(net, ("first",), lambda: net(x, t))
    tapped(net, ("first",), lambda: net(x, t), stop=False)
    with pytest.raises(RuntimeError, match="in the middle"):
        tapped(net, ("first", "last"), fail)
    assert hooks(net) == 0
    before = calls(net)
    net(x, t)  # and the network is whole again
    assert calls(net) == [c + 1 for c in before]


def test_gradients_flow_through_taps_to_sample_and_parameters() -> None:
    net = Net()
    x, t = inputs()
    x.requires_grad_()
    first, third = tapped(net, ("first", "third"), lambda: net(x, t))
    weights = torch.randn_like(first), torch.randn_like(third)
    ((first * weights[0]).sum() + (third * weights[1]).sum()).backward()
    h = torch.tanh(net.first.conv(x + t[:, None, None, None]))
    g = torch.tanh(net.third.conv(torch.tanh(net.second.conv(h))))
    (by_hand,) = torch.autograd.grad((h * weights[0]).sum() + (g * weights[1]).sum(), x)
    assert_close(x.grad, by_hand)
    assert net.second.conv.weight.grad is not None
    assert net.last.conv.weight.grad is None


# Discriminator


def discriminator() -> tuple[Discriminator, Denoiser]:
    backbone = Denoiser(Net(), RectifiedFlow(), "velocity")
    return Discriminator(backbone, (Tap("first", 4), Tap("third", 8)), width=5), backbone


def test_a_discriminator_owns_its_heads_and_nothing_of_the_backbone() -> None:
    disc, backbone = discriminator()
    assert {name.split(".")[0] for name, _ in disc.named_parameters()} == {"heads"}
    assert {name.split(".")[0] for name in disc.state_dict()} == {"heads"}
    assert len(disc.state_dict()) == 2 * len(Head(4, 5).state_dict())
    owned = {id(p) for p in disc.parameters()}
    assert not owned & {id(p) for p in backbone.parameters()}
    disc.train()
    backbone.eval()
    disc.train()
    assert not backbone.training  # nor its mode


def test_logits_are_all_heads_positions_side_by_side() -> None:
    disc, backbone = discriminator()
    x, t = inputs()
    logits = disc(x, t, {})
    assert logits.shape == (3, 2 * 25)
    first, third = tapped(backbone.net, ("first", "third"), lambda: backbone.net(x, t))
    assert_close(logits[:, :25], disc.heads[0](first))
    assert_close(logits[:, 25:], disc.heads[1](third))
    assert_close(disc.judge(disc.features(x, t, {})), logits)
    assert calls(backbone.net)[3] == 0  # the denoiser's answer itself is never made


def test_heads_are_local_and_judge_each_sample_alone() -> None:
    head = Head(4, 6)
    features = torch.randn(2, 4, 9, 9)
    features.requires_grad_()
    logits = head.layers[1:](head.layers[0](features))
    assert logits.shape == (2, 1, 9, 9)
    assert head(features).shape == (2, 81)
    normed = head.layers[0](features).detach().requires_grad_()
    (grad,) = torch.autograd.grad(head.layers[1:](normed)[0, 0, 4, 4], normed)
    touched = grad.abs().sum((0, 1)) > 0
    assert bool(touched[2:7, 2:7].all())
    assert int(touched.sum()) == 25  # two 3x3 convolutions see 5x5
    assert float(grad[1].abs().sum()) == 0


def test_conditions_reach_the_backbone() -> None:
    disc, _ = discriminator()
    x, t = inputs()
    labels = torch.tensor([0.0, 1.0, 2.0])
    assert_close(disc(x, t, {"labels": labels}), disc(x, t + labels, {}))


def test_a_frozen_backbone_gets_no_gradient_and_the_sample_does() -> None:
    disc, backbone = discriminator()
    teacher = Guided(backbone)
    x, t = inputs()
    x.requires_grad_()
    nets = Nets({"student": nn.Conv2d(1, 1, 1), "teacher": teacher, "disc": disc})
    with only_trains(nets, ("student",)):
        disc(nets.student(x), t, {}).mean().backward()
    assert float(x.grad.abs().sum()) > 0
    assert float(nets.student.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in (*backbone.parameters(), *disc.parameters()))
    with only_trains(nets, ("disc",)) as params:
        disc(x.detach(), t, {}).mean().backward()
    assert {id(p) for p in params} == {id(p) for p in disc.parameters()}
    assert all(p.grad is not None for p in disc.parameters())
    assert all(p.grad is None for p in backbone.parameters())


def test_a_critic_as_backbone_is_trained_where_its_turn_says_so() -> None:
    disc, critic = discriminator()
    nets = Nets({"critic": critic, "disc": disc})
    x, t = inputs()
    with only_trains(nets, ("critic", "disc")):
        disc(x, t, {}).mean().backward()
    assert critic.net.first.conv.weight.grad is not None
    assert critic.net.last.conv.weight.grad is None  # not run at all


def test_a_number_of_channels_that_does_not_match_the_taps_is_an_error() -> None:
    backbone = Denoiser(Net(), RectifiedFlow(), "velocity")
    disc = Discriminator(backbone, (Tap("first", 4), Tap("third", 4)))
    with pytest.raises(RuntimeError, match="channels"):
        disc(*inputs(), {})
