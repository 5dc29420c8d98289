"""Symptoms: what a run's curves say of its health. Numbers in, findings out; no network is asked.

Training looks for them after every line of health.jsonl, ``stepdistill doctor`` in the whole run. Thresholds on samples
are factors to the teacher's own figure on the same conditions, so they mean the same for pixels and for latents. They
are set beside eval/health.json: 49 students of the bundled teachers, by two dozen methods, at the end of training. 46
of them lie at 0.71 to 1.21 of the teacher's diversity, 0.91 to 1.01 of its contrast, 0.95 to 0.99 of its saturation
(where there are colours), with up to 1.5 % of their values outside. Three, of MDT, sCM and MeanFlow under untuned
settings, have 5.7, 22 and 27 % outside; their Frechet distances are 3.9, 5.2 and 9.5 where the median is 1.1. A bad
student may look sound here: one of iCD does, at a distance of 7.0.

Of nine averages the farthest lies at 0.35; three critics lie at 0.99 of the teacher's error. The other thresholds, on
discriminators, gradients and loss scales, are rules of thumb that no record here backs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from stepdistill.logging import CHANCE, PATIENCE, Line

DIVERSITY = 0.5
"""Share of the teacher's spread between seeds below which a student has collapsed."""
TONE = 1.3
"""Factor to the teacher's contrast or saturation, up or down, from which images look wrong."""
OUTSIDE = 0.03
"""Share of values beyond the teacher's range from which outputs have left it."""
WORSE = 1.1
"""Critic's error over that of the network it started from, on the same samples, from which it lags."""
LAG = 0.5
"""Distance of averaged from current samples, in spreads of the teacher's, from which the average lags."""
SURE = 0.98
"""Accuracy above which a discriminator teaches nothing; below ``CHANCE`` it guesses."""
SPIKE = 10.0
"""Gradient norm over the median of the lines before."""
SMALLEST_SCALE = 2.0**8
"""Of float16 losses: GradScaler's settles at 2^10 and above where training is sound, and starts at 2^16."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    check: str
    """Name of the check that found it."""
    what: str
    evidence: str
    """With the numbers."""
    cause: str
    """The likely one."""
    cure: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.what}: {self.evidence}. Likely cause: {self.cause}. What to do: {self.cure}."

    def facts(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Curves:
    """A run's figures so far."""

    health: Sequence[Line]
    metrics: Sequence[Line]
    steps: int
    """Of the whole run."""

    @property
    def late(self) -> bool:
        """Whether half of the training is done, so that what is off will hardly mend itself."""
        return bool(self.health) and self.health[-1]["step"] >= self.steps / 2


Symptom = Callable[[Curves], Iterator[Finding]]


# Of samples


def ratios(curves: Curves, figure: str) -> list[float]:
    """A figure over the teacher's, line by line; lines where either is missing or nothing are left out."""
    pairs = [(line.get(figure), line.get(f"teacher_{figure}")) for line in curves.health]
    return [mine / theirs for mine, theirs in pairs if mine and theirs and math.isfinite(mine)]


def not_finite(curves: Curves) -> Iterator[Finding]:
    """NaN or infinity in samples or in logged losses."""
    for file, lines in (("health.jsonl", curves.health), ("metrics.jsonl", curves.metrics)):
        for line in lines:
            bad = [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
            if bad:
                yield Finding(
                    "not_finite",
                    "NaN or infinity",
                    f"{bad[0]} is {line[bad[0]]} at step {line['step']} in {file}",
                    "a learning rate that is too high, or float16 where activations are large",
                    "go back to a checkpoint before it with a lower optim.*.lr; use run.dtype bfloat16",
                )
                return


def collapsed(curves: Curves) -> Iterator[Finding]:
    """A student whose samples of one condition are all alike, and were not or will stay so."""
    found = ratios(curves, "diversity")
    if len(found) < 2 or found[-1] >= DIVERSITY:
        return
    best = max(found[:-1])
    # a student starts as a teacher of few steps, whose samples are alike; it has to leave that
    if found[-1] < 0.75 * best or (curves.late and found[-1] < 1.03 * found[-2]):
        yield Finding(
            "collapsed",
            "the student collapses",
            f"samples of one condition spread {found[-1]:.0%} as far as the teacher's (at best {best:.0%})",
            "a critic or a discriminator that the student outruns, too much guidance, or a regression that blurs",
            "more updates of the critic for each of the student's (student_every), a lower optim.student.lr, lower "
            "teacher.guidance; for a regression a GAN term or more steps",
        )


def off_tone(curves: Curves) -> Iterator[Finding]:
    """Contrast or saturation that drift away from the teacher's."""
    for figure in ("contrast", "saturation"):
        found = ratios(curves, figure)
        if len(found) < 2:
            continue
        away = [abs(math.log(ratio)) for ratio in found]
        nearest = min(away[:-1])
        if away[-1] > math.log(TONE) and (
            away[-1] > nearest + math.log(1.2) or (curves.late and away[-1] > away[-2] - math.log(1.03))
        ):
            high = found[-1] > 1
            yield Finding(
                f"{figure}_drifts",
                f"{figure} is {'above' if high else 'below'} the teacher's",
                f"{found[-1]:.2f} times the teacher's on the same conditions (at its nearest {math.exp(nearest):.2f})",
                "guidance that is too high or counted twice"
                if high
                else "a student that blurs, or has not learned yet",
                "compare teacher.guidance with what the teacher is used with; lower optim.student.lr"
                if high
                else "train longer, or add a GAN term; look at samples/",
            )


def out_of_range(curves: Curves) -> Iterator[Finding]:
    """Values that the teacher never comes near."""
    found = [line["outside"] for line in curves.health if "outside" in line]
    if len(found) < 2 or not found[-1] > OUTSIDE:
        return
    if found[-1] > max(2 * min(found[:-1]), OUTSIDE) or curves.late:
        yield Finding(
            "out_of_range",
            "outputs leave their range",
            f"{found[-1]:.1%} of all values lie beyond the teacher's largest by a quarter or more",
            "a step that is too long for the student, or noise predictions asked where little signal is left",
            "a lower optim.student.lr, run.clip, or weaker adversarial weight; start the grid below time 1",
        )


def average_lags(curves: Curves) -> Iterator[Finding]:
    """An average that is far behind the student whose samples are good."""
    last = curves.health[-1] if curves.health else {}
    gap = last.get("average_gap")
    if gap is not None and curves.late and gap > LAG:
        yield Finding(
            "average_lags",
            "the running average lags behind the student",
            f"their samples from the same noise differ by {gap:.2f} of the teacher's spread at step {last['step']}",
            "run.ema is too near to 1 for this many updates, or the student still jumps about",
            "a smaller run.ema, or optim.student.decay linear or cosine; the average is what is exported",
        )


# Of players


def critic_lags(curves: Curves) -> Iterator[Finding]:
    """A critic that knows the student's samples less well than the network it started from."""
    lines = [line for line in curves.health if line["step"] > 0 and line.get("teacher_error")][-2:]
    worse = [line["critic_error"] / line["teacher_error"] for line in lines]
    if len(worse) == 2 and min(worse) > WORSE:
        yield Finding(
            "critic_lags",
            "the critic lags behind the student",
            f"its denoising error on the student's samples is {worse[-1]:.2f} times the frozen teacher's at step "
            f"{lines[-1]['step']}, {worse[0]:.2f} times before",
            "too few or too small updates of the critic, or so large ones that it diverges",
            "more critic updates for each of the student's (student_every), optim.critic.lr up (or down, if its loss "
            "rises), optim.student.lr down",
        )


def _accuracies(curves: Curves) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in curves.metrics:
        for name, value in line.items():
            if name.endswith("disc_accuracy"):
                found.setdefault(name, []).append((line["step"], value))
    return found


def _stays(points: Sequence[tuple[int, float]], wrong: Callable[[float], bool]) -> int:
    """Steps over which a curve has been wrong without a break, up to its end."""
    since = points[-1][0]
    for step, value in reversed(points):
        if not wrong(value):
            return points[-1][0] - step
        since = step
    # the first line is of the steps up to it, so it counts as many as there are between lines
    return points[-1][0] - since + (points[1][0] - points[0][0] if len(points) > 1 else since)


def guessing(curves: Curves) -> Iterator[Finding]:
    """A discriminator at chance."""
    for name, points in _accuracies(curves).items():
        steps = _stays(points, lambda accuracy: accuracy < CHANCE)
        if steps >= PATIENCE:
            yield Finding(
                "guessing",
                "the discriminator guesses",
                f"{name} has stayed below {CHANCE} for the last {steps} steps (0.5 is chance)",
                "it does not learn, or the student leaves it nothing to see",
                "raise optim.disc.lr, look at lower noise with objective.gan.times, tap earlier features (heads.taps); "
                "compare with gan.weight 0",
            )


def winning(curves: Curves) -> Iterator[Finding]:
    """A discriminator that is always right."""
    for name, points in _accuracies(curves).items():
        steps = _stays(points, lambda accuracy: accuracy > SURE)
        if steps >= PATIENCE:
            yield Finding(
                "winning",
                "the discriminator wins outright",
                f"{name} has stayed above {SURE} for the last {steps} steps",
                "it learns faster than the student, or sees a trivial difference: range, noise level, other conditions",
                "lower optim.disc.lr, more noise (objective.gan.times), objective.gan.r1; make sure that real images "
                "and captions are what the teacher was trained on",
            )


def spikes(curves: Curves) -> Iterator[Finding]:
    """Gradient norms that jump. Losses are left aside: those of score differences may pass through zero."""
    names = sorted({name for line in curves.metrics for name in line if name.endswith("/grad_norm")})
    for name in names:
        points = [(line["step"], line[name]) for line in curves.metrics if name in line]
        jumps = []
        for i in range(5, len(points)):
            usual = statistics.median(value for _, value in points[max(i - 20, 0) : i])
            if usual > 0 and points[i][1] > SPIKE * usual:
                jumps.append((points[i][1] / usual, points[i][0]))
        if jumps:
            factor, step = max(jumps)
            yield Finding(
                "spikes",
                f"{name} jumps",
                f"{len(jumps)} of {len(points)} lines of metrics.jsonl are more than {SPIKE:g} times the median before "
                f"them, the worst {factor:.0f} times at step {step}",
                "a learning rate that is too high or starts without a warm-up, or a batch of odd data",
                "a lower optim.*.lr, optim.*.warmup, a smaller run.clip",
            )


def scale_collapses(curves: Curves) -> Iterator[Finding]:
    """A float16 loss scale that keeps falling: gradients overflow again and again."""
    names = sorted({name for line in curves.metrics for name in line if name.endswith("/loss_scale")})
    for name in names:
        points = [(line["step"], line[name]) for line in curves.metrics if name in line]
        step, scale = points[-1]
        if scale < SMALLEST_SCALE:
            yield Finding(
                "scale_collapses",
                "the float16 loss scale collapses",
                f"{name} is {scale:g} at step {step}, from {points[0][1]:g}; every halving is an update that was left "
                "out",
                "activations or gradients beyond float16's range",
                "run.dtype bfloat16, or float32; a lower learning rate",
            )


SYMPTOMS: tuple[Symptom, ...] = (
    not_finite,
    collapsed,
    off_tone,
    out_of_range,
    average_lags,
    critic_lags,
    guessing,
    winning,
    spikes,
    scale_collapses,
)
