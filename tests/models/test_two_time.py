"""Networks of two times: unchanged at first, differentiable in both times, and gone without a trace at export."""

from __future__ import annotations

import copy
import importlib
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.testing import assert_close

import stepdistill
from stepdistill.build import new_student, plain_network, start_from
from stepdistill.checkpoint import Checkpoints, Progressed
from stepdistill.export import load_student, save_pipeline
from stepdistill.models.denoiser import Denoiser, Rescheduled
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.lora import network_of
from stepdistill.models.nets import Nets
from stepdistill.models.two_time import TwoTime, fold, time_layer
from stepdistill.parts.tangents import CentralDifference, Jvp
from stepdistill.recipe import Weights
from stepdistill.sampling import Ddim, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow
from stepdistill.student import Student
from stepdistill.testing import mlp
from tests.test_roundtrip import images_of, tiny

TINY = sorted(p.stem for p in (Path(__file__).parents[1] / "tiny").glob("[a-z]*.py"))
PROMPTS = ["a red star", "on white"]
IMAGE = 1e-5
"""Largest difference of images in [0, 1] between float32 ways to the same image."""


@cache
def opened_tiny(family: str) -> Opened:
    """Shared, so not to be adapted in place."""
    module = importlib.import_module(f"tests.tiny.{family}")
    return open_pipeline(module.pipeline(), size=getattr(module, "SIZE", None))


def conditions(opened: Opened) -> dict[str, Tensor]:
    cond = opened.encode(PROMPTS) if opened.family.encode else opened.family.examples(opened.pipeline, 2)
    return dict(cond)


def student_of(opened: Opened, steps: int, rule: StepRule | None = None, form: str = "full") -> Student:
    """A student of two times that has gone some way from its teacher, its second embedding far."""
    torch.manual_seed(1)
    weights = Weights(form, rank=4, alpha=8.0)
    student = new_student(opened, Sampler(trailing(steps), rule or Ddim()), weights, two_time=True).eval()
    with torch.no_grad():
        for p in student.net.net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for p in student.net.second.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return student


def small(schedule=None) -> Denoiser:
    """An MLP in float64 whose second embedding does something."""
    torch.manual_seed(2)
    net = TwoTime(mlp(2, width=32), at="enter")
    nn.init.normal_(net.second[2].weight, std=0.3)
    return Denoiser(net, schedule or RectifiedFlow(), "velocity").double()


@pytest.mark.parametrize("family", [f for f in TINY if f != "dit"])
def test_at_first_it_is_the_bare_network_bit_for_bit(family: str) -> None:
    opened = opened_tiny(family)
    x_t, cond = torch.randn(2, *opened.sample_shape), conditions(opened)
    t = torch.tensor([0.6, 1.0], dtype=torch.float64) * opened.denoiser.schedule.t_max
    student = new_student(opened, Sampler(trailing(4), Ddim()), two_time=True)
    with torch.no_grad():
        bare = opened.denoiser(x_t, t, cond)
        for s in (None, t / 2, -t):
            assert_close(student(x_t, t, cond, s=s), bare, rtol=0, atol=0)
    (student(x_t, t, cond).square().mean()).backward()
    last = student.net.second[2]
    assert last.weight.grad.abs().max() > 0 and last.bias.grad.abs().max() > 0


def test_both_times_and_the_sign_of_the_second_reach_the_output() -> None:
    predict = small()
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.full((3,), 0.8, dtype=torch.float64)
    with torch.no_grad():
        outs = [predict(x, t, {}, s=s * t) for s in (0.0, 0.5, 1.0, -1.0)]
        assert_close(predict(x, t, {}), outs[2], rtol=0, atol=0)  # a critic without s stands where it is
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("time", ["t", "s"])
def test_derivatives_in_both_times_are_those_of_finite_differences(time: str) -> None:
    predict = small()
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    s = t / 3

    def f(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return predict(x, t, {}, s=s)

    zero, one = torch.zeros_like(t), torch.ones_like(t)
    along = (torch.randn_like(x), one, zero) if time == "t" else (torch.zeros_like(x), zero, one)
    exact = Jvp()(f, (x, t, s), along)
    assert exact.abs().max() > 0.02
    # the network computes its features in float64 here, so that small steps are clean
    assert_close(CentralDifference(1e-5)(f, (x, t, s), along), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["unet2d", "sd", "sd3"])
def test_derivatives_pass_through_real_networks(family: str) -> None:
    """And against a network that is told a constant second time, the gap still moves with the first."""
    opened = opened_tiny(family)
    student = student_of(opened, 2)
    x, cond = torch.randn(2, *opened.sample_shape), conditions(opened)
    t = torch.tensor([0.4, 0.8], dtype=torch.float64)
    s = t / 2

    def f(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return student(x, t, cond, s=s, want=student.kind)

    # along s only the second embedding moves, whose slowness leaves room for float32's rounding
    still = torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(t)
    exact, near = Jvp()(f, (x, t, s), still), CentralDifference(1e-3)(f, (x, t, s), still)
    assert exact.abs().max() > 1e-3 and (exact - near).norm() < 0.02 * exact.norm()
    moving = torch.randn_like(x), torch.ones_like(t), torch.zeros_like(t)
    exact, near = Jvp()(f, (x, t, s), moving), CentralDifference(1e-4)(f, (x, t, s), moving)
    assert (exact - near).norm() < 0.02 * exact.norm()


# Which time a student heads for


@pytest.mark.parametrize(
    ("rule", "heads"),
    [(Ddim(), [0.75, 0.5, 0.25, 0, 0.5]), (Renoise(), [0] * 5), (Tcd(0.3), [0.525, 0.35, 0.175, 0, 0.35])],
)
@pytest.mark.parametrize("schedule", [RectifiedFlow(), EDM(80.0), DiscreteVP.linear()])
def test_a_student_heads_for_where_its_rule_jumps(rule: StepRule, heads: list[float], schedule) -> None:
    t = torch.tensor([1, 0.75, 0.5, 0.25, 0.6], dtype=torch.float64) * schedule.t_max
    student = Student(Sampler(trailing(4), rule), mlp(2), schedule, "v")
    expected = torch.tensor(heads, dtype=torch.float64) * schedule.t_max
    assert_close(student.next_time(t), expected, rtol=0, atol=2e-3 * schedule.t_max)  # TCD rounds to its table
    assert_close(student.next_time(t.float()), student.next_time(t), rtol=0, atol=0)


def test_samplers_walk_as_if_told_by_hand() -> None:
    torch.manual_seed(3)
    schedule, sampler = DiscreteVP.linear(), Sampler(trailing(4), Ddim())
    net = small(schedule).net.float()
    student = Student(sampler, net, schedule, "v")
    noise = torch.randn(5, 2)
    with torch.no_grad():
        got = sampler.run(student, noise, {}, torch.Generator())
        x = noise
        for high, low in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
            t, s = (torch.full((5,), u, dtype=torch.float64) for u in (high, low))
            x0 = student(x, t, {}, s=s)
            c_t, c_s = schedule.coeffs(t, x), schedule.coeffs(s, x)
            x = c_s.alpha * x0 + c_s.sigma * (x - c_t.alpha * x0) / c_t.sigma
    assert_close(got, x, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        one_time = Sampler(trailing(4), Renoise()).run(
            Student(Sampler(trailing(4), Renoise()), net, schedule, "v"), noise, {}, torch.Generator().manual_seed(0)
        )
    assert (one_time - got).abs().max() > 1e-2


def test_another_schedule_sees_the_same_jump() -> None:
    """The second time is carried over by log-SNR too, its sign kept."""
    inner, outer = small(DiscreteVP.linear()), RectifiedFlow()
    seen = Rescheduled(inner, outer)
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    c = inner.schedule(t)
    scale = (c.alpha + c.sigma)[:, None]  # equal SNR, on the straight path
    t_out = c.sigma / (c.alpha + c.sigma)
    for s in (0.5 * t, torch.zeros_like(t), -t):
        c_s = inner.schedule(s.abs())
        s_out = s.sign() * c_s.sigma / (c_s.alpha + c_s.sigma)
        with torch.no_grad():
            assert_close(seen(x / scale, t_out, {}, s=s_out), inner(x, t, {}, s=s), rtol=1e-9, atol=1e-9)


# State


def test_a_copy_is_its_own_and_a_checkpoint_brings_it_back(tmp_path: Path) -> None:
    opened = opened_tiny("sd")
    student = student_of(opened, 2)
    twin = copy.deepcopy(student)
    shape, cond = (2, *opened.sample_shape), conditions(opened)
    before = student.sample(shape, cond)
    assert_close(twin.sample(shape, cond), before, rtol=0, atol=0)
    nets = Nets({"student": student})
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(Progressed(3), nets, {})
    checkpoints.finish()
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(0.9)
    assert_close(twin.sample(shape, cond), before, rtol=0, atol=0)
    assert (student.sample(shape, cond) - before).abs().max() > 1e-3
    checkpoints.load(nets, {})
    assert_close(student.sample(shape, cond), before, rtol=0, atol=0)
    twin.load_state_dict({k: torch.zeros_like(v) for k, v in twin.state_dict().items()})
    twin.load_state_dict(student.state_dict())
    assert_close(twin.sample(shape, cond), before, rtol=0, atol=0)
    assert not network_of(student.net).time_embedding.linear_2._forward_hooks


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_adapters_share_the_network_and_have_second_times_of_their_own(family: str) -> None:
    opened = opened_tiny.__wrapped__(family)
    x_t, cond = torch.randn(2, *opened.sample_shape), conditions(opened)
    t = torch.tensor([0.6, 1.0], dtype=torch.float64)
    with torch.no_grad():
        bare = opened.denoiser(x_t, t, cond)
    student = student_of(opened, 4, form="lora")
    average = copy.deepcopy(student)
    assert network_of(average.net) is network_of(student.net) is opened.denoiser.net
    with torch.no_grad():
        mine = student(x_t, t, cond)
        assert (mine - bare).abs().max() > 1e-3
        assert_close(average(x_t, t, cond), mine, rtol=0, atol=0)
        nn.init.zeros_(average.net.second[2].weight)
        assert (average(x_t, t, cond) - mine).abs().max() > 1e-4
        assert_close(student(x_t, t, cond), mine, rtol=0, atol=0)
        assert_close(opened.denoiser(x_t, t, cond), bare, rtol=0, atol=0)


# Warm starts


def test_a_warm_start_brings_its_second_time_or_has_it_folded() -> None:
    opened = opened_tiny("sd")
    old, shape, cond = student_of(opened, 2), (2, *opened.sample_shape), conditions(opened)
    two, one = (new_student(opened, old.sampler, two_time=flag).eval() for flag in (True, False))
    start_from(two, old, opened)
    assert_close(two.sample(shape, cond), old.sample(shape, cond), rtol=0, atol=0)
    start_from(one, old, opened)
    assert_close(one.sample(shape, cond), old.sample(shape, cond), rtol=1e-4, atol=1e-4)
    fresh = new_student(opened, old.sampler, two_time=True).eval()
    start_from(fresh, one, opened)
    assert_close(fresh.sample(shape, cond), one.sample(shape, cond), rtol=0, atol=0)


# Export


@pytest.mark.parametrize(
    ("family", "steps"),
    [(f, 4) for f in TINY if f != "dit"] + [(f, k) for f in ("sd", "sd3", "flux2") for k in (1, 2, 8)],
)
def test_a_folded_network_is_right_at_every_time_of_its_grid(family: str, steps: int) -> None:
    opened = opened_tiny(family)
    student = student_of(opened, steps)
    plain = plain_network(student, opened)
    assert type(plain) is type(opened.denoiser.net)
    assert set(plain.state_dict()) == set(student.net.net.state_dict())
    d = opened.denoiser
    folded = Denoiser(plain, d.schedule, d.kind, d.call)
    x_t, cond = torch.randn(2, *opened.sample_shape), conditions(opened)
    if opened.family.guidance_input(plain):
        cond["guidance"] = torch.full((2,), 3.0)
    with torch.no_grad():
        for u in student.sampler.times:
            t = torch.full((2,), u * d.schedule.t_max, dtype=torch.float64)
            wanted = student(x_t, t, cond, want=d.kind)
            assert_close(folded(x_t, t, cond, want=d.kind), wanted, rtol=2e-4, atol=2e-4)
            bare = Denoiser(student.net.net, d.schedule, d.kind, d.call)(x_t, t, cond, want=d.kind)
            assert (bare - wanted).abs().max() > 2e-3  # or there was nothing to fold


def test_the_change_is_the_smallest() -> None:
    """Against the pseudo-inverse, and orthogonal to every direction that changes nothing at the grid's times."""
    opened = opened_tiny("sd")
    student = student_of(opened, 4, Renoise())  # which heads for 0 from everywhere, so that all gaps differ
    layer = student.net.net.time_embedding.linear_2
    moved = plain_network(student, opened).time_embedding.linear_2
    change = (moved.weight - layer.weight).double()
    rank = torch.linalg.matrix_rank(change, rtol=1e-4)
    assert rank == 4
    d = opened.denoiser
    hidden = []
    hook = layer.register_forward_pre_hook(lambda m, a: hidden.append(a[0]))
    t = torch.tensor(student.sampler.times, dtype=torch.float64)
    cond = {k: v.expand(4, *v.shape[1:]) for k, v in opened.encode([""]).items()}
    with torch.no_grad():
        d.call(student.net.net, torch.zeros(4, *opened.sample_shape), t, cond)
    hook.remove()
    h = hidden[0].double()
    outside = change - change @ torch.linalg.pinv(h) @ h
    assert outside.norm() < 1e-4 * change.norm()


@pytest.mark.parametrize(
    ("family", "rule", "steps", "form"),
    [
        ("sd", Ddim(), 1, "full"),
        ("sd", Ddim(), 4, "full"),
        ("sd", Renoise(), 2, "lora"),
        ("sd3", Ddim(), 1, "lora"),
        ("sd3", Ddim(), 4, "full"),
        ("unet2d", Ddim(), 2, "full"),
    ],
    ids=str,
)
def test_stock_diffusers_makes_the_same_images(
    tmp_path: Path, family: str, rule: StepRule, steps: int, form: str
) -> None:
    opened = tiny(family)
    student = student_of(opened, steps, rule, form)
    memory = images_of(student, opened)
    folder = save_pipeline(student, opened, tmp_path / "pipeline")
    wanted = 2 if family == "unet2d" else PROMPTS
    stock = stepdistill.sample(folder, wanted, output="float")  # diffusers' own pipeline
    assert (stock - memory).abs().max() < IMAGE
    assert ((stock > 0) & (stock < 1)).float().mean() > 0.3  # or clamping would hide a difference
    assert type(DiffusionPipeline.from_pretrained(folder)).__module__.startswith("diffusers.")
    back = load_student(folder, opened=opened)
    assert not isinstance(back.net, TwoTime) and (images_of(back, opened) - memory).abs().max() < IMAGE
    with torch.no_grad():
        nn.init.zeros_(student.net.second[2].weight)
        nn.init.zeros_(student.net.second[2].bias)
    assert (images_of(student, opened) - memory).abs().max() > 100 * IMAGE  # or there was nothing to fold
    assert "folded into its embedding of time" in (folder / "README.md").read_text()


# What cannot be


def test_what_cannot_be_told_or_folded_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="DiTTransformer2DModel embeds time in 3 places, so it cannot be told"):
        new_student(opened_tiny("dit"), Sampler(), two_time=True)
    with pytest.raises(ValueError, match="_MLP has no embedding of time that is known here"):
        TwoTime(mlp(2))
    opened = opened_tiny("sd")
    with pytest.raises(ValueError, match="holds the guidance scale too"):
        new_student(opened, Sampler(), Weights(told_guidance=True), two_time=True)
    with pytest.raises(ValueError, match="s: this UNet2DConditionModel knows one time only; wrap it in TwoTime"):
        t = torch.ones(2, dtype=torch.float64)
        opened.denoiser(torch.randn(2, *opened.sample_shape), t, conditions(opened), s=t)
    student = student_of(opened, 2)
    with torch.no_grad():
        student.net.second[2].bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite; export an earlier checkpoint"):
        plain_network(student, opened)


def test_times_that_the_network_cannot_tell_apart_are_not_folded() -> None:
    """Twice the same time with two second times: no weights do that."""
    opened = opened_tiny("sd")
    student = student_of(opened, 2)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    cond = {k: v.expand(2, *v.shape[1:]) for k, v in opened.encode([""]).items()}
    bare = copy.deepcopy(student.net.net)
    x = torch.zeros(2, *opened.sample_shape)
    with pytest.raises(ValueError, match="tells 2 times too little apart"):
        fold(student.net, bare, lambda net: student.call(net, x, t, cond), torch.tensor([0.5, 0.25]))
    assert time_layer(bare) == "time_embedding.linear_2"
