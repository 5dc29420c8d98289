"""Samplers: a grid of times, a rule for one step, and the one loop over both.

The same ``Sampler.run`` serves the teacher, the student's rollouts in training, evaluation and the tests that hold
exported pipelines to it.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stepdistill.functional.ode import jump
from stepdistill.models.denoiser import Cond, Predictor
from stepdistill.randomness import Stream

Rng = torch.Generator | Sequence[torch.Generator]
"""One generator for the batch, or one per sample, so that a sample does not depend on its batch."""


@dataclass(frozen=True)
class Move:
    """One step to make: from time t to time s, under conditions, with a source of fresh noise."""

    t: Tensor
    """Times of the states, (B,)."""
    s: Tensor
    """Times to go to, (B,), 0 <= s < t."""
    cond: Cond
    rng: Rng
    previous: tuple[Tensor, Tensor] | None = None
    """Clean estimate (B, ...) and times (B,) of the step before, for multistep rules; None at the first."""
    final: bool = False
    """s is 0 for all samples, so nothing need be evaluated or drawn for a step from there."""


class StepRule(ABC):
    """How to get from time t to time s < t."""

    @abstractmethod
    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            predict: what is sampled from.
            x_t: states at time t, (B, ...).
            move: where to.

        Returns:
            The states at s and the clean estimates at t, both (B, ...).
        """

    def evaluations(self, steps: int) -> int:
        """Network calls of a run of ``steps`` steps."""
        return steps

    def lands(self, s: Tensor, t_max: float) -> Tensor:
        """Where the jump of a step towards ``s`` (B,) ends, before any noise is added; (B,)."""
        return s


def at(t: float, like: Tensor) -> Tensor:
    """Time ``t`` for every sample of ``like``: (B,), float64."""
    return torch.full((len(like),), t, dtype=torch.float64, device=like.device)


@dataclass(frozen=True)
class Ddim(StepRule):
    """The deterministic jump (arXiv:2010.02502, eta = 0); Euler's step on rectified-flow and EDM paths."""

    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        """See ``StepRule``; draws nothing."""
        x0 = predict(x_t, move.t, move.cond)
        return jump(x_t, x0, predict.schedule.coeffs(move.t, x_t), predict.schedule.coeffs(move.s, x_t)), x0


@dataclass(frozen=True)
class NoiseCorrected(StepRule):
    """``Ddim``, but for the step from ``t_max``: there the state *is* the noise, so the jump keeps it,
    ``alpha_s x0 + sigma_s x_t / prior_std`` (Imagine Flash's noise correction, arXiv:2405.05224).

    ``Ddim`` takes for noise what the clean estimate leaves over, which counts a signal that pure noise does not hold
    wherever the schedule leaves some at ``t_max`` (Stable Diffusion: alpha = 0.07). Where it leaves none, as on
    rectified flows or at zero terminal SNR, the two are one. No stock scheduler goes this way.
    """

    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        """See ``StepRule``; draws nothing."""
        schedule = predict.schedule
        x_s, x0 = Ddim()(predict, x_t, move)
        kept = schedule.add_noise(x0, x_t / schedule.prior_std, move.s)
        at_the_top = (move.t >= schedule.t_max).view(-1, *[1] * (x_t.ndim - 1))
        return torch.where(at_the_top, kept, x_s), x0


@dataclass(frozen=True)
class Heun(StepRule):
    """Jump, look again, and jump by the mean of both clean estimates; a step to the data is a plain jump.

    Second order: the trapezoid rule for ``d(x / sigma) / d(alpha / sigma) = x0``, which stays finite at alpha = 0. It
    is not the rule of EDM (arXiv:2206.00364 alg. 1) and of diffusers' HeunDiscreteScheduler, which average the noise
    estimates. Two network calls a step but the last.
    """

    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        """See ``StepRule``; draws nothing."""
        x_s, x0 = Ddim()(predict, x_t, move)
        if move.final:
            return x_s, x0
        c_t, c_s = predict.schedule.coeffs(move.t, x_t), predict.schedule.coeffs(move.s, x_t)
        x0 = torch.where(c_s.sigma == 0, x0, (x0 + predict(x_s, move.s, move.cond)) / 2)
        return jump(x_t, x0, c_t, c_s), x0

    def evaluations(self, steps: int) -> int:
        """Two calls a step, one for the last."""
        return 2 * steps - 1


@dataclass(frozen=True)
class DpmPP2M(StepRule):
    """DPM-Solver++(2M) (arXiv:2211.01095 alg. 2): second order at one network call a step, first at both ends."""

    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        """See ``StepRule``; draws nothing."""
        schedule = predict.schedule
        x0 = slope = predict(x_t, move.t, move.cond)
        if move.previous is not None and not move.final:
            x0_before, t_before = move.previous
            h_before = schedule.logsnr(move.t) - schedule.logsnr(t_before)
            h = schedule.logsnr(move.s) - schedule.logsnr(move.t)
            r = 0.5 * h / h_before  # 0 after a start at alpha = 0
            r = torch.where(h.isinf(), 0.0, r).to(x_t).view(-1, *[1] * (x_t.ndim - 1))  # a jump to the data is plain
            slope = x0 + r * (x0 - x0_before)
        return jump(x_t, slope, schedule.coeffs(move.t, x_t), schedule.coeffs(move.s, x_t)), x0


@dataclass(frozen=True)
class Renoise(StepRule):
    """Predict the clean sample, then add fresh noise (multistep consistency sampling, arXiv:2303.01469 alg. 1)."""

    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        """See ``StepRule``; draws once, nothing in the final step."""
        x0 = predict(x_t, move.t, move.cond)
        return (x0 if move.final else predict.schedule.add_noise(x0, _randn(x_t, move.rng), move.s)), x0

    def lands(self, s: Tensor, t_max: float) -> Tensor:
        """At the data."""
        return torch.zeros_like(s)


@dataclass(frozen=True)
class Tcd(StepRule):
    """Jump below s, then add the noise that leads back up to s (TCD, arXiv:2402.19159 eq. 26): gamma = 0 is the
    deterministic jump, gamma = 1 re-noising from the data. The variance at s is sigma_s^2 for every gamma.
    """

    gamma: float = 0.3
    """Stochasticity in [0, 1]; ``eta`` in diffusers' TCDScheduler."""
    table: int = 1000
    """Length of the scheduler's table: the point below s is rounded down to it, as TCDScheduler does; 0 keeps it."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1]; got {self.gamma}")

    def below(self, s: Tensor, t_max: float) -> Tensor:
        """The times that the jump aims at, (1 - gamma) s."""
        if not self.table:
            return (1 - self.gamma) * s
        # index i stands at (i + 1) / table; the guard keeps 498.99999 from becoming 498
        index = ((1 - self.gamma) * (s / t_max * self.table - 1) + 1e-6).floor()
        return torch.where(s > 0, (index + 1) / self.table * t_max, 0.0)

    def __call__(self, predict: Predictor, x_t: Tensor, move: Move) -> tuple[Tensor, Tensor]:
        """See ``StepRule``; draws once, nothing in the final step or when gamma = 0."""
        if move.final or self.gamma == 0:
            return Ddim()(predict, x_t, move)
        r = self.below(move.s, predict.schedule.t_max)
        x_r, x0 = Ddim()(predict, x_t, replace(move, s=r))
        c_r, c_s = predict.schedule.coeffs(r, x_t), predict.schedule.coeffs(move.s, x_t)
        ratio = c_s.alpha / c_r.alpha
        spread = (c_s.sigma**2 - (ratio * c_r.sigma) ** 2).clamp_min(0).sqrt()
        return ratio * x_r + spread * _randn(x_t, move.rng), x0

    def lands(self, s: Tensor, t_max: float) -> Tensor:
        """Below ``s``, or there."""
        return self.below(s, t_max) if self.gamma else s


MOST = 100_000
"""Steps of a sampler; a mistyped number gets an error in place of all memory."""


def trailing(steps: int) -> tuple[float, ...]:
    """``steps`` evenly spaced times that start at pure noise: 1, 1 - 1/steps, ..., 1/steps, as fractions of t_max.

    On a 1000-entry table four steps are the indices 999, 749, 499, 249.

    Raises:
        ValueError: if ``steps`` is below 1, or beyond what anybody samples with.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if steps > MOST:
        raise ValueError(f"steps must be at most {MOST}; got {steps}")
    return tuple(1 - i / steps for i in range(steps))


@dataclass(frozen=True)
class Sampler:
    """A few-step grid and the rule between its times. A student carries the one it was trained for."""

    times: tuple[float, ...] = field(default_factory=lambda: trailing(4))
    """When the network is called, as fractions of the schedule's ``t_max``: 1 >= t_0 > t_1 > ... > 0."""
    rule: StepRule = field(default_factory=Ddim)
    """How a step is made."""

    def __post_init__(self) -> None:
        """Check the grid."""
        grid = (*self.times, 0.0)
        if len(grid) < 2 or grid[0] > 1 or any(a <= b for a, b in pairwise(grid)):
            raise ValueError(f"times must fall strictly from at most 1 and stay above 0; got {list(self.times)}")
        if isinstance(self.rule, NoiseCorrected) and grid[0] != 1:
            raise ValueError(f"rule {self.rule} corrects the step from time 1; times start at {grid[0]:g}, use Ddim()")

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.times)

    @property
    def evaluations(self) -> int:
        """Network calls of a whole run."""
        return self.rule.evaluations(self.steps)

    def run(
        self, predict: Predictor, noise: Tensor, cond: Cond, rng: Rng, *, stop: int | None = None, path: bool = False
    ) -> Tensor:
        """Walk down the grid from noise.

        Args:
            predict: what is sampled from.
            noise: standard normal, (B, ...).
            cond: conditions.
            rng: source of the rule's fresh noise.
            stop: return the state at ``times[stop]``, before the network is called there; None runs to the data.
            path: return all states instead, (B, K + 1, ...), from the noise to the end.

        Returns:
            (B, ...): the samples, or the state at ``times[stop]``.
        """
        t_max = predict.schedule.t_max
        x, previous = noise * predict.schedule.prior_std, None
        states = [x]
        grid = (*self.times, 0.0)
        for high, low in list(pairwise(grid))[:stop]:
            t, s = at(high * t_max, x), at(low * t_max, x)
            x, x0 = self.rule(predict, x, Move(t, s, cond, rng, previous, final=low == 0))
            previous = x0, t
            states.append(x)
        return torch.stack(states, 1) if path else x


def refuse_noise(sampler: Sampler) -> None:
    """A student that is trained to jump from time to time must be sampled by jumps; in one step all rules are one.

    Raises:
        ValueError: if the rule does something else between steps.
    """
    if sampler.steps > 1 and sampler.rule not in (Ddim(), NoiseCorrected(), Tcd(0.0)):
        raise ValueError(f"sampler.rule {sampler.rule}: this student is trained to jump from time to time; use Ddim()")


def refuse_solver(rule: StepRule, *, memory: bool = False) -> None:
    """One step of an ODE solver, from anywhere: no memory of a step before (unless it is there), no fresh noise.

    Raises:
        ValueError: for rules that need the one or bring the other.
    """
    recalls = isinstance(rule, DpmPP2M) and not memory
    if recalls or isinstance(rule, Renoise | NoiseCorrected) or (isinstance(rule, Tcd) and rule.gamma > 0):
        raise ValueError(f"objective.solver {rule} is no single step of the teacher's ODE; use Ddim() or Heun()")


def _randn(like: Tensor, rng: Rng) -> Tensor:
    generator = rng if isinstance(rng, torch.Generator) else list(rng)

    def draw(n: int) -> Tensor:
        return randn_tensor((n, *like.shape[1:]), generator=generator, device=like.device, dtype=like.dtype)

    return rng.rows(len(like), draw) if isinstance(rng, Stream) else draw(len(like))


def sample_rngs(seed: int, ids: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample: a sample is the same in every batch, on every machine."""
    # torch's CPU generator keeps the low 32 bits of a seed, so the run's seed is hashed into those
    base = int.from_bytes(hashlib.blake2b(struct.pack("<q", seed), digest_size=4).digest(), "little")
    return [torch.Generator().manual_seed((base + i) % 2**32) for i in ids]


@torch.no_grad()
def sample(
    predict: Predictor,
    shape: Sequence[int],
    cond: Cond,
    sampler: Sampler,
    *,
    seed: int = 0,
    first: int = 0,
    batch: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw samples whose noise depends on nothing but ``seed`` and each sample's number.

    Args:
        predict: teacher, student or average.
        shape: shape of all samples, (N, ...), e.g. (100, 1, 8, 8).
        cond: their conditions, each (N, ...).
        sampler: grid and rule.
        seed: the run's seed.
        first: number of the first sample.
        batch: samples evaluated at once; does not change any sample's noise.
        device: where to evaluate.

    Returns:
        Samples of the given shape, in the range of the training data.
    """
    n = shape[0]
    out = []
    for start in range(0, n, batch):
        part = {k: v[start : start + batch].to(device) for k, v in cond.items()}
        rngs = sample_rngs(seed, range(first + start, first + min(start + batch, n)))
        noise = randn_tensor((len(rngs), *shape[1:]), generator=rngs, device=torch.device(device), dtype=torch.float32)
        out.append(sampler.run(predict, noise, part, rngs))
    return torch.cat(out)
