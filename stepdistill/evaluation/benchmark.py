"""Teacher and students on the same noise: from predictors to records."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stepdistill.data import image_shape, lent
from stepdistill.evaluation.columns import SECONDS
from stepdistill.evaluation.digits import DigitsEvaluator
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.records import Record, device_name, mean_and_ci95, records_from_scores
from stepdistill.logging import Progress
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.families import Opened
from stepdistill.recipes import import_file, run_code
from stepdistill.sampling import Ddim, Sampler, StepRule, sample, trailing
from stepdistill.student import Student

AT_ONCE = 250
"""Images sampled together."""


class Evaluator(Protocol):
    """A benchmark: what to ask for, and scores of what comes back."""

    n: int
    """Images of one evaluation."""

    def cond(self, opened: Opened) -> Cond:
        """Conditions of the images to make, each (n, ...)."""
        ...

    def scores(self, images: Tensor) -> dict[str, float]:
        """Every metric of images uint8 (n, 3, H, W), in the order of ``cond``."""
        ...

    def ceiling(self) -> dict[str, float]:
        """What real images score; empty where there are none to spare."""
        ...

    def protocol(self, metric: str) -> dict[str, int | str | None]:
        """What two numbers of a metric must share to be compared: keywords of ``records_from_scores``.

        These are n, extractor_sha256, reference_sha256 and resize, and of percentages that count images or references
        ``items``, how many; without it their intervals are those over seeds.
        """
        ...


@runtime_checkable
class Itemised(Protocol):
    """An evaluator that also says of each single image whether it shows what was asked for."""

    def asked(self) -> list[str]:
        """What each of the n images is asked to show, in words."""
        ...

    def right(self, images: Tensor) -> Tensor:
        """Whether each of images uint8 (n, 3, H, W) shows it; bool (n,)."""
        ...


@runtime_checkable
class Graded(Protocol):
    """An evaluator that also grades each single image, where right and wrong would be too little."""

    grade: str
    """The metric that grades are values of, one with a direction; empty where it has none to give."""

    def asked(self) -> list[str]:
        """What each of the n images is asked to show, in words."""
        ...

    def scores_and_grades(self, images: Tensor) -> tuple[dict[str, float], Tensor]:
        """``scores`` and the grade of each of images uint8 (n, 3, H, W), (n,)."""
        ...


def evaluator_for(opened: Opened, n: int, judge: str = "") -> Evaluator:
    """Who judges what a teacher makes: somebody's own judge, or the bundled benchmark that fits, digits or shapes.

    Args:
        opened: the teacher.
        n: images of one evaluation.
        judge: ``file.py:function``; empty takes the bundled benchmark.

    Raises:
        ValueError: if none fits, or the judge's own code fails or judges another number of images.
        FileNotFoundError: if a judge's file is missing.
    """
    if judge:
        return _own_judge(judge, opened, n)
    check_judged(opened)
    if is_digits(opened):
        return DigitsEvaluator(n)
    from stepdistill.evaluation.alignment import ShapesEvaluator  # open_clip takes its time

    return ShapesEvaluator(n)


def _own_judge(judge: str, opened: Opened, n: int) -> Evaluator:
    path, _, name = judge.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"judge {judge!r}: no file {path}")
    make = getattr(import_file(Path(path), "judge"), name, None)
    if make is None:
        raise ValueError(f"judge {judge!r}: no function {name} in {path}")
    evaluator = run_code(lambda: make(opened, n), f"judge {judge!r}")
    if evaluator.n != n:
        raise ValueError(f"judge {judge!r}: judges n = {evaluator.n} images, and is asked for n = {n}")
    return evaluator


def check_judged(opened: Opened) -> None:
    """Make sure, before any training, that there is a benchmark for what a teacher makes.

    Raises:
        ValueError: if there is none.
    """
    if not is_digits(opened) and not is_shapes(opened):
        raise ValueError(
            "evaluation judges digits of shape (1, 8, 8) and captioned shapes of 32x32 pixels; this teacher, "
            f"{type(opened.pipeline).__name__}, makes samples of {opened.sample_shape}; name a judge of your own, "
            "file.py:function, or leave evaluation out"
        )


def is_digits(opened: Opened) -> bool:
    """Whether a teacher makes what the judge of digits takes."""
    return opened.sample_shape == (1, 8, 8) and opened.family.cond is not None


def is_shapes(opened: Opened) -> bool:
    """Whether a teacher makes what the judges of shapes take."""
    small = max(opened.sample_shape[1:]) <= 32
    return small and opened.family.encode is not None and image_shape(opened) == (3, 32, 32)


def bench_teacher(
    teacher: Guided, opened: Opened, evaluator: Evaluator, steps: Sequence[int], seeds: Sequence[int]
) -> list[Record]:
    """The teacher under DDIM at several step counts.

    Args:
        teacher: with its guidance.
        opened: the pipeline it comes from.
        evaluator: metrics and protocol.
        steps: step counts.
        seeds: sampling seeds; error bars need two or more.

    Returns:
        Records of every metric and of seconds per image.
    """
    records = []
    for k in steps:
        sampler = Sampler(trailing(k), Ddim())
        records += _bench(teacher, sampler, opened, evaluator, seeds, "teacher", "teacher", "-", teacher.scale)
    return records


def bench_student(
    student: Student,
    opened: Opened,
    evaluator: Evaluator,
    seeds: Sequence[int],
    *,
    subject: str,
    method: str,
    told: float | None = None,
) -> list[Record]:
    """A student under its own sampler; arguments as ``bench_teacher``, with names for the tables.

    ``told`` is the guidance scale that a student is given which takes one as an input.
    """
    return _bench(student, student.sampler, opened, evaluator, seeds, subject, "student", method, 1.0, told)


def _bench(
    predict: Guided | Student,
    sampler: Sampler,
    opened: Opened,
    evaluator: Evaluator,
    seeds: Sequence[int],
    subject: str,
    role: str,
    method: str,
    guidance: float,
    told: float | None = None,
) -> list[Record]:
    device = next(opened.denoiser.parameters()).device
    cond, scores = conditions(opened, evaluator, told), []
    with Progress(f"{subject}, {sampler.steps} steps", 0, len(seeds)) as progress:
        seconds = seconds_per_image(predict, sampler, opened, cond, evaluator.n)
        for seed in seeds:
            images = all_pictures(predict, sampler, opened, cond, evaluator.n, seed=seed)
            scores.append(evaluator.scores(images))
            progress.advance()
    return records_of(
        scores,
        seconds,
        {metric: evaluator.protocol(metric) for metric in (*scores[0], SECONDS)},
        subject=subject,
        role=role,
        method=method,
        sampler=rule_name(sampler.rule),
        steps=sampler.steps,
        nfe=evaluations(predict, sampler, guidance),
        guidance=guidance,
        seeds=list(seeds),
        device=device_name(device),
        dtype=arithmetic(predict),
    )


def arithmetic(predict: Guided | Student) -> str:
    """In which dtype a network computes, as records say it."""
    denoiser = predict.denoiser if isinstance(predict, Guided) else predict
    return str(denoiser.dtype).removeprefix("torch.")


def rule_name(rule: StepRule) -> str:
    """A step rule as tables name it."""
    return type(rule).__name__.lower()


def evaluations(predict: Guided | Student, sampler: Sampler, guidance: float) -> int:
    """Network evaluations of one image; guidance in two passes counts twice."""
    return sampler.evaluations * (2 if guidance != 1 and not getattr(predict, "told", False) else 1)


def conditions(opened: Opened, evaluator: Evaluator, told: float | None = None) -> Cond:
    """What an evaluator asks for, on the CPU, each (n, ...).

    Args:
        opened: whose encoders make conditions of it.
        evaluator: the benchmark.
        told: the guidance scale for networks that take one as an input.

    Raises:
        ValueError: if it asks for another number of images than it judges.
    """
    with lent(opened, next(opened.denoiser.parameters()).device, vae=False):
        cond = {k: v.cpu() for k, v in evaluator.cond(opened).items()}
    for name, value in cond.items():
        if len(value) != evaluator.n:
            raise ValueError(
                f"{type(evaluator).__name__} judges n = {evaluator.n} images and gives {len(value)} conditions "
                f"({name!r}); it needs one prompt or label for each image"
            )
    return cond if told is None else cond | {"guidance": torch.full((evaluator.n,), told)}


def records_of(
    scores: Sequence[Mapping[str, float]],
    seconds: Sequence[float],
    protocols: Mapping[str, Mapping[str, int | str | None]],
    **row: Any,
) -> list[Record]:
    """Records of one row of a table: one for each metric, under that metric's own protocol.

    Args:
        scores: {metric: value} of each seed.
        seconds: several timings of one image, whose spread, not that of seeds, gives the interval.
        protocols: of each metric and of ``SECONDS``, as ``Evaluator.protocol`` gives it.
        row: the other keywords of ``records_from_scores``.
    """
    records = []
    for metric in scores[0]:
        only = [{metric: score[metric]} for score in scores]
        records += records_from_scores(scores_per_seed=only, **row, **protocols[metric])
    timed = [{SECONDS: statistics.median(seconds)}] * len(scores)
    (record,) = records_from_scores(scores_per_seed=timed, **row, **protocols[SECONDS])
    return [*records, replace(record, ci95=mean_and_ci95(seconds)[1], values=[])]


@torch.no_grad()
def pictures(
    predict: Guided | Student, sampler: Sampler, opened: Opened, cond: Cond, n: int, *, seed: int
) -> Iterator[Tensor]:
    """Decoded samples as they would be saved, uint8 (B, 3, H, W) on the CPU, batch by batch; of videos three frames.

    Args:
        predict: who is sampled.
        sampler: how.
        opened: the teacher, whose pipeline decodes.
        cond: conditions, each (n, ...).
        n: pictures in all.
        seed: of the noise.
    """
    device = next(predict.parameters()).device
    at_once = max(1, min(AT_ONCE, 2**21 // math.prod(opened.sample_shape)))
    for start in range(0, n, at_once):
        part = {k: v[start : start + at_once] for k, v in cond.items()}
        shape = (min(at_once, n - start), *opened.sample_shape)
        latents = sample(predict, shape, part, sampler, seed=seed, first=start, device=device)
        yield as_saved(opened.decode(latents)).cpu()


def as_saved(images: Tensor) -> Tensor:
    """Decoded images (B, C, H, W), or videos (B, C, T, H, W), nominally in [-1, 1], as uint8 (B, 3, H, W).

    Of a video the first, the middle and the last frame are put side by side.

    Raises:
        ValueError: if a value is not finite.
    """
    if images.ndim == 5:
        images = torch.cat([images[:, :, t] for t in (0, images.shape[2] // 2, -1)], -1)
    return to_uint8(images)


def all_pictures(
    predict: Guided | Student, sampler: Sampler, opened: Opened, cond: Cond, n: int, *, seed: int
) -> Tensor:
    """``pictures`` together, uint8 (n, 3, H, W), the decoder being brought to where the network is."""
    with lent(opened, next(predict.parameters()).device, vae=True):
        return torch.cat(list(pictures(predict, sampler, opened, cond, n, seed=seed)))


def seconds_per_image(predict: Guided | Student, sampler: Sampler, opened: Opened, cond: Cond, n: int) -> list[float]:
    """Of three timed batches of at most a hundred images, decoded, after one that warms up."""
    batch = min(100, n)
    part = {k: v[:batch] for k, v in cond.items()}
    times = []
    with lent(opened, next(predict.parameters()).device, vae=True):
        for _ in range(4):
            start = time.perf_counter()
            for _ in pictures(predict, sampler, opened, part, batch, seed=0):
                pass
            times.append((time.perf_counter() - start) / batch)
    return times[1:]
