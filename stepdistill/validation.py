"""Evaluation within training: the benchmark at intervals on the averaged student, the best kept, an early stop.

Everything is decided from the lines of ``evaluations.jsonl``, so a resumed run decides as one that was never stopped.
Noise comes from a seed that no final evaluation may use: a student chosen on a seed looks better there than it is.
Several processes all measure the same student on the same noise, and one of them writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill import distributed
from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.benchmark import all_pictures, conditions, evaluator_for
from stepdistill.evaluation.columns import METRICS, metric_info
from stepdistill.logging import Line, read_lines
from stepdistill.models.families import Opened
from stepdistill.recipe import Evaluation, suggest
from stepdistill.student import Student
from stepdistill.trainer import due

SEED = 2**31
"""Of the noise; ``Evaluation.seeds`` end below."""
FILE = "evaluations.jsonl"
FOLDER = "best"

Scores = dict[str, float]


def check_metric(metric: str) -> None:
    """Make sure that it is known which way a metric gets better.

    Raises:
        ValueError: if not.
    """
    known = [name for name, info in METRICS.items() if info.better and name != "seconds_per_image"]
    if metric and metric not in known:
        raise ValueError(f"evaluation.keep_best: {metric!r} has no known direction{suggest(metric, known)}")


class Validation:
    """What a trainer asks after every step: measures when it is due, keeps the best, says when to stop.

    Args:
        plan: how often, by which metric, with how much patience.
        scores: measures a student; every metric.
        folder: the run's; gets evaluations.jsonl and, with ``keep_best``, best/STEP.safetensors.
        steps: of training; the last one is measured too.
        done: steps done so far. What stands in the file behind them is dropped, as it will come again.
    """

    def __init__(self, plan: Evaluation, scores: Callable[[Student], Scores], folder: Path, steps: int, done: int):
        self.plan, self.scores, self.folder, self.steps = plan, scores, folder, steps
        self.lines = [line for line in read_lines(folder / FILE) if line["step"] <= done]
        if (folder / FILE).exists() and distributed.is_main():
            self._write()

    def __call__(self, student: Student, index: int) -> bool:
        """Measure ``student`` after ``index`` steps, if that is due and was not done; whether training should stop."""
        if not (due(index, self.plan.every) or index == self.steps):
            return False
        if all(line["step"] != index for line in self.lines):
            self._measure(student, index)
        return 0 < self.plan.patience <= sum(line["step"] > self.best_step() for line in self.lines)

    def best_step(self) -> int:
        """The first step with the best value of ``keep_best``."""
        return best_of(self.lines, self.plan.keep_best)

    def _measure(self, student: Student, index: int) -> None:
        training = student.training
        with torch.random.fork_rng():  # training draws from its own generators; whoever does not is not disturbed
            found = self.scores(student.eval())
        student.train(training)
        if self.plan.keep_best and self.plan.keep_best not in found:
            metric = self.plan.keep_best
            raise ValueError(f"evaluation.keep_best: {metric!r} is not measured here{suggest(metric, found)}")
        self.lines.append({"step": index, **found})
        if not distributed.is_main():
            return
        if self.plan.keep_best and self.best_step() == index:
            state = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
            write_atomically(best_file(self.folder, index), lambda aside: save_file(state, aside))
        self._write()  # after the weights, so that a line's weights are there
        self._prune()

    def _write(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(self.folder / FILE, lambda aside: aside.write_text(text))

    def _prune(self) -> None:
        """Drop weights that are best neither now nor where a checkpoint would take up the run again."""
        ends = [int(path.stem) for path in (self.folder / "checkpoints").glob("[0-9]*.safetensors")]
        before = [[line for line in self.lines if line["step"] <= end] for end in ends]
        needed = {best_of(lines, self.plan.keep_best) for lines in (self.lines, *before) if lines}
        for path in (self.folder / FOLDER).glob("[0-9]*.safetensors"):
            if int(path.stem) not in needed:
                path.unlink()


def validation_of(
    plan: Evaluation, opened: Opened, folder: Path, *, steps: int, done: int, told: float | None
) -> Validation:
    """The plan's own judge, or the benchmark that fits the teacher, to be asked during training.

    Args:
        plan: see ``Validation``, as for folder, steps and done.
        opened: the teacher.
        folder: the run's.
        steps: of training.
        done: steps done so far.
        told: the guidance scale for students that take one as an input.
    """
    evaluator = evaluator_for(opened, plan.n, plan.judge)
    cond = conditions(opened, evaluator, told)

    def scores(student: Student) -> Scores:
        return evaluator.scores(all_pictures(student, student.sampler, opened, cond, evaluator.n, seed=SEED))

    return Validation(plan, scores, folder, steps, done)


def restore_best(plan: Evaluation | None, folder: Path, student: nn.Module) -> int | None:
    """Put the best weights of a run into its averaged student, where the plan keeps them.

    Returns:
        The step they are from; None where none are kept.

    Raises:
        ValueError: if they are damaged.
        FileNotFoundError: if they are missing.
    """
    if plan is None or not (plan.every and plan.keep_best):
        return None
    step = best_of(read_lines(folder / FILE), plan.keep_best)
    file = best_file(folder, step)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the best weights by {plan.keep_best}; train anew, or without keep_best"
        )
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); train anew, or without keep_best") from error
    student.load_state_dict(state)
    return step


def best_file(folder: Path, step: int) -> Path:
    """Where the weights of a step are kept."""
    return folder / FOLDER / f"{step:08d}.safetensors"


def best_of(lines: Sequence[Line], metric: str) -> int:
    """The first step at which a metric was best; without a metric the last."""
    if not metric:
        return int(lines[-1]["step"])
    sign = 1 if metric_info(metric).better == "lower" else -1
    return int(min(lines, key=lambda line: sign * line[metric])["step"])
