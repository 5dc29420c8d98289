"""Batches: every image once an epoch, trajectories that are the teacher's own, nothing that a resume would change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepdistill.build import open_teacher
from stepdistill.data import DigitsData, Labels, Setting, TeacherPairs, load_digits, weights_hash
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import Opened
from stepdistill.objective import Step
from stepdistill.recipe import Teacher
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Sampler, StepRule, trailing

TWO_STEPS = Sampler(trailing(2))


@pytest.fixture(scope="module")
def opened() -> Opened:
    """The bundled teacher."""
    return open_teacher(Teacher("bundled:digits"))


@pytest.fixture
def setting(opened: Opened) -> Setting:
    """A run of batch 8 that keeps nothing on disk."""
    return Setting(opened, Guided(opened.denoiser, 1.0, opened.null), TWO_STEPS, 8, 0, "cpu", None)


def stream(setting: Setting, batches: int) -> tuple[Tensor, Tensor]:
    """Images and labels of the first batches, one after the other."""
    source = DigitsData().open(setting)
    found = [source(Step.at(index)) for index in range(batches)]
    return torch.cat([b.x0 for b in found]), torch.cat([b.cond["class_labels"] for b in found])


def rows_of(images: Tensor) -> list[bytes]:
    """Images as values that can be sorted and looked up."""
    return [image.numpy().tobytes() for image in images]


# Real digits


@pytest.mark.parametrize("batch", [479, 1000, 3000])
def test_every_epoch_is_a_permutation_of_the_training_digits(batch: int, setting: Setting) -> None:
    """Whether the batch divides the 1437 images, does not, or is larger."""
    images, _ = stream(setting._replace(batch=batch), -(-2 * 1437 // batch))
    epochs = rows_of(images[:1437]), rows_of(images[1437 : 2 * 1437])
    expected = sorted(rows_of(load_digits("train").images))
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]


def test_labels_stay_with_their_images(setting: Setting) -> None:
    digits = load_digits("train")
    label_of = dict(zip(rows_of(digits.images), digits.labels.tolist(), strict=True))
    images, labels = stream(setting._replace(batch=100), 3)
    assert [label_of[row] for row in rows_of(images)] == labels.tolist()


def test_a_batch_of_digits_depends_on_its_index_alone(setting: Setting) -> None:
    source = DigitsData().open(setting)
    first = source(Step.at(500)).x0
    for index in (0, 900, 2):
        source(Step.at(index))
    assert torch.equal(source(Step.at(500, 1, 2, 3)).x0, first)
    assert torch.equal(DigitsData().open(setting)(Step.at(500)).x0, first)
    assert not torch.equal(source(Step.at(501)).x0, first)
    assert not torch.equal(DigitsData().open(setting._replace(seed=1))(Step.at(500)).x0, first)


def test_a_batch_knows_its_shape(setting: Setting) -> None:
    for data in (DigitsData(), Labels(), TeacherPairs(8, solver=TWO_STEPS)):
        batch = data.open(setting)(Step.at(0))
        assert len(batch) == 8 and batch.shape == (8, 1, 8, 8)
        assert {"x0": batch.x0, "path": batch.path}.keys() >= data.provides
        assert (batch.x0 is not None) == ("x0" in data.provides)
        assert (batch.path is not None) == ("path" in data.provides)
        assert batch.x0 is None or batch.x0.shape == batch.shape


def test_digits_are_refused_where_the_teacher_makes_something_else(setting: Setting) -> None:
    larger = setting._replace(opened=replace(setting.opened, sample_shape=(3, 8, 8)))
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8\); the teacher's are \(3, 8, 8\)"):
        DigitsData().open(larger)


# Labels alone


def test_labels_are_uniform_and_drawn_from_the_step(setting: Setting) -> None:
    source = Labels(10).open(setting._replace(batch=5000))
    labels = source(Step.at(0)).cond["class_labels"]
    assert labels.dtype == torch.int64
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10 and (counts - 500).abs().max() < 5 * (5000 * 0.1 * 0.9) ** 0.5
    assert torch.equal(source(Step.at(0)).cond["class_labels"], labels)
    assert not torch.equal(source(Step.at(1)).cond["class_labels"], labels)


@pytest.mark.parametrize("data", [Labels(12), TeacherPairs(12, classes=12)])
def test_more_classes_than_the_network_has_are_refused_when_the_data_are_opened(
    data: Labels | TeacherPairs, setting: Setting
) -> None:
    with pytest.raises(ValueError, match=r"class labels must be integers from 0 to 10"):
        data.open(setting)


# The teacher's trajectories


@pytest.mark.parametrize("rule", [Ddim(), Heun(), DpmPP2M()])
def test_a_path_leads_from_the_noise_to_the_sample_of_the_solver(rule: StepRule, setting: Setting) -> None:
    solver = Sampler(trailing(4), rule)
    batch = TeacherPairs(24, solver=solver).open(setting)(Step.at(1))
    assert batch.path.shape == (8, 3, 1, 8, 8)
    assert torch.equal(batch.x0, batch.path[:, -1])
    noise, half = batch.path[:, 0], batch.path[:, 1]
    assert 0.8 < float(noise.std()) < 1.2
    with torch.no_grad():
        sample = solver.run(setting.teacher, noise, batch.cond, torch.Generator())
        middle = solver.run(setting.teacher, noise, batch.cond, torch.Generator(), stop=2)  # at t = 1/2
    torch.testing.assert_close(batch.x0, sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(half, middle, rtol=0, atol=1e-5)
    assert not torch.allclose(half, sample, atol=0.1)


def test_trajectories_are_guided_as_the_teacher_is(setting: Setting) -> None:
    opened = setting.opened
    guided = setting._replace(teacher=Guided(opened.denoiser, 3.0, opened.null))
    batch = TeacherPairs(8, solver=TWO_STEPS).open(guided)(Step.at(0))
    with torch.no_grad():
        sample = TWO_STEPS.run(guided.teacher, batch.path[:, 0], batch.cond, torch.Generator())
        plain = TWO_STEPS.run(setting.teacher, batch.path[:, 0], batch.cond, torch.Generator())
    torch.testing.assert_close(batch.x0, sample, rtol=0, atol=1e-5)
    assert not torch.allclose(batch.x0, plain, atol=0.1)


def test_classes_take_turns_among_the_trajectories(setting: Setting) -> None:
    source = TeacherPairs(24, classes=3, solver=TWO_STEPS).open(setting)
    labels = torch.cat([source(Step.at(index)).cond["class_labels"] for index in range(3)])  # one epoch
    assert torch.bincount(labels).tolist() == [8, 8, 8]


def test_a_student_off_the_solvers_grid_is_refused(setting: Setting) -> None:
    with pytest.raises(ValueError, match=r"time 0.5 is not on the solver's grid of 3 steps; .* a multiple of 2 steps"):
        TeacherPairs(solver=Sampler(trailing(3))).open(setting)


# The cache


class Calls:
    """How often a network is called."""

    def __init__(self, net: nn.Module):
        self.n = 0
        self.handle = net.register_forward_hook(self._count)

    def _count(self, *args: object) -> None:
        self.n += 1


def test_trajectories_are_made_once_and_read_back_bit_for_bit(setting: Setting, tmp_path: Path) -> None:
    data, cached = TeacherPairs(16, solver=TWO_STEPS), setting._replace(cache=tmp_path / "cache")
    first = data.open(cached)(Step.at(1))
    calls = Calls(setting.opened.denoiser.net)
    again = data.open(cached)(Step.at(1))
    calls.handle.remove()
    assert calls.n == 0 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert torch.equal(again.path, first.path) and torch.equal(again.cond["class_labels"], first.cond["class_labels"])
    assert torch.equal(data.open(setting)(Step.at(1)).path, first.path)  # and without a cache it is the same


def test_what_changes_the_trajectories_changes_the_cache(setting: Setting, tmp_path: Path) -> None:
    opened, data = setting.opened, TeacherPairs(4, solver=TWO_STEPS)
    setting = setting._replace(cache=tmp_path)
    other = open_teacher(Teacher("bundled:digits"))
    with torch.no_grad():
        next(other.denoiser.net.parameters()).add_(1e-6)
    settings = [
        setting,
        setting._replace(seed=1),
        setting._replace(teacher=Guided(opened.denoiser, 2.0, opened.null)),
        setting._replace(teacher=Guided(opened.denoiser, 2.0, opened.null, interval=(0.2, 0.8))),
        setting._replace(opened=other, teacher=Guided(other.denoiser)),
    ]
    for one in settings:
        data.open(one)
    replace(data, count=8).open(setting)
    replace(data, solver=Sampler(trailing(4))).open(setting)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(settings) + 2


def test_a_damaged_cache_is_made_anew_with_a_warning(setting: Setting, tmp_path: Path) -> None:
    data, cached = TeacherPairs(4, solver=TWO_STEPS), setting._replace(cache=tmp_path)
    first = data.open(cached)(Step.at(0))
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged .* and is made anew"):
        again = data.open(cached)(Step.at(0))
    assert torch.equal(again.path, first.path) and path.read_bytes() == whole


def test_a_hash_of_weights_sees_values_and_names() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(other)
    renamed = nn.ModuleDict({"a": one})
    assert weights_hash(renamed) != weights_hash(one)
    other.weight.data[0, 0] += 1e-6
    assert weights_hash(one) != weights_hash(other)
