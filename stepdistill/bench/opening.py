"""From a row to something that can be sampled: the teacher under a solver, an exported student, any stock pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import diffusers
from diffusers import SchedulerMixin

from stepdistill.bench.rows import Row
from stepdistill.bench.suite import Suite
from stepdistill.build import guided, open_teacher
from stepdistill.data import image_shape
from stepdistill.evaluation.benchmark import Evaluator, conditions, evaluations, evaluator_for, rule_name
from stepdistill.exported import load_student, rule_of
from stepdistill.folders import read_json
from stepdistill.lora_files import find_lora
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.families import Opened
from stepdistill.recipe import Teacher
from stepdistill.sampling import Sampler, trailing
from stepdistill.stock import stock_times
from stepdistill.student import Student


@dataclass(frozen=True)
class Sampled:
    """Who is sampled, how, and the pipeline around it."""

    predict: Guided | Student
    sampler: Sampler
    opened: Opened
    cond: Cond
    guidance: float
    """For the record: 1 is none."""

    @property
    def sampler_name(self) -> str:
        """As tables name it."""
        return rule_name(self.sampler.rule)

    @property
    def nfe(self) -> int:
        """Network evaluations of one image."""
        return evaluations(self.predict, self.sampler, self.guidance)


@lru_cache(maxsize=1)
def open_suite(suite: Suite) -> tuple[Opened, Evaluator]:
    """A suite's teacher and its benchmark; open once in each process.

    Raises:
        ValueError: if there is no benchmark for it.
    """
    opened = open_teacher(suite.teacher)
    evaluator = evaluator_for(opened, suite.n, suite.judge)
    opened.denoiser.to(suite.device)
    return opened, evaluator


@lru_cache(maxsize=2)
def _asked(suite: Suite, told: float | None) -> Cond:
    opened, evaluator = open_suite(suite)
    return conditions(opened, evaluator, told)


def open_row(row: Row, suite: Suite) -> Sampled:
    """Load what a row samples.

    Raises:
        ValueError: if it is damaged, or no student of the suite's teacher.
    """
    opened, evaluator = open_suite(suite)
    if row.kind == "teacher":
        teacher = guided(opened, replace(suite.teacher, guidance=row.guidance, guidance_range=None))
        sampler = Sampler(trailing(row.steps), row.rule)
        return Sampled(teacher, sampler, opened, _asked(suite, None), row.guidance)
    if row.kind == "exported":
        student = load_student(row.source, opened=opened).to(suite.device)
        takes = opened.family.guidance_input(student.net)
        cond = _asked(suite, told(row, suite.teacher) if takes else None)
        if takes or row.guidance in (0, 1):
            return Sampled(student, student.sampler, opened, cond, 1.0)
        return Sampled(Guided(student, row.guidance, opened.null), student.sampler, opened, cond, row.guidance)
    return _pipeline(row, opened, evaluator, suite)


def told(row: Row, teacher: Teacher) -> float | None:
    """The guidance scale for a student that takes one as an input: its own, or the middle of its teacher's range."""
    if row.guidance:
        return row.guidance
    return None if teacher.guidance_range is None else sum(teacher.guidance_range) / 2


def _pipeline(row: Row, opened: Opened, evaluator: Evaluator, suite: Suite) -> Sampled:
    """Any pipeline that a family knows, with its own text encoders and decoder, and perhaps a LoRA."""
    base = Teacher(
        row.source,
        custom_pipeline=suite.teacher.custom_pipeline if row.source == suite.teacher.source else None,
        size=suite.teacher.size,
        lora=row.lora or None,
        lora_scale=row.lora_scale,
    )
    try:
        own = open_teacher(base)
    except ValueError as error:
        raise ValueError(f"student {row.name!r}: {str(error).removeprefix('teacher ')}") from error
    mine, theirs = image_shape(own), image_shape(opened)
    if mine != theirs:
        raise ValueError(
            f"student {row.name!r}: makes images of shape {mine}, and the teacher's are {theirs}; it is a student of "
            "another teacher"
        )
    own.denoiser.to(suite.device)
    net, scheduler, family = own.denoiser.net, _scheduler(row, own), own.family
    schedule, kind, call = family.schedule(scheduler), family.kind(scheduler), family.call(scheduler)
    student = Student(_sampler(row, own, scheduler), net, schedule, kind, call)
    scale = row.guidance or 1.0
    cond = conditions(own, evaluator)
    guided_ = Guided(student, scale, own.null, told=family.guidance_input(net))
    return Sampled(guided_, student.sampler, own, cond, scale)


def _scheduler(row: Row, own: Opened) -> SchedulerMixin:
    """The pipeline's, or where there is one the LoRA's own."""
    if not row.lora or row.rule is not None:
        return own.pipeline.scheduler
    folder = find_lora(Path(row.lora)).parent
    if not (folder / "scheduler").is_dir():
        return own.pipeline.scheduler
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _sampler(row: Row, own: Opened, scheduler: SchedulerMixin) -> Sampler:
    if row.rule is not None:
        return Sampler(trailing(row.steps), row.rule)
    record = scheduler.config.get("_student")
    try:
        rule = rule_of(scheduler, record or {})
        if record is not None:
            return Sampler(tuple(record["times"]), rule)
        return Sampler(tuple(stock_times(scheduler, own.denoiser.schedule, row.steps, own.family.passes_sigmas)), rule)
    except ValueError as error:
        raise ValueError(
            f"student {row.name!r}: {error}; say how it is sampled: rule=Renoise() for LCM-like students, "
            "Tcd(gamma) for TCD's, Ddim() for those trained to jump"
        ) from error
