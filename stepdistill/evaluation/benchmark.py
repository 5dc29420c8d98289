"""Teacher and students on the same noise: from predictors to records."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from stepdistill.evaluation.digits import DigitsEvaluator
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.records import SECONDS, Record, device_name, records_from_scores
from stepdistill.logging import Progress
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.families import Opened
from stepdistill.sampling import Ddim, Sampler, sample, trailing
from stepdistill.student import Student


def bench_teacher(
    teacher: Guided, opened: Opened, evaluator: DigitsEvaluator, steps: Sequence[int], seeds: Sequence[int]
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
        records += _bench(
            teacher, Sampler(trailing(k), Ddim()), opened, evaluator, seeds, "teacher", "teacher", "-", teacher.scale
        )
    return records


def bench_student(
    student: Student, opened: Opened, evaluator: DigitsEvaluator, seeds: Sequence[int], *, subject: str, method: str
) -> list[Record]:
    """A student under its own sampler; arguments as ``bench_teacher``, with names for the tables."""
    return _bench(student, student.sampler, opened, evaluator, seeds, subject, "student", method, 1.0)


def _bench(
    predict: Guided | Student,
    sampler: Sampler,
    opened: Opened,
    evaluator: DigitsEvaluator,
    seeds: Sequence[int],
    subject: str,
    role: str,
    method: str,
    guidance: float,
) -> list[Record]:
    cond = opened.family.cond(opened.denoiser.net, {"labels": evaluator.labels})
    shape = (evaluator.n, *opened.sample_shape)
    device = next(opened.denoiser.parameters()).device
    seconds = _seconds_per_image(predict, sampler, cond, shape, device)
    scores = []
    with Progress(f"{subject}, {sampler.steps} steps", 0, len(seeds)) as progress:
        for seed in seeds:
            images = to_uint8(sample(predict, shape, cond, sampler, seed=seed, batch=250, device=device).cpu())
            scores.append(evaluator.scores(images, evaluator.labels) | {SECONDS: seconds})
            progress.advance()
    records = records_from_scores(
        subject=subject,
        role=role,
        method=method,
        sampler=type(sampler.rule).__name__.lower(),
        steps=sampler.steps,
        nfe=sampler.evaluations * (2 if guidance != 1 else 1),
        guidance=guidance,
        scores_per_seed=scores,
        seeds=list(seeds),
        device=device_name(device),
        **evaluator.protocol(),
    )
    return records


def _seconds_per_image(
    predict: Guided | Student,
    sampler: Sampler,
    cond: Cond,
    shape: tuple[int, ...],
    device: torch.device,
    batch: int = 100,
) -> float:
    """Median of three timed batches, after one that warms up."""
    part = {k: v[:batch] for k, v in cond.items()}
    times = []
    for _ in range(4):
        start = time.perf_counter()
        sample(predict, (min(batch, shape[0]), *shape[1:]), part, sampler, device=device).cpu()
        times.append((time.perf_counter() - start) / min(batch, shape[0]))
    return statistics.median(times[1:])
