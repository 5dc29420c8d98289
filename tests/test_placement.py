"""Networks that rest, or compute their activations again, train as those that do not, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepdistill.build import build, open_teacher
from stepdistill.data import DigitsData
from stepdistill.objectives import CD, DMD2
from stepdistill.parts.gan import Gan
from stepdistill.placement import Placement, Resting, check_device
from stepdistill.profiling import saved_bytes
from stepdistill.recipe import Recipe, Teacher, Weights
from stepdistill.sampling import Renoise, Sampler, trailing
from stepdistill.trainer import AdamW, Run, Trainer

LORA = Weights("lora", rank=4, targets=("conv1", "conv2", "time_emb_proj"))
CONSISTENCY = Recipe(
    teacher=Teacher("bundled:digits"),
    objective=CD(target_decay=0.9),
    data=DigitsData(),
    optim={"student": AdamW(1e-3)},
    sampler=Sampler(trailing(2), Renoise()),
    run=Run(steps=4, batch=4),
)
GAME = replace(
    CONSISTENCY,
    objective=DMD2(student_every=2, gan=Gan(weight=0.1)),
    optim=dict.fromkeys(("student", "critic", "disc"), AdamW(1e-3)),
    sampler=Sampler(trailing(1)),
)
SHARED = replace(GAME, student=LORA, critic=LORA)


def trained(recipe: Recipe, placement: Placement) -> tuple[dict[str, Tensor], Trainer]:
    """Everyone's weights after four steps."""
    trainer = build(replace(recipe, placement=placement)).trainer
    for index in range(recipe.run.steps):
        trainer.step(index)
    return {k: v.clone() for k, v in trainer.nets.trainable_state().items()}, trainer


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that is other memory than the CPU's, and is lost when a network leaves it; who came and went."""
    events: list[str] = []
    arrive, leave = Resting.arrive, Resting.leave

    def arriving(self: Resting) -> None:
        events.append("arrives") if not self.here else None
        arrive(self)

    def leaving(self: Resting, *, changed: bool = False) -> None:
        if self.here:
            events.append("leaves changed" if changed else "leaves")
        there = [t.data for t in self.tensors] if self.here else []
        leave(self, changed=changed)
        for lost in there:
            lost.fill_(float("nan") if lost.is_floating_point() else 0)

    monkeypatch.setattr(Resting, "sent", lambda self, home: home.clone())
    monkeypatch.setattr(Resting, "arrive", arriving)
    monkeypatch.setattr(Resting, "leave", leaving)
    return events


def test_networks_that_rest_on_the_cpu_train_the_same(elsewhere: list[str]) -> None:
    expected, _ = trained(CONSISTENCY, Placement())
    found, trainer = trained(CONSISTENCY, Placement(offload=("teacher", "ema", "target")))
    assert_same_bits(found, expected)
    # of a step: the teacher and the target come for the loss; each average comes, or is there, to be moved
    assert elsewhere[:6] == ["arrives", "arrives", "arrives", "leaves changed", "leaves changed", "leaves"]
    assert all(not one.here for role in trainer.placed.resting.values() for one in role)


def test_a_resting_teacher_comes_for_the_turns_that_ask_it_only(elsewhere: list[str]) -> None:
    """Its discriminator asks in every turn; without one the critic's turn goes by without it."""
    recipe = replace(GAME, objective=DMD2(student_every=2, gan=Gan(weight=0.0)))
    recipe = replace(recipe, optim={name: recipe.optim[name] for name in ("student", "critic")})
    expected, _ = trained(recipe, Placement())
    found, _ = trained(recipe, Placement(offload=("teacher",)))
    assert_same_bits(found, expected)
    assert elsewhere == ["arrives", "leaves"] * 2  # four steps, two of them the student's


def test_a_preview_finds_a_resting_average_on_the_device(elsewhere: list[str]) -> None:
    _, trainer = trained(CONSISTENCY, Placement(offload=("ema",)))
    seen = []
    trainer.preview = lambda net, index: seen.append(all(p.isfinite().all() for p in net.parameters()))
    elsewhere.clear()
    trainer._show()
    assert seen == [True] and elsewhere == ["arrives", "leaves changed"]


@pytest.mark.parametrize("recipe", [GAME, SHARED], ids=["apart", "shared backbone"])
def test_activations_that_are_computed_again_give_the_same_gradients(recipe: Recipe) -> None:
    """Also on one network for three roles, where by the time of the backward pass another role is switched on."""
    expected, plain = trained(recipe, Placement())
    found, trainer = trained(recipe, Placement(checkpointing=("student", "critic")))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    with saved_bytes() as kept:
        plain.step(4)
    with saved_bytes() as fewer:
        trainer.step(4)
    assert fewer.peak < 0.8 * kept.peak


@pytest.mark.parametrize(
    ("recipe", "placement", "message"),
    [
        (GAME, Placement(offload=("tutor",)), "placement.offload: 'tutor' is none of the denoising networks"),
        (GAME, Placement(checkpointing=("disc",)), "placement.checkpointing: 'disc' is none of the denoising networks"),
        (SHARED, Placement(offload=("teacher",)), "placement.offload 'teacher': others adapt its network"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(recipe: Recipe, placement: Placement, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(replace(recipe, placement=placement), opened=open_teacher(recipe.teacher))


def test_who_is_moved_stays_on_the_device() -> None:
    with pytest.raises(ValueError, match=r"placement.offload 'critic': an optimizer moves it"):
        replace(GAME, placement=Placement(offload=("critic",)))
    with pytest.raises(ValueError, match=r"placement.offload is for networks that are not sharded"):
        Placement(shard=True, offload=("teacher",))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps"])
def test_a_device_that_is_missing_or_has_no_float64_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "mps":  # what torch says on machines that have one

        def zeros(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
            assert dtype == torch.float64
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

        monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match=f"run.device '{device}': cannot be used on this machine") as caught:
        check_device("run.device", device)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    check_device("run.device", "cpu")
