"""The training loop: one walk over an objective's turns, in the order things happen."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from stepdistill.checkpoint import Checkpoints
from stepdistill.logging import MetricsFile, Progress
from stepdistill.models.nets import Nets, only_trains, update_average
from stepdistill.objective import Batch, Objective, Step

Source = Callable[[Step], Batch]
"""Where batches come from: a function of the step's index and randomness alone, so that a resumed run sees the same.

The index counts micro-batches: step i of a trainer that accumulates four asks for 4 i, ..., 4 i + 3.
"""

_DATA = -1  # the data's stream of randomness, next to one per turn


@dataclass(frozen=True)
class AdamW:
    """One player's optimizer (arXiv:1711.05101) and its learning rate over training."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""
    final: float = 0.02
    """Where it falls to, as a share of ``lr``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("lr", "weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"AdamW.{name} must be at least 0; got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"AdamW.betas must lie in [0, 1); got {list(self.betas)}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"AdamW.eps must be above 0; got {self.eps}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"AdamW.final must lie in [0, 1]; got {self.final}")

    def build(self, params: Iterator[torch.nn.Parameter]) -> Optimizer:
        """The optimizer, with one fused kernel for the whole update."""
        return torch.optim.AdamW(
            params, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps, fused=True
        )

    def rate(self, index: int, steps: int) -> float:
        """Learning rate of step ``index`` of ``steps``; a pure function, so there is nothing to checkpoint."""
        if index < self.warmup:
            return self.lr * (index + 1) / self.warmup
        done = (index - self.warmup) / max(steps - self.warmup, 1)
        if self.decay == "linear":
            return self.lr * (1 - (1 - self.final) * done)
        if self.decay == "cosine":
            return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))
        return self.lr


@dataclass(frozen=True)
class Run:
    """How long and how a recipe trains, and how often it reports."""

    steps: int = 1000
    """Steps of the trainer; every turn that is due is taken in each."""
    batch: int = 64
    """Samples of one micro-batch."""
    accumulate: int = 1
    """Micro-batches of one update."""
    seed: int = 0
    """Of all randomness: the same seed gives the same run, bit for bit on CPU."""
    ema: float = 0.99
    """Decay of the running average of the student that is evaluated and exported."""
    clip: float = 1.0
    """Largest gradient norm of a turn; 0 does not clip."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    preview_every: int = 0
    """Steps between pictures in samples/; 0 makes one, at the end."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves at the end and on an interrupt only."""
    keep_last: int = 2
    """Checkpoints kept."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, mps."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice. Small networks are fastest on one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside networks; weights, conversions and losses stay float32."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "batch", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1; got {getattr(self, name)}")
        for name in ("clip", "preview_every", "save_every", "threads"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"run.{name} must be at least 0; got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"run.ema must lie in [0, 1); got {self.ema}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed must lie in [0, 2^63); got {self.seed}")


class Trainer:
    """Trains the student (and critic, discriminator) of ``nets`` by ``objective``.

    Args:
        nets: networks by role. ``ema`` and the objective's averages are added as copies of the student.
        objective: the method.
        optimizers: one per network that moves.
        specs: their learning-rate rules, same keys; None leaves the optimizers' rates alone.
        data: where batches come from.
        run: lengths and frequencies.
        out: run directory; None trains without writing anything.
        preview: called with the averaged student and the number of steps done; makes a picture.

    Raises:
        ValueError: if a network or an optimizer that the objective needs is missing.
    """

    def __init__(
        self,
        nets: Nets,
        objective: Objective,
        optimizers: Mapping[str, Optimizer],
        data: Source,
        run: Run,
        *,
        specs: Mapping[str, AdamW] | None = None,
        out: Path | None = None,
        preview: Callable[[torch.nn.Module, int], None] | None = None,
    ):
        self.turns = objective.turns()
        movers = {name for turn in self.turns for name in turn.moves}
        missing = sorted((objective.needs | movers) - set(nets))
        if missing:
            raise ValueError(f"{type(objective).__name__} needs {missing}; got {sorted(nets)}")
        if movers != set(optimizers):
            raise ValueError(
                f"{type(objective).__name__} moves {sorted(movers)}, one optimizer each; got {sorted(optimizers)}"
            )
        self.nets, self.objective, self.optimizers, self.data, self.run = nets, objective, dict(optimizers), data, run
        self.specs = dict(specs or {})
        self.preview = preview
        self.watch: Callable[[torch.nn.Module, int], bool] | None = None
        """Called with the averaged student and the steps done, before each step and at the end; True ends training."""
        self.averages = {"ema": run.ema, **objective.averages()}
        for name in self.averages:
            nets[name] = copy.deepcopy(nets.student).requires_grad_(False)
        self.index = 0
        self.metrics = MetricsFile(out / "metrics.jsonl" if out else None)
        self.checkpoints = Checkpoints(out / "checkpoints", run.keep_last) if out else None

    def step(self, index: int) -> dict[str, Tensor]:
        """All turns that are due at ``index``.

        Returns:
            Logged scalars by ``turn/term``, still on their device.

        Raises:
            FloatingPointError: if a loss or a gradient is not finite; names the turn. Nobody moves in that turn.
        """
        logs: dict[str, Tensor] = {}
        seed, device, parts = self.run.seed, self.run.device, self.run.accumulate
        micro_batches = [(self.data(Step.at(index * parts + micro, seed, _DATA, micro)), {}) for micro in range(parts)]
        for k, turn in enumerate(self.turns):
            if not turn.due(index):
                continue
            terms: dict[str, Tensor] = {}  # means over micro-batches; "loss" is the sum of the turn's losses
            with only_trains(self.nets, turn.moves) as params:  # everyone else is a fixed function
                for micro, (batch, shared) in enumerate(micro_batches):
                    step = Step.at(index, seed, k, micro, device=device, shared=shared)
                    for loss_of in turn.losses:  # one graph alive at a time
                        loss = loss_of(self.nets, batch, step)
                        (loss.total / parts).backward()
                        for term, value in loss.logs().items():
                            terms[term] = terms.get(term, 0.0) + value / parts
                terms["grad_norm"] = self._clip(params, terms["loss"], turn.name, index)
            logs |= {f"{turn.name}/{term}": value for term, value in terms.items()}
            for name in turn.moves:
                if name in self.specs:
                    for group in self.optimizers[name].param_groups:
                        group["lr"] = self.specs[name].rate(index, self.run.steps)
                self.optimizers[name].step()
                self.optimizers[name].zero_grad(set_to_none=True)
        if any("student" in turn.moves and turn.due(index) for turn in self.turns):
            for name, decay in self.averages.items():
                update_average(self.nets[name], self.nets.student, decay)
        return logs

    def _clip(self, params: list[torch.nn.Parameter], loss: Tensor, turn: str, index: int) -> Tensor:
        """Clip gradients in place and return their norm; the one time in a turn that the host waits for the device."""
        norm = clip_grad_norm_(params, self.run.clip or math.inf, foreach=True)
        if not bool((norm + loss).isfinite()):
            for p in params:
                p.grad = None
            raise FloatingPointError(
                f"turn {turn!r}: not finite at step {index} (loss {float(loss):g}, gradient norm {float(norm):g}); "
                "start a new run with a lower learning rate or other loss weights (older checkpoints are intact)"
            )
        return norm

    def fit(self) -> None:
        """Train to ``run.steps``, from wherever the last checkpoint left off.

        Raises:
            KeyboardInterrupt: after ^C, when the step under way is done and a checkpoint is written.
        """
        run = self.run
        with Progress(type(self.objective).__name__.lower(), self.index, run.steps) as progress, _interrupts() as stop:
            while self.index < run.steps and not stop:
                if self.watch and self.watch(self.nets.ema, self.index):
                    break
                logs = self.step(self.index)
                self.index += 1
                self.metrics.add(logs)
                if self.index % run.log_every == 0 or self.index == run.steps:
                    progress.show(self.metrics.write(self.index))
                progress.advance()
                if self.preview and self.index < run.steps and due(self.index, run.preview_every):
                    self.preview(self.nets.ema, self.index)
                if due(self.index, run.save_every) and self.index < run.steps:
                    self.save()
        self.save()
        if stop:
            raise KeyboardInterrupt
        if self.watch:
            self.watch(self.nets.ema, self.index)
        if self.preview:
            self.preview(self.nets.ema, self.index)

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on; nothing without a run directory."""
        if self.checkpoints is not None:
            self.checkpoints.save(self.index, self.nets, self.optimizers, self.metrics.window())

    def resume(self) -> bool:
        """Go on from the newest good checkpoint, bit for bit as if there had been no interruption.

        Returns:
            Whether there was one.
        """
        loaded = self.checkpoints.load(self.nets, self.optimizers) if self.checkpoints else None
        if loaded is None:
            self.metrics.rewind(0, {})  # a run that was stopped before its first checkpoint may have left lines
            return False
        self.index, window = loaded
        self.metrics.rewind(self.index, window)
        return True


def due(index: int, every: int) -> bool:
    """Whether something that happens ``every`` steps (0: never) happens at ``index``."""
    return every > 0 and index % every == 0


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of raising, so that a step is finished; a second one raises at once."""
    seen: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(signum)

    try:
        old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield seen
        return
    try:
        yield seen
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
