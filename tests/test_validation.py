"""Evaluation within training: same weights with and without, same lines after a resume, the best kept, early stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill.data import TeacherPairs, load_digits
from stepdistill.distill import distill, evaluate_and_report
from stepdistill.evaluation.benchmark import all_pictures, arithmetic
from stepdistill.evaluation.features import Pixels, to_uint8
from stepdistill.evaluation.metrics import MeanCov, frechet_distance
from stepdistill.evaluation.statistics_files import save_statistics
from stepdistill.export import load_student
from stepdistill.logging import read_lines
from stepdistill.objectives import KD
from stepdistill.recipe import Evaluation, Recipe, Teacher, Weights
from stepdistill.sampling import Sampler, trailing
from stepdistill.trainer import AdamW, Run, Trainer
from stepdistill.validation import SEED, Validation, best_file, best_of, check_metric, restore_best

PLAN = Evaluation(n=20, teacher_steps=(1,), every=2, keep_best="fd")
RECIPE = Recipe(
    Teacher("bundled:digits"),
    KD(),
    TeacherPairs(8, solver=Sampler(trailing(2))),
    {"student": AdamW(1e-3)},
    Sampler(trailing(1)),
    Run(steps=6, batch=4, log_every=1, save_every=1, ema=0.5),
    evaluation=PLAN,
)


class Net(nn.Module):
    """A student whose one weight is the step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))


def walk(validation: Validation, student: Net, first: int, steps: int) -> int:
    """What a trainer does: the steps done when it stopped."""
    for index in range(first, steps + 1):
        student.w.data.fill_(index)
        if validation(student, index):
            return index
    return steps


def scripted(values: dict[int, float], asked: list[int] | None = None):
    """Scores by step."""

    def scores(student: Net) -> dict[str, float]:
        if asked is not None:
            asked.append(int(student.w))
        return {"fd": values[int(student.w)], "recall": -values[int(student.w)]}

    return scores


CURVE = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 1.0}


@pytest.mark.parametrize(("metric", "best"), [("fd", 4), ("recall", 4)])
def test_training_stops_when_patience_is_spent_and_the_best_is_kept(tmp_path: Path, metric: str, best: int) -> None:
    plan, student = replace(PLAN, keep_best=metric, patience=2), Net()
    assert walk(Validation(plan, scripted(CURVE), tmp_path, 10, 0), student, 0, 10) == 8
    assert [line["step"] for line in read_lines(tmp_path / "evaluations.jsonl")] == [0, 2, 4, 6, 8]
    assert restore_best(plan, tmp_path, student) == best and float(student.w.detach()) == best
    assert [path.name for path in (tmp_path / "best").iterdir()] == [f"{best:08d}.safetensors"]


def test_without_patience_it_goes_on_and_the_last_step_is_measured(tmp_path: Path) -> None:
    asked: list[int] = []
    student = Net()
    assert walk(Validation(PLAN, scripted(CURVE | {5: 2.0}, asked), tmp_path, 5, 0), student, 0, 5) == 5
    assert asked == [0, 2, 4, 5] and restore_best(PLAN, tmp_path, student) == 5


@pytest.mark.parametrize("stopped", [0, 3, 4, 7])
def test_an_interrupted_run_has_the_lines_and_weights_of_one_that_was_not(tmp_path: Path, stopped: int) -> None:
    plan = replace(PLAN, patience=2)
    whole, part = tmp_path / "whole", tmp_path / "part"
    walk(Validation(plan, scripted(CURVE), whole, 10, 0), Net(), 0, 10)
    (part / "checkpoints").mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, part / "checkpoints" / f"{stopped:08d}.safetensors")
    walk(Validation(plan, scripted(CURVE), part, 10, 0), Net(), 0, 6)  # killed after 6, its checkpoint is older
    with (part / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 8, "fd"')
    again: list[int] = []
    resumed = Validation(plan, scripted(CURVE, again), part, 10, stopped)
    assert best_file(part, resumed.best_step()).is_file() if resumed.lines else not stopped
    assert walk(resumed, Net(), stopped, 10) == 8
    assert (part / "evaluations.jsonl").read_text() == (whole / "evaluations.jsonl").read_text()
    assert all(step > stopped for step in again)  # nothing is measured twice
    a, b = Net(), Net()
    assert restore_best(plan, whole, a) == restore_best(plan, part, b) == 4 and torch.equal(a.w, b.w)


def test_a_run_that_stopped_early_stays_stopped_when_it_is_resumed(tmp_path: Path) -> None:
    plan = replace(PLAN, patience=2)
    walk(Validation(plan, scripted(CURVE), tmp_path, 10, 0), Net(), 0, 10)
    assert walk(Validation(plan, scripted({}), tmp_path, 10, 8), Net(), 8, 10) == 8


def test_of_equals_the_first_is_best() -> None:
    lines = [{"step": 0, "fd": 2.0}, {"step": 5, "fd": 1.0}, {"step": 9, "fd": 1.0}]
    assert best_of(lines, "fd") == 5 and best_of(lines, "") == 9
    assert best_of([line | {"recall": -line["fd"]} for line in lines], "recall") == 5


def test_metrics_and_weights_that_cannot_serve_are_named(tmp_path: Path) -> None:
    check_metric("")
    check_metric("fd")
    with pytest.raises(ValueError, match="keep_best: 'recll' has no known direction; did you mean 'recall'"):
        check_metric("recll")
    with pytest.raises(ValueError, match="keep_best: 'kid' is not measured here; there are fd, recall"):
        Validation(replace(PLAN, keep_best="kid"), scripted(CURVE), tmp_path, 10, 0)(Net(), 0)
    walk(Validation(PLAN, scripted(CURVE), tmp_path, 4, 0), Net(), 0, 4)
    best_file(tmp_path, 4).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"00000004\.safetensors is damaged .* train anew"):
        restore_best(PLAN, tmp_path, Net())
    best_file(tmp_path, 4).unlink()
    with pytest.raises(FileNotFoundError, match=r"00000004\.safetensors is missing: the best weights by fd"):
        restore_best(PLAN, tmp_path, Net())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, "evaluation.every must be at least 0; got -1"),
        ({"keep_best": "fd"}, "evaluation.keep_best 'fd' needs evaluation.every"),
        ({"every": 5, "patience": 2}, "evaluation.patience 2 needs evaluation.keep_best"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**settings)
    with pytest.raises(ValueError, match="seeds must be different numbers"):
        Evaluation(seeds=(SEED,))


# Within real runs


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Everybody's state in the newest checkpoint."""
    return load_file(sorted((run / "checkpoints").glob("*.safetensors"))[-1])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated on the way."""
    out = tmp_path_factory.mktemp("watched") / "run"
    distill(RECIPE, out)
    return out


def test_evaluation_disturbs_no_weight(watched: Path, tmp_path: Path) -> None:
    distill(replace(RECIPE, evaluation=None), tmp_path / "run")
    mine, plain = weights(watched), weights(tmp_path / "run")
    assert mine.keys() == plain.keys() and all(torch.equal(mine[k], plain[k]) for k in mine)


def test_the_best_is_exported_and_its_lines_are_a_curve_of_the_report(watched: Path) -> None:
    lines = read_lines(watched / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    best = min(lines, key=lambda line: line["fd"])["step"]
    kept = load_file(best_file(watched, best))
    exported = load_student(watched / "pipeline").state_dict()
    assert all(torch.equal(kept[name], exported[name]) for name in exported)
    done = distill(RECIPE, watched, resume=True)
    evaluate_and_report([("student", RECIPE, done)], watched, title="t")
    page = (watched / "report" / "index.html").read_text()
    assert "Quality during training" in page and f"The student is that of step {best}, the best by FD." in page


def test_a_resumed_run_has_the_same_lines(watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def stopped(self: Trainer, index: int):
        if index == 3:
            raise KeyboardInterrupt
        return step(self, index)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill(RECIPE, tmp_path / "run")
    monkeypatch.undo()
    distill(RECIPE, tmp_path / "run", resume=True)
    for name in ("evaluations.jsonl", "metrics.jsonl", "pipeline/unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (watched / name).read_bytes()


def test_the_best_adapters_are_kept_too(tmp_path: Path) -> None:
    plan = replace(PLAN, keep_best="pix", every=3)
    recipe = replace(RECIPE, student=Weights("lora", rank=2, targets=("conv1", "conv2")), evaluation=plan)
    done = distill(recipe, tmp_path / "run")
    best = best_of(read_lines(tmp_path / "run" / "evaluations.jsonl"), "pix")
    state = done.student.state_dict()
    kept = load_file(best_file(tmp_path / "run", best))
    assert kept.keys() == state.keys() and all(torch.equal(kept[name], state[name]) for name in state)


JUDGE = """
import torch
from stepdistill.evaluation.evaluator import FeatureEvaluator
from stepdistill.evaluation.features import Pixels
from stepdistill.evaluation.reference import Reference

def judge(opened, n):
    return FeatureEvaluator(Pixels(8, 8), Reference.of_file(STATISTICS), labels=torch.arange(n) % 10)

def short(opened, n):
    return FeatureEvaluator(Pixels(8, 8), Reference.of_file(STATISTICS), n=3, k=1)
"""


@pytest.mark.filterwarnings("ignore:.* images for 64 features")
def test_a_judge_of_ones_own_evaluates_on_the_way_and_at_the_end(tmp_path: Path) -> None:
    """Fréchet distances of grey values to stored statistics; the best line is the exported student's own number."""
    images = to_uint8(load_digits("train").images)
    real = MeanCov.of(Pixels(8, 8)(images))
    save_statistics(tmp_path / "real.npz", real)
    (tmp_path / "judge.py").write_text(f"STATISTICS = {str(tmp_path / 'real.npz')!r}\n{JUDGE}")
    plan = replace(PLAN, judge=f"{tmp_path / 'judge.py'}:judge", keep_best="frechet")
    recipe, out = replace(RECIPE, evaluation=plan), tmp_path / "run"
    done = distill(recipe, out)
    lines = read_lines(out / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6] and set(lines[0]) == {"step", "frechet"}
    best = best_of(lines, "frechet")
    labels = done.opened.family.cond(done.opened.denoiser.net, {"labels": torch.arange(20) % 10})
    pictures = all_pictures(done.student, done.student.sampler, done.opened, labels, 20, seed=SEED)
    expected = frechet_distance(real, MeanCov.of(Pixels(8, 8)(pictures)))
    assert min(line["frechet"] for line in lines) == pytest.approx(expected, rel=1e-4)
    records = evaluate_and_report([("student", recipe, done)], out, title="t")
    assert {r.metric for r in records} == {"frechet", "seconds_per_image"} and {r.dtype for r in records} == {"float32"}
    assert (
        f"The student is that of step {best}, the best by Fréchet distance." in (out / "report/index.html").read_text()
    )
    for judge, message in (
        ("short", "judges n = 3 images, and is asked for n = 20"),
        ("jugde", "no function jugde in"),
    ):
        wrong = replace(plan, judge=f"{tmp_path / 'judge.py'}:{judge}")
        with pytest.raises(ValueError, match=message):
            distill(replace(RECIPE, evaluation=wrong), tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.py"):
        distill(replace(RECIPE, evaluation=replace(plan, judge=f"{tmp_path / 'none.py'}:judge")), tmp_path / "other")
    with pytest.raises(ValueError, match=r"evaluation.judge must be file\.py:function"):
        replace(plan, judge="judge")
    assert not (tmp_path / "other").exists()


def test_students_are_measured_in_float32_whatever_they_were_trained_in(tmp_path: Path) -> None:
    """As their teacher, and as what was exported is; the table would refuse two dtypes in one column."""
    run = replace(RECIPE.run, dtype="bfloat16", steps=1)
    recipe = replace(RECIPE, run=run, evaluation=None)
    fresh, read_back = (distill(recipe, tmp_path / "run").student for _ in range(2))
    assert arithmetic(fresh) == arithmetic(read_back) == "float32"
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5)
    cond = {"class_labels": torch.tensor([1, 2])}
    assert torch.equal(fresh(x, t, cond), read_back(x, t, cond))


def test_bad_metrics_are_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'density' has no known direction"):
        distill(replace(RECIPE, evaluation=replace(PLAN, keep_best="density")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_older_runs_recipe_without_the_new_fields_is_the_same_recipe(watched: Path, tmp_path: Path) -> None:
    plain = replace(RECIPE, evaluation=Evaluation(n=20, teacher_steps=(1,)))
    distill(plain, tmp_path / "run")
    stored = json.loads(plain.to_json())
    for name in ("every", "keep_best", "patience"):
        del stored["evaluation"][name]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(stored))
    assert distill(plain, tmp_path / "run", resume=True).pipeline.is_dir()
