"""Inversion and editing against closed forms, and an inverter's way through a run's folder."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepdistill.build import build
from stepdistill.data import load_digits
from stepdistill.distill import Distilled, distill
from stepdistill.editing import Inverter, edit, invert
from stepdistill.export import load_inverter, load_student, save_pipeline
from stepdistill.functional.ode import jump_target
from stepdistill.models.denoiser import Guided
from stepdistill.objectives import ICD
from stepdistill.recipe import Recipe, Weights
from stepdistill.recipes import find
from stepdistill.sampling import Ddim, Renoise, Sampler, StepRule, Tcd, at, trailing
from stepdistill.schedule import EDM, DiscreteVP, RectifiedFlow, Schedule
from stepdistill.student import Student
from stepdistill.testing import GaussianTeacher

EDGES = (1.0, 0.8, 0.5, 0.2)
SCHEDULES = pytest.mark.parametrize("schedule", [DiscreteVP.linear(), RectifiedFlow()], ids=["vp", "flow"])


def two_classes(schedule: Schedule) -> GaussianTeacher:
    """Two classes that share a covariance of 1 and 0.04 along its axes."""
    cov, means = torch.tensor([[0.78, 0.4], [0.4, 0.26]]), torch.tensor([[1.0, 0.5], [-0.6, -0.8]])
    return GaussianTeacher(torch.tensor([0.4, -0.3]), cov, schedule, means)


class Asked(nn.Module):
    """The exact velocity, as a network: jumps along it are plain DDIM."""

    def __init__(self, teacher: GaussianTeacher):
        super().__init__()
        self._teacher = (teacher,)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._teacher[0](x_t, t, cond, want="velocity")


class ExactJumps(nn.Module):
    """Jumps to the next edge that are the exact flow map's, under the guidance that it is told."""

    def __init__(self, teacher: GaussianTeacher, up: bool):
        super().__init__()
        self._teacher, self.up = (teacher,), up

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None = None) -> Tensor:
        (teacher,) = self._teacher
        t_max = teacher.schedule.t_max
        now = t[0].item() / t_max
        end = min(e for e in EDGES if e > now + 1e-6) if self.up else max(e for e in (*EDGES, 0) if e < now - 1e-6)
        end = at(end * t_max, t)
        out = torch.empty_like(x_t)
        for label in labels.unique():  # all of one scale
            rows, law = labels == label, teacher.given(int(label), 1.0 if guidance is None else guidance[0].item())
            out[rows] = law.flow_map(x_t[rows], t[rows], end[rows])
        return jump_target(x_t, out, teacher.schedule.coeffs(t, x_t), teacher.schedule.coeffs(end, x_t))


def pair(teacher: GaussianTeacher, exact: bool, start: float) -> tuple[Student, Inverter]:
    """Student and inverter; exact, or of plain DDIM steps."""
    nets = [ExactJumps(teacher, up) if exact else Asked(teacher) for up in (False, True)]
    kind = "x0" if exact else "velocity"
    student = Student(Sampler(EDGES, Ddim()), nets[0], teacher.schedule, kind)
    return student, Inverter(tuple(reversed(EDGES)), start, nets[1], teacher.schedule, kind)


def real(teacher: GaussianTeacher, n: int = 64) -> tuple[Tensor, dict[str, Tensor]]:
    """Data and their labels."""
    cond = {"labels": torch.arange(n) % 2}
    return teacher.sample(n, torch.Generator().manual_seed(1), cond, dtype=torch.float64), cond


# Closed forms


@SCHEDULES
@pytest.mark.parametrize(("t", "s", "c"), [(0.8, 0.3, 0.7), (0.2, 0.5, 0.36), (1.0, 0.05, 1.9)])
def test_a_ddim_step_and_back_contracts_by_its_closed_form(schedule: Schedule, t: float, s: float, c: float) -> None:
    """``1 - c^2 (alpha_t sigma_s - alpha_s sigma_t)^2 / (V_t V_s)``, below 1 in either order."""
    teacher = GaussianTeacher(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3], [[c * c]])), schedule)
    (a_t, a_s), (b_t, b_s) = (v.tolist() for v in schedule(torch.tensor([t, s], dtype=torch.float64))[:2])
    expected = 1 - (c * (a_t * b_s - a_s * b_t)) ** 2 / ((a_t**2 * c**2 + b_t**2) * (a_s**2 * c**2 + b_s**2))
    low, high = min(t, s), max(t, s)
    student = Student(Sampler((1.0,), Ddim()), Asked(teacher), schedule, "velocity")
    inverter = Inverter((1.0,), 0.01, Asked(teacher), schedule, "velocity")
    x = torch.tensor([[1.7]], dtype=torch.float64)
    up = inverter.rise(x, at(low, x), at(high, x), {})
    c_high, c_low = schedule.coeffs(at(high, x), x), schedule.coeffs(at(low, x), x)
    x0 = student(up, at(high, x), {})
    back = c_low.alpha * x0 + c_low.sigma / c_high.sigma * (up - c_high.alpha * x0)
    centre = c_low.alpha * 0.3
    assert ((back - centre) / (x - centre)).item() == pytest.approx(expected, rel=1e-9) and expected < 1


@SCHEDULES
def test_ddim_inversion_loses_what_its_contractions_say(schedule: Schedule) -> None:
    """Along each principal axis the round trip multiplies by the product of all steps, up and down."""
    teacher, start = two_classes(schedule), 0.02
    x0, cond = real(teacher)
    student, inverter = pair(teacher, exact=False, start=start)
    back = edit(student, inverter, x0, cond, cond)
    up, down = (torch.tensor(g, dtype=torch.float64) for g in ((start, *reversed(EDGES)), (*EDGES, 0.0)))
    factor = schedule(up[:1]).alpha
    for grid in (up, down):
        factor = factor * teacher.ddim_contraction(grid[:-1], grid[1:]).prod(0)
    mean = teacher.means[cond["labels"]]
    torch.testing.assert_close((back - mean) @ teacher.axes, factor * ((x0 - mean) @ teacher.axes))
    assert factor.max() < 0.8


@SCHEDULES
def test_an_exact_inverter_finds_the_noise_and_an_exact_student_the_way_back(schedule: Schedule) -> None:
    teacher = two_classes(schedule)
    x0, cond = real(teacher)
    student, inverter = pair(teacher, exact=True, start=1e-3)
    noise = invert(inverter, x0, cond)
    exact = teacher.flow_map(x0, at(0.0, x0), at(1.0, x0), cond)
    torch.testing.assert_close(noise, exact, rtol=0, atol=5e-3)
    torch.testing.assert_close(edit(student, inverter, x0, cond, cond), x0, rtol=0, atol=5e-3)
    rough = invert(pair(teacher, exact=True, start=1e-2)[1], x0, cond)
    assert (noise - exact).abs().max() < (rough - exact).abs().max() / 5  # the start's variance


def test_the_noise_is_what_sampling_starts_from_where_noise_is_not_of_size_one() -> None:
    teacher = two_classes(EDM(80.0))
    x0, cond = real(teacher)
    student, inverter = pair(teacher, exact=True, start=1e-4)
    noise = invert(inverter, x0, cond)
    torch.testing.assert_close(80 * noise, teacher.flow_map(x0, at(0.0, x0), at(80.0, x0), cond), rtol=0, atol=0.2)
    back = student.sampler.run(student, noise, cond, torch.Generator())
    torch.testing.assert_close(back, x0, rtol=0, atol=5e-3)


@SCHEDULES
def test_editing_moves_the_mean_and_keeps_the_noise(schedule: Schedule) -> None:
    """Of two Gaussians of one covariance: ``x0 - m_a + m_b`` but for the mean that the noise level 1 still shows."""
    teacher = two_classes(schedule)
    x0, a = real(teacher)
    b = {"labels": 1 - a["labels"]}
    student, inverter = pair(teacher, exact=True, start=1e-3)
    edited = edit(student, inverter, x0, a, b)
    left = schedule(torch.ones(1, dtype=torch.float64)).alpha.item()  # of the data at t = 1
    shift = teacher.means[b["labels"]] - teacher.means[a["labels"]]
    torch.testing.assert_close(edited, x0 + shift, rtol=0, atol=5e-3 + 2 * left)
    assert (invert(inverter, edited, b) - invert(inverter, x0, a)).abs().max() < 5e-3


@SCHEDULES
@pytest.mark.parametrize("below", [0.5, 0.4, 0.0, 1.0])
def test_dynamic_guidance_acts_at_calls_below_its_level_alone(schedule: Schedule, below: float) -> None:
    """Guidance leaves a Gaussian a Gaussian of another mean, so the guided way down is a chain of exact maps."""
    teacher, scale = two_classes(schedule), 3.0
    x0, a = real(teacher, 8)
    b = {"labels": 1 - a["labels"]}
    student, inverter = pair(teacher, exact=True, start=1e-3)
    edited = edit(Guided(student, scale, told=True, interval=(0.0, below or 1e-9)), inverter, x0, a, b)
    noise = invert(inverter, x0, a)
    for row in range(8):
        x = noise[row : row + 1]
        for high, low in zip(EDGES, (*EDGES[1:], 0.0), strict=True):
            law = teacher.given(int(b["labels"][row]), scale if high <= below else 1.0)
            x = law.flow_map(x, at(high, x), at(low, x))
        torch.testing.assert_close(edited[row : row + 1], x, rtol=0, atol=1e-5)


def test_a_student_that_is_not_told_is_guided_by_a_null_condition() -> None:
    teacher = two_classes(RectifiedFlow())
    x0, a = real(teacher, 8)
    b = {"labels": 1 - a["labels"]}
    student, inverter = pair(teacher, exact=False, start=0.02)
    null = {"labels": torch.tensor([teacher.null])}
    edited = edit(Guided(student, 3.0, null), inverter, x0, a, b)
    one = teacher.given(int(b["labels"][0]), 3.0)  # of a guided Gaussian a plain one's DDIM
    plain = Student(student.sampler, Asked(one), teacher.schedule, "velocity")
    aim = plain.sampler.run(plain, invert(inverter, x0, a), {}, torch.Generator())
    torch.testing.assert_close(edited[0::2], aim[0::2])


# Bad input


@pytest.mark.parametrize("edges", [(), (0.5,), (0.5, 0.5, 1.0), (0.01, 1.0), (1.0, 0.5)])
def test_edges_that_do_not_rise_to_the_noise_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must rise from above its start"):
        Inverter(edges, 0.02, nn.Identity(), RectifiedFlow(), "x0")


@pytest.mark.parametrize(
    ("sampler", "complaint"),
    [
        (Sampler((1.0, 0.5), Ddim()), r"the student jumps from \[1.0, 0.5\] and the inverter to \[0.2"),
        (Sampler(EDGES, Renoise()), "does not invert"),
        (Sampler(EDGES, Tcd(0.3)), "does not invert"),
    ],
)
def test_two_networks_that_are_no_pair_are_refused(sampler: Sampler, complaint: str) -> None:
    teacher = two_classes(RectifiedFlow())
    x0, cond = real(teacher)
    student, inverter = pair(teacher, exact=False, start=0.02)
    student.sampler = sampler
    with pytest.raises(ValueError, match=complaint):
        edit(student, inverter, x0, cond, cond)


@pytest.mark.parametrize("rule", [Ddim(), Tcd(0.0)])
def test_rules_without_noise_are_one(rule: StepRule) -> None:
    teacher = two_classes(DiscreteVP.linear())
    x0, cond = real(teacher)
    student, inverter = pair(teacher, exact=False, start=0.02)
    plain = edit(student, inverter, x0, cond, cond)
    student.sampler = Sampler(EDGES, rule)
    assert torch.equal(edit(student, inverter, x0, cond, cond), plain)


# A run's folder

TINY = find("digits_icd@2")
TINY = replace(TINY, run=replace(TINY.run, steps=3, batch=8, ema=0.0, log_every=1, save_every=2), evaluation=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distilled]:
    """A finished run."""
    out = tmp_path_factory.mktemp("run") / "icd"
    return out, distill(TINY, out)


def digits() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Real digits, what they show, and what they shall show."""
    held_out = load_digits("heldout")
    labels = held_out.labels[:8]
    return held_out.images[:8], {"class_labels": labels}, {"class_labels": (labels + 1) % 10}


def inverter_of(recipe: Recipe, out: Path) -> Inverter:
    """As the last checkpoint has it."""
    trainer = build(recipe, out=out).trainer
    trainer.resume()
    return trainer.nets["inverter"]


def test_an_inverter_is_kept_in_checkpoints_and_exported_beside_its_student(run: tuple[Path, Distilled]) -> None:
    out, done = run
    student = load_student(out / "pipeline")
    inverter = load_inverter(out / "pipeline", student)
    assert inverter.edges == (0.5, 1.0) and inverter.start == 0.01 and not inverter.training
    kept, state = inverter_of(TINY, out), inverter.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in kept.net.state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in student.net.state_dict().items())  # both moved

    x0, source, target = digits()
    torch.testing.assert_close(invert(inverter, x0, source), invert(kept, x0, source))
    edited = edit(student, inverter, x0, source, target)
    assert edited.shape == x0.shape and bool(edited.isfinite().all())
    assert not torch.allclose(edited, edit(student, inverter, x0, source, source))
    assert "load_inverter" in (out / "pipeline" / "README.md").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"reverse/loss", "forward/loss", "forward_preservation/loss", "reverse_preservation/loss"} < lines[0].keys()
    assert torch.equal(done.student.sample((8, 1, 8, 8), source), student.sample((8, 1, 8, 8), source))


def test_adapters_for_both_ways_share_one_network_and_are_exported_merged(tmp_path: Path) -> None:
    recipe = replace(TINY, student=Weights(form="lora", rank=2, targets=("conv1", "conv2")))
    distill(recipe, tmp_path / "run")
    kept = inverter_of(recipe, tmp_path / "run")
    trained = build(recipe).trainer.nets
    assert trained.student.net.backbone is trained["inverter"].net.backbone
    inverter = load_inverter(tmp_path / "run/pipeline", load_student(tmp_path / "run/pipeline"))
    x0, source, _ = digits()
    torch.testing.assert_close(invert(inverter, x0, source), invert(kept, x0, source), rtol=1e-4, atol=1e-4)


def test_what_is_missing_or_damaged_is_one_clear_line(run: tuple[Path, Distilled], tmp_path: Path) -> None:
    out, done = run
    shutil.copytree(out / "pipeline", tmp_path / "copy")
    folder, student = tmp_path / "copy" / "inverter", load_student(out / "pipeline")
    (folder / "inverter.json").write_text('{"edges": [0.5, "1"], "start": 0.01}')
    with pytest.raises(ValueError, match="no edges and start in it"):
        load_inverter(tmp_path / "copy", student)
    (folder / "inverter.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"inverter\.json is missing"):
        load_inverter(tmp_path / "copy", student)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="trained without an inverter"):
        load_inverter(tmp_path / "copy", student)
    broken = Inverter.beside(student, 0.01)
    with torch.no_grad():
        next(broken.net.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"of the inverter is not finite"):
        save_pipeline(student, done.opened, tmp_path / "new", inverter=broken)
    assert not (tmp_path / "new").exists()


def test_the_recipe_serves_one_two_four_and_eight_steps() -> None:
    for steps in (1, 2, 4, 8):
        recipe = find(f"digits_icd@{steps}")
        assert isinstance(recipe.objective, ICD) and recipe.sampler.times == trailing(steps)
    with pytest.raises(ValueError, match="steps must be 1, 2, 4 or 8; got 3"):
        find("digits_icd@3")
