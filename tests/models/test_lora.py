"""Roles on one frozen network: who is on when, what each holds, and whose gradients are whose."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.build import new_critic, new_network, new_student
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import open_pipeline
from stepdistill.models.families.sd import UNET_LORA
from stepdistill.models.lora import Adapted, bare_state, merged_state, network_of
from stepdistill.models.nets import Nets, listed, only_trains, update_average
from stepdistill.models.surgery import bare_copy
from stepdistill.objective import Batch
from stepdistill.objectives import CD, DMD2
from stepdistill.parts.gan import Gan
from stepdistill.recipe import Weights
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.trainer import AdamW, Run, Trainer
from tests.tiny import sd, sd3

X, T, C = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)


def call(net: nn.Module) -> Tensor:
    return net(X, T, encoder_hidden_states=C, return_dict=False)[0]


def stir(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


@pytest.fixture
def base() -> Iterator[UNet2DConditionModel]:
    torch.manual_seed(0)
    yield sd.unet().eval()


def test_a_new_role_is_the_bare_network_and_a_trained_one_leaves_it_alone(base: UNet2DConditionModel) -> None:
    before, keys = call(base).detach(), set(base.state_dict())
    role = Adapted(base, 4, 8.0, UNET_LORA)
    assert_close(call(role), before, rtol=0, atol=0)
    stir(role)
    assert not torch.allclose(call(role), before, atol=1e-3)
    assert_close(call(base), before, rtol=0, atol=0)
    assert set(bare_state(base)) == keys
    assert network_of(role) is base


def test_a_role_equals_pefts_own_model(base: UNet2DConditionModel) -> None:
    """The same weights in a network that PEFT wraps by itself: outputs and gradients."""
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8.0, target_modules=list(UNET_LORA))).eval()
    role = stir(Adapted(base, 4, 8.0, UNET_LORA))
    weights = {k.removeprefix("base_model.model."): v for k, v in theirs.named_parameters() if ".lora_" in k}
    mine = {k.replace("/", "."): v for k, v in role.named_parameters()}
    assert {k.replace(".default.", ".") for k in weights} == set(mine)
    with torch.no_grad():
        for key, value in weights.items():
            value.copy_(mine[key.replace(".default.", ".")])
    out, expected = call(role), call(theirs)
    assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for key, value in weights.items():
        assert_close(mine[key.replace(".default.", ".")].grad, value.grad)


def test_roles_do_not_see_each_other(base: UNet2DConditionModel) -> None:
    one = stir(Adapted(base, 4, 4.0, UNET_LORA))
    alone = call(one).detach()
    two = stir(Adapted(base, 2, 2.0, ("to_q", "to_v")))
    assert_close(call(one), alone, rtol=0, atol=0)
    call(two).square().sum().backward()
    assert all(p.grad is None for p in one.parameters())
    assert all(p.grad is not None for p in two.parameters())
    assert all(p.grad is None for n, p in base.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_role_switched_before_backward_has_its_own_gradients(base: UNet2DConditionModel, checkpointing: bool) -> None:
    """Recomputation runs in backward, when somebody else has played since."""
    one, two = stir(Adapted(base, 4, 4.0, UNET_LORA)), stir(Adapted(base, 4, 4.0, UNET_LORA))
    base.train()
    call(one).square().sum().backward()
    expected = [p.grad.clone() for p in one.parameters()]
    one.zero_grad()
    if checkpointing:
        base.enable_gradient_checkpointing()
    loss = call(one).square().sum()
    call(two), call(base)
    loss.backward()
    for p, g in zip(one.parameters(), expected, strict=True):
        assert_close(p.grad, g)
    assert all(p.grad is None for p in two.parameters())


def test_checkpointing_that_was_on_before_replays_roles_too(base: UNet2DConditionModel) -> None:
    base.enable_gradient_checkpointing()
    base.train()
    role = stir(Adapted(base, 4, 4.0, UNET_LORA))
    loss = call(role).square().sum()
    call(base)
    loss.backward()
    with_it = [p.grad.clone() for p in role.parameters()]
    role.zero_grad()
    base.disable_gradient_checkpointing()
    call(role).square().sum().backward()
    for p, g in zip(role.parameters(), with_it, strict=True):
        assert_close(p.grad, g)


def test_a_failed_forward_leaves_nobody_on(base: UNet2DConditionModel) -> None:
    before = call(base).detach()
    role = stir(Adapted(base, 4, 4.0, UNET_LORA))
    with pytest.raises(RuntimeError):
        role(X[:, :3], T, encoder_hidden_states=C)
    assert_close(call(base), before, rtol=0, atol=0)


def test_a_deep_copy_is_a_new_role_on_the_same_network(base: UNet2DConditionModel) -> None:
    role = stir(Adapted(base, 4, 4.0, UNET_LORA))
    average = copy.deepcopy(role)
    assert average.backbone is base
    assert_close(call(average), call(role), rtol=0, atol=0)
    before = call(average).detach()
    stir(role)
    assert_close(call(average), before, rtol=0, atol=0)
    update_average(average, role, 0.0)
    assert_close(call(average), call(role), rtol=0, atol=0)


def test_merging_gives_a_plain_network(base: UNet2DConditionModel) -> None:
    role = stir(Adapted(base, 4, 8.0, UNET_LORA))
    plain = bare_copy(base)
    assert not any(".lora_" in k or "base_layer" in k for k in plain.state_dict())
    assert_close(call(plain), call(base), rtol=0, atol=0)
    plain.load_state_dict(merged_state(role))
    assert_close(call(plain), call(role), rtol=1e-4, atol=1e-4)


def test_a_copied_network_brings_its_own_switch(base: UNet2DConditionModel) -> None:
    role = stir(Adapted(base, 4, 4.0, UNET_LORA))
    other = copy.deepcopy(base)
    with other._stepdistill_roles.playing(role.role):
        assert not torch.allclose(call(other), call(base), atol=1e-3)
    assert_close(call(role), call(role))


@pytest.mark.parametrize("targets", [("to_x",), (), ("to_q", "nothing")])
def test_a_target_that_names_no_layer_is_refused(base: UNet2DConditionModel, targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="names no layer of UNet2DConditionModel"):
        Adapted(base, 4, 4.0, targets)


# In training


def built(form: str, make: object, tiny: object = sd) -> tuple[Trainer, Nets]:
    opened = open_pipeline(tiny.pipeline())
    weights = Weights(form=form, rank=4)
    torch.manual_seed(3)
    nets = Nets()
    nets["teacher"] = Guided(opened.denoiser, 2.0, opened.null)
    nets["student"] = new_student(opened, Sampler(trailing(1), Ddim()), weights)
    nets["critic"] = new_critic(opened, weights)
    optimizers = {name: AdamW(1e-2).build(nets[name].parameters()) for turn in make.turns() for name in turn.moves}
    cond = opened.encode(["a red star", "a blue ring"])
    shape = (2, *opened.sample_shape)
    torch.manual_seed(4)
    batch = Batch(cond, shape, x0=torch.randn(shape))
    return Trainer(nets, make, optimizers, lambda step: batch, Run(steps=3, batch=2)), nets


@pytest.mark.parametrize("tiny", [sd, sd3], ids=["sd", "sd3"])
@pytest.mark.parametrize("make", [DMD2(gan=Gan(weight=0.0), student_every=1), CD()], ids=["dmd2", "cd"])
def test_a_shared_backbone_trains_as_networks_of_their_own(tiny: object, make: object) -> None:
    """Three updates on one network, and on three copies with the same adapters each: the same losses and weights."""
    trainer, nets = built("lora", make, tiny)
    apart, others = built("lora", make, tiny)
    for name in ("student", "critic", "ema"):  # everybody on a network of their own
        role = others[name].net
        alone = Adapted(bare_copy(role.backbone), role.rank, role.alpha, role.targets)
        alone.load_state_dict(nets[name].net.state_dict())
        others[name].net = alone
    for name in apart.optimizers:
        apart.optimizers[name] = AdamW(1e-2).build(others[name].parameters())
    teacher = {k: v.clone() for k, v in bare_state(nets.teacher.denoiser.net).items()}
    for index in range(3):
        one, two = trainer.step(index), apart.step(index)
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key])
    for name in ("student", "critic", "ema"):
        for a, b in zip(nets[name].parameters(), others[name].parameters(), strict=True):
            assert_close(a, b)
    for key, value in bare_state(nets.teacher.denoiser.net).items():
        assert torch.equal(value, teacher[key]), key


def test_only_trains_frees_the_roles_that_move_whatever_the_order(base: UNet2DConditionModel) -> None:
    one, two = Adapted(base, 4, 4.0, ("to_q",)), Adapted(base, 4, 4.0, ("to_q",))
    nets = Nets({"student": one, "critic": two, "teacher": base})
    with only_trains(nets, ("student",)) as moved:
        assert {id(p) for p in moved} == {id(p) for p in one.parameters()}
        assert {id(p) for p in base.parameters() if p.requires_grad} == {id(p) for p in one.parameters()}


def test_adapters_on_a_base_of_their_own_share_nothing() -> None:
    opened = open_pipeline(sd.pipeline())
    student, critic = (new_network(opened, Weights("lora", rank=2, own_base=True)) for _ in range(2))
    nets = (student.backbone, critic.backbone, opened.denoiser.net)
    assert len({id(p) for net in nets for p in net.parameters()}) == sum(len(list(net.parameters())) for net in nets)
    for name, value in bare_state(opened.denoiser.net).items():
        assert torch.equal(bare_state(student.backbone)[name], value)
    with pytest.raises(ValueError, match=r"own_base is for adapters: it needs form 'lora'"):
        Weights(own_base=True)


def test_a_shared_run_holds_one_network_and_saves_adapters_alone() -> None:
    trainer, nets = built("lora", DMD2(gan=Gan(weight=0.0)))
    own = sum(p.numel() for p in bare_copy(nets.teacher.denoiser.net).parameters())
    held = {id(p): p.numel() for p in nets.parameters()}
    adapters = sum(p.numel() for name in ("student", "critic", "ema") for p in listed(nets[name])[0])
    assert sum(held.values()) == own + adapters
    assert sum(v.numel() for v in nets.trainable_state().values()) == adapters
    assert trainer.turns
