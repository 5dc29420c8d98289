"""Health of a run while it trains: the same noise and conditions every time, measured beside the teacher's samples.

Nothing here draws from the streams of training or moves a weight, so a run is the same bit for bit without it. Every
line of health.jsonl depends on the networks of its step and on lines before it alone; a resumed run writes them again.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from stepdistill import distributed
from stepdistill.checkpoint import write_atomically
from stepdistill.data import lent
from stepdistill.evaluation.benchmark import as_saved
from stepdistill.evaluation.comparison import contrast, saturation
from stepdistill.evaluation.diversity import seed_diversity
from stepdistill.logging import Line, read_lines
from stepdistill.models.denoiser import Cond, Denoiser, Guided, unscaled
from stepdistill.models.families import Opened
from stepdistill.models.nets import Nets
from stepdistill.objective import Step
from stepdistill.parts.critic import denoising_loss
from stepdistill.parts.discretisation import Karras
from stepdistill.parts.times import Uniform, renoise
from stepdistill.sampling import DpmPP2M, Sampler, sample, trailing
from stepdistill.schedule import EDM, Schedule
from stepdistill.symptoms import SYMPTOMS, Curves, guessing

FILE = "health.jsonl"
SEED = 1_000_033
"""Away from the seeds of evaluations and of previews."""
BEYOND = 1.25
"""Factor to the teacher's largest value from which a value counts as outside."""
TEACHER_STEPS = 16

Figures = dict[str, float]


class Health:
    """What a trainer calls between steps: measures, writes a line, warns of what is new.

    A line of health.jsonl holds, with the teacher's own figure beside it as ``teacher_...``:

    ``diversity``: ``spread`` of samples as the network makes them (latents). ``contrast`` and ``saturation``: means
    over decoded images, see ``stepdistill.evaluation.comparison``. ``outside``: share of values beyond 1.25 times the
    teacher's largest. ``average_gap``: root-mean-square distance of the average's samples from the student's, over the
    teacher's diversity.
    ``critic_error`` and ``teacher_error``: denoising losses of critic and unguided teacher on the student's samples,
    at the same times under the same noise. ``start_gap``, at step 0 alone: relative distance of the student's
    predictions from the unguided teacher's. ``warnings``: what was new at that step, by the name of the check.

    Args:
        opened: the teacher, whose pipeline decodes.
        cond: conditions of all samples, each (seeds * columns, ...); every row of ``columns`` asks for the same.
        seeds: rows.
        columns: conditions that differ.
        folder: the run's; gets health.jsonl.
        steps: of the whole run.
        done: steps done already; lines from there on come again and are dropped.
        at_once: samples drawn together.
    """

    def __init__(
        self,
        opened: Opened,
        cond: Cond,
        seeds: int,
        columns: int,
        folder: Path,
        *,
        steps: int,
        done: int = 0,
        at_once: int = 64,
    ):
        self.opened, self.cond, self.columns = opened, cond, columns
        self.shape = (seeds * columns, *opened.sample_shape)
        self.path, self.metrics = folder / FILE, folder / "metrics.jsonl"
        self.steps, self.at_once = steps, at_once
        self.lines: list[Line] = distributed.on_main(lambda: self._rewound(done))

    def __call__(self, nets: Nets, index: int) -> Figures:
        """Measure after ``index`` steps; in all processes alike, since networks may be in pieces.

        Returns:
            The figures, for trackers.

        Raises:
            OSError: if the line cannot be written.
        """
        with torch.no_grad(), torch.random.fork_rng():  # a decoder or a dropout may draw from the global stream
            figures = self.figures(nets, first=index == 0)
        line: Line = {"step": index, **figures}
        self.lines.append(line)
        if distributed.is_main():
            self._warn(line)
            self._append(line)
        return figures

    def figures(self, nets: Nets, *, first: bool) -> Figures:
        """All figures of a line; those of the start too at the ``first``. Nothing is kept."""
        student, teacher = nets.student, nets.teacher
        device = next(student.parameters()).device  # others may rest elsewhere until they are called
        given = {k: v.to(device) for k, v in self.cond.items()}
        known = {k: v for k, v in (self.lines[-1] if self.lines else {}).items() if k in _OF_TEACHER}
        figures: Figures = {}
        if not known or first:
            theirs = self._samples(teacher, teacher_sampler(teacher.schedule), device)
            known = {f"teacher_{k}": v for k, v in self._looks(theirs).items()}
            known["teacher_largest"] = float(theirs.abs().max())
            if first:
                figures["start_gap"] = _gap(student, teacher, theirs, given)
        mine = self._samples(student, student.sampler, device)
        figures |= self._looks(mine) | known
        figures["outside"] = float((mine.abs() > BEYOND * known["teacher_largest"]).double().mean())
        scale = max(known["teacher_diversity"], 1e-12)
        figures["average_gap"] = _rms(self._samples(nets.ema, nets.ema.sampler, device) - mine) / scale
        if "critic" in nets:
            plain = given if teacher.told else unscaled(given)
            figures["critic_error"] = float(denoising_loss(nets.critic, mine, given, Uniform(), _step(device)))
            figures["teacher_error"] = float(denoising_loss(teacher.denoiser, mine, plain, Uniform(), _step(device)))
        return figures

    def _samples(self, predict: Guided | Denoiser, sampler: Sampler, device: torch.device) -> Tensor:
        return sample(predict, self.shape, self.cond, sampler, seed=SEED, batch=self.at_once, device=device)

    def _looks(self, samples: Tensor) -> Figures:
        """Figures of samples (seeds * columns, ...) alone; NaN if a sample or an image is not finite."""
        with lent(self.opened, samples.device, vae=True):
            images = self.opened.decode(samples, self.at_once)
        if not bool(samples.isfinite().all() and images.isfinite().all()):
            return dict.fromkeys(("diversity", "contrast", "saturation"), math.nan)
        seen = as_saved(images)
        tone = {"contrast": float(contrast(seen).mean()), "saturation": float(saturation(seen).mean())}
        return {"diversity": spread(samples, self.columns)} | tone

    def _warn(self, line: Line) -> None:
        """Say what no line before has said, and keep it in this one."""
        said = {check for before in self.lines for check in before.get("warnings", {})}
        curves = Curves(self.lines, [m for m in read_lines(self.metrics) if m["step"] <= line["step"]], self.steps)
        found = [finding for symptom in _WATCHED for finding in symptom(curves) if finding.check not in said]
        for finding in found:
            warnings.warn(f"step {line['step']}: {finding}", stacklevel=2)
        if found:
            line["warnings"] = {finding.check: str(finding) for finding in found}

    def _append(self, line: Line) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self.path}: {error}; the last checkpoint is intact") from error

    def _rewound(self, done: int) -> list[Line]:
        kept = [line for line in read_lines(self.path) if line["step"] < done]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self.path, lambda aside: aside.write_text(text, encoding="utf-8"))
        return kept


_WATCHED = tuple(symptom for symptom in SYMPTOMS if symptom is not guessing)  # of that, MetricsFile warns in every run
_OF_TEACHER = ("teacher_diversity", "teacher_contrast", "teacher_saturation", "teacher_largest")


def spread(samples: Tensor, columns: int) -> float:
    """Mean distance between samples of one condition from different noise, per number and over sqrt(2).

    Of independent numbers with standard deviation s it is s, within 1 / (4 D) for D of them.

    Args:
        samples: (seeds * columns, ...); every row of ``columns`` asks for the same conditions.
        columns: conditions that differ.
    """
    vectors = samples.flatten(1).unflatten(0, (-1, columns))
    return float(seed_diversity(vectors).mean()) / math.sqrt(2 * vectors.shape[2])


def teacher_sampler(schedule: Schedule) -> Sampler:
    """Sixteen evaluations of the teacher: second order, and on EDM's long path at EDM's own noise levels."""
    if not isinstance(schedule, EDM):
        return Sampler(trailing(TEACHER_STEPS), DpmPP2M())
    ends = Karras().ends(schedule, torch.tensor(schedule.t_max, dtype=torch.float64), TEACHER_STEPS)
    times = (ends.flip(0)[:-1] / schedule.t_max).clamp(max=1.0)
    return Sampler(tuple(times.tolist()), DpmPP2M())


def _gap(student: Denoiser, teacher: Guided, samples: Tensor, cond: Cond) -> float:
    """Relative distance of two networks' clean estimates on the teacher's samples, noised to times all over its path.

    A student of two times is asked for its estimate at one.
    """
    x_t, t, _ = renoise(teacher.schedule, samples, Uniform(0.02, 0.98), _step(samples.device))
    theirs = teacher.denoiser(x_t, t, cond if teacher.told else unscaled(cond))
    return _rms(Denoiser.forward(student, x_t, t, cond) - theirs) / max(_rms(theirs), 1e-12)


def _step(device: torch.device) -> Step:
    """The same draws every time."""
    return Step.at(0, SEED, device=device)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
