"""Health measures what it says, leaves the run as it is, and says the same after a resume."""

from __future__ import annotations

import json
import math
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from stepdistill.build import build, guided, open_teacher
from stepdistill.data import DigitsData
from stepdistill.health import BEYOND, FILE, Health, spread, teacher_sampler
from stepdistill.models.families import Opened
from stepdistill.objective import Batch, Step
from stepdistill.objectives import DMD2
from stepdistill.parts.gan import Gan
from stepdistill.placement import Placement
from stepdistill.recipe import Recipe, Teacher
from stepdistill.sampling import Sampler, trailing
from stepdistill.schedule import EDM, RectifiedFlow
from stepdistill.symptoms import Curves, Finding
from stepdistill.trainer import AdamW, Run, Trainer
from tests.processes import together

RECIPE = Recipe(
    teacher=Teacher("bundled:digits"),
    objective=DMD2(student_every=1, gan=Gan(weight=0.0)),
    data=DigitsData(),
    optim={name: AdamW(1e-4) for name in ("student", "critic")},
    sampler=Sampler(trailing(2)),
    run=Run(steps=5, batch=4, log_every=2, save_every=2, health_every=2, ema=0.5),
)
pytestmark = pytest.mark.filterwarnings("ignore:step .* the student collapses:UserWarning")  # it has just begun
COND = {"class_labels": torch.tensor([3, 7, 3, 7])}
"""Two samples of each of two digits."""


@pytest.fixture(scope="module")
def opened() -> Opened:
    """The bundled teacher."""
    return open_teacher(RECIPE.teacher)


def trainer_of(opened: Opened, out: Path, every: int = 2) -> Trainer:
    """As ``distill`` makes it, from the newest checkpoint."""
    recipe = replace(RECIPE, run=replace(RECIPE.run, health_every=every))
    trainer = build(recipe, opened=opened, out=out).trainer
    trainer.resume()
    if every:
        trainer.health = Health(opened, COND, 2, 2, out, steps=5, done=trainer.index)
    return trainer


@pytest.fixture(scope="module")
def whole(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A finished run."""
    out = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(opened, out)
    trainer.fit()
    return trainer, out


# What is measured


def test_spread_is_the_deviation_of_independent_numbers() -> None:
    x = 3 * torch.randn(8 * 2, 1, 30, 40)
    x[::2] += 100  # conditions that differ do not count
    assert_close(spread(x, 2), 3.0, rtol=0.02, atol=0)
    assert spread(x[:2].repeat(8, 1, 1, 1), 2) == 0


def test_the_first_line_says_that_critic_and_student_are_the_teacher(whole: tuple[Trainer, Path]) -> None:
    lines = [json.loads(line) for line in (whole[1] / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    first = lines[0]
    assert first["start_gap"] == first["average_gap"] == 0 and first["critic_error"] == first["teacher_error"] > 0
    assert all("start_gap" not in line and line["average_gap"] > 0 for line in lines[1:])
    assert all(line["critic_error"] != line["teacher_error"] for line in lines[1:])
    assert len({line["teacher_diversity"] for line in lines}) == 1
    assert all(line["saturation"] == 0 for line in lines)  # digits are grey


def test_a_student_that_is_not_its_teacher_at_the_start_shows(opened: Opened, tmp_path: Path) -> None:
    trainer = trainer_of(opened, tmp_path)
    with torch.no_grad():
        trainer.nets.student.net.conv_out.weight.mul_(1.5)
    assert trainer.health(trainer.nets, 0)["start_gap"] > 0.05


def test_samples_that_are_not_finite_are_a_figure_and_a_warning(opened: Opened, tmp_path: Path) -> None:
    trainer = trainer_of(opened, tmp_path)
    trainer.health(trainer.nets, 0)
    with torch.no_grad():
        trainer.nets.student.net.conv_out.bias.fill_(math.nan)
    with pytest.warns(UserWarning, match="step 3: NaN or infinity: diversity is nan at step 3 in health.jsonl"):
        assert math.isnan(trainer.health(trainer.nets, 3)["contrast"])


def test_values_beyond_the_teachers_are_counted(opened: Opened, tmp_path: Path) -> None:
    trainer = trainer_of(opened, tmp_path)
    health: Health = trainer.health
    figures = health(trainer.nets, 0)
    sampled = health._samples
    health._samples = lambda predict, sampler, device: 3 * sampled(predict, sampler, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tripled = health(trainer.nets, 3)
    mine = sampled(trainer.nets.student, trainer.nets.student.sampler, torch.device("cpu"))
    expected = float((3 * mine.abs() > BEYOND * figures["teacher_largest"]).double().mean())
    assert figures["outside"] == 0 and tripled["outside"] == expected > 0.2
    assert_close(tripled["diversity"], 3 * figures["diversity"])


def test_the_teacher_is_sampled_at_its_own_noise_levels(opened: Opened) -> None:
    """On EDM's path even times would end at sigma 5 of 80, a blur."""
    edm = teacher_sampler(EDM())
    assert edm.steps == 16 and edm.times[0] == pytest.approx(1) and edm.times[-1] * EDM().t_max < 0.01
    assert teacher_sampler(RectifiedFlow()).times == trailing(16)


# What it leaves alone


def test_a_run_is_the_same_bit_for_bit_with_health_and_without(
    opened: Opened, whole: tuple[Trainer, Path], tmp_path: Path
) -> None:
    torch.manual_seed(5)  # whoever draws from the global stream within training would show here
    plain = trainer_of(opened, tmp_path, every=0)
    plain.fit()
    assert not (tmp_path / FILE).exists()
    one, other = whole[0].nets.trainable_state(), plain.nets.trainable_state()
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole[1] / "metrics.jsonl").read_bytes()


def test_health_leaves_the_global_stream_of_random_numbers(opened: Opened, tmp_path: Path) -> None:
    trainer = trainer_of(opened, tmp_path)
    before = torch.random.get_rng_state()
    decode = opened.family.decode

    def drawing(pipeline: object, samples: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        return decode(pipeline, samples)

    trainer.health.opened = replace(opened, family=replace(opened.family, decode=drawing))
    trainer.health(trainer.nets, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_writes_the_same_lines(
    stop: int, opened: Opened, whole: tuple[Trainer, Path], tmp_path: Path
) -> None:
    first = trainer_of(opened, tmp_path)
    first.data = stopping(first.data, stop)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    with (tmp_path / FILE).open("a") as file:  # what a later crash may have left
        file.write(('{"step": 4, "diversity": 1.0}\n' if stop < 4 else "") + '{"step": 5, "div')
    trainer_of(opened, tmp_path).fit()
    assert (tmp_path / FILE).read_bytes() == (whole[1] / FILE).read_bytes()


def stopping(data: Callable[[Step], Batch], index: int) -> Callable[[Step], Batch]:
    """A source that presses ^C at ``index``."""

    def source(step: Step) -> Batch:
        if step.index == index:
            signal.raise_signal(signal.SIGINT)
        return data(step)

    return source


def watched(folder: Path) -> list[list[dict[str, float]]]:
    """What each call of health returns in this process: of a run of two steps, and of one with networks in shards."""
    torch.set_num_threads(1)
    opened = open_teacher(RECIPE.teacher)
    found = []
    for shard in (False, True):
        recipe = replace(RECIPE, run=replace(RECIPE.run, steps=2, health_every=1), placement=Placement(shard=shard))
        out, figures = folder / f"sharded {shard}", []
        trainer = build(recipe, opened=opened, out=out).trainer
        health = Health(opened, COND, 2, 2, out, steps=2)
        trainer.health = lambda nets, index, do=health, figures=figures: figures.append(do(nets, index)) or figures[-1]
        trainer.fit()
        found.append(figures)
    return found


def test_two_processes_measure_the_same_and_one_writes(tmp_path: Path) -> None:
    both = together(2, watched, tmp_path)
    for shard, one, other in zip((False, True), *both, strict=True):
        lines = [json.loads(line) for line in (tmp_path / f"sharded {shard}" / FILE).read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2] and len(one) == 3
        for mine, theirs, line in zip(one, other, lines, strict=True):
            assert mine == theirs == {k: line[k] for k in mine}
    # the critic learns from the same global batch whole and in shards
    assert both[0][0][2]["critic_error"] == pytest.approx(both[0][1][2]["critic_error"], rel=1e-4)


# What it says


def test_a_symptom_is_warned_about_once_and_kept_in_its_line(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ill(curves: Curves) -> list[Finding]:
        last = curves.health[-1]["step"]
        return [Finding("ill", "the student is ill", f"step {last}", "a test", "wait")] if last >= 2 else []

    monkeypatch.setattr("stepdistill.health._WATCHED", (ill,))
    trainer = trainer_of(opened, tmp_path)
    with pytest.warns(UserWarning, match="step 2: the student is ill") as seen:
        trainer.fit()
    assert len(seen) == 1
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line.get("warnings", {}).keys() for line in lines] == [set(), {"ill"}, set(), set()]


def test_a_run_that_stops_early_is_measured_there_once(opened: Opened, tmp_path: Path) -> None:
    trainer = trainer_of(opened, tmp_path)
    trainer.watch = lambda student, index: index >= 2
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]


def test_a_line_that_cannot_be_written_says_so(opened: Opened, tmp_path: Path) -> None:
    trainer = trainer_of(opened, tmp_path)
    (tmp_path / FILE).mkdir()
    with pytest.raises(OSError, match=r"could not write .*health.jsonl.*the last checkpoint is intact"):
        trainer.fit()


def test_figures_reach_the_trackers(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[int, list[str]] = {}
    monkeypatch.setattr(
        "stepdistill.trainer.Trackers.log", lambda self, means, index: logged.setdefault(index, []).extend(means)
    )
    trainer_of(opened, tmp_path).fit()
    assert all("health/diversity" in logged[index] for index in (0, 2, 4, 5))


def test_guided_teachers_are_the_reference(opened: Opened, tmp_path: Path) -> None:
    """The student learns the guided distribution, so guidance must not look like a collapse."""
    trainer = trainer_of(opened, tmp_path)
    plain = trainer.health(trainer.nets, 0)
    other = trainer_of(opened, tmp_path / "guided")
    other.nets["teacher"] = guided(opened, Teacher("bundled:digits", guidance=5.0))
    strong = other.health(other.nets, 0)
    assert strong["teacher_diversity"] < plain["teacher_diversity"]
    assert strong["teacher_error"] == plain["teacher_error"]  # of the unguided network, as critics are
