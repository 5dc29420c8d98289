"""The training loop: one walk over an objective's turns, in the order things happen."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.optim import Optimizer

from stepdistill import distributed
from stepdistill.checkpoint import Checkpoints, Progressed
from stepdistill.logging import MetricsFile, Progress, Trackers
from stepdistill.models.nets import Nets, add_averages, only_trains, update_average
from stepdistill.objective import Batch, Objective, Step, Turn
from stepdistill.placement import Placed
from stepdistill.randomness import Part
from stepdistill.run import AdamW, Run

Source = Callable[[Step], Batch]
"""Where batches come from: a function of the step's index and randomness alone, so that a resumed run sees the same.

The index counts micro-batches: step i of a trainer that accumulates four asks for 4 i, ..., 4 i + 3.
"""

ECHO = 3.0
"""Seconds in which a launcher repeats a signal."""

_DATA = -1  # the data's stream of randomness, next to one per turn


class LossScale:
    """What one turn's loss is multiplied by, so that float16 gradients do not vanish (arXiv:1710.03740 sec. 3.2).

    torch.amp.GradScaler's rule and numbers, on the norm over all processes, so that all of them skip the same updates.
    """

    def __init__(self, scale: float = 2.0**16, clean: int = 0):
        self.scale, self.clean = scale, clean  # exact in a checkpoint: a power of two, and a count

    def grow(self) -> None:
        """After an update with finite gradients."""
        self.clean += 1
        if self.clean == 2000:
            self.scale, self.clean = 2 * self.scale, 0

    def shrink(self) -> bool:
        """After gradients that were not; returns whether a smaller scale may help."""
        self.scale, self.clean = self.scale / 2, 0
        return self.scale >= 1


class Trainer:
    """Trains the student (and critic, discriminator) of ``nets`` by ``objective``.

    Args:
        nets: networks by role. ``ema`` and the objective's averages are added as copies of the student.
        objective: the method.
        optimizers: one per network that moves.
        specs: their learning-rate rules, same keys; None leaves the optimizers' rates alone.
        data: where batches come from.
        run: lengths and frequencies.
        placed: networks that are elsewhere between turns; see ``placement.place``.
        out: run directory; None trains without writing anything.
        preview: called in all processes with the averaged student and the number of steps done; makes a picture.

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
        placed: Placed | None = None,
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
        self.placed = placed or Placed()
        self.preview = preview
        self.health: Callable[[Nets, int], Mapping[str, float]] | None = None
        """Called in all processes with the networks and the number of steps done; returns figures for trackers."""
        self.watch: Callable[[torch.nn.Module, int], bool] | None = None
        """Called with the averaged student and the steps done, before each step and at the end; True ends training."""
        self.averages = {"ema": run.ema, **objective.averages()}
        add_averages(nets, self.averages)
        self.part = Part(distributed.rank(), distributed.world(), distributed.share(run.batch))
        self.scales = {turn.name: LossScale() for turn in self.turns} if run.dtype == "float16" else {}
        self.index = 0
        self.out = out
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
        micro_batches = [(self._batch(index * parts + micro, micro), {}) for micro in range(parts)]
        # averages move once a step, after the student's last turn
        last = max(
            (k for k, turn in enumerate(self.turns) if turn.due(index) and "student" in turn.moves), default=None
        )
        for k, turn in enumerate(self.turns):
            if not turn.due(index):
                continue
            scale = self.scales[turn.name].scale if self.scales else 1.0
            terms: dict[str, Tensor] = {}  # means over micro-batches; "loss" is the sum of the turn's losses
            with only_trains(self.nets, turn.moves) as params:  # everyone else is a fixed function
                for micro, (batch, shared) in enumerate(micro_batches):
                    number = index * parts + micro
                    step = Step.at(index, seed, k, micro, device=device, shared=shared, part=self.part, number=number)
                    for loss_of in turn.losses:  # one graph alive at a time
                        loss = loss_of(self.nets, batch, step)
                        (loss.total / (parts / scale)).backward()
                        for term, value in loss.logs().items():
                            terms[term] = terms.get(term, 0.0) + value / parts
                distributed.average_gradients(params)
                moved = self._clip(params, scale, terms, turn.name, index)
            logs |= {f"{turn.name}/{term}": value for term, value in terms.items()}
            if moved:
                self._move(turn, index)
            if moved and k == last:
                for name, decay in self.averages.items():
                    with self.placed.awake(name):
                        update_average(self.nets[name], self.nets.student, decay)
            self.placed.after_turn()
        return logs

    def _batch(self, number: int, micro: int) -> Batch:
        """This process's part of micro-batch ``number``: parts count as batches of their own in the data's order."""
        step = Step.at(number, self.run.seed, _DATA, micro, part=self.part)
        return self.data(replace(step, index=number * self.part.of + self.part.index))

    def _clip(
        self, params: list[torch.nn.Parameter], scale: float, terms: dict[str, Tensor], turn: str, index: int
    ) -> bool:
        """Clip gradients in place and log their norm; the one time in a turn that the host waits for the device.

        Returns:
            Whether to move: not when scaled gradients have overflown, and a smaller scale is tried the next time.
        """
        loss, norm = terms["loss"], distributed.clip_gradients(params, self.run.clip or math.inf, scale)
        finite = bool((norm + loss).isfinite())
        if self.scales:
            terms["loss_scale"] = loss.new_tensor(scale, dtype=torch.float64)
            overflown = not finite and bool(loss.isfinite())
            if overflown and self.scales[turn].shrink():
                for p in params:
                    p.grad = None
                return False
            self.scales[turn].grow()
        if not finite:
            for p in params:
                p.grad = None
            raise FloatingPointError(
                f"turn {turn!r}: not finite at step {index} (loss {float(loss):g}, gradient norm {float(norm):g}); "
                "start a new run with a lower learning rate or other loss weights (older checkpoints are intact)"
            )
        terms["grad_norm"] = norm
        return True

    def _move(self, turn: Turn, index: int) -> None:
        """A step of the optimizers of those who move."""
        for name in turn.moves:
            if name in self.specs:
                for group in self.optimizers[name].param_groups:
                    group["lr"] = self.specs[name].rate(index, self.run.steps)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)

    def fit(self) -> None:
        """Train to ``run.steps``, from wherever the last checkpoint left off.

        Raises:
            KeyboardInterrupt: after ^C, when the step under way is done and a checkpoint is written.
        """
        run, title = self.run, type(self.objective).__name__.lower()
        trackers = Trackers(run.trackers if self.out else (), self.out or Path(), self.index)
        stopped = False
        with Progress(title, self.index, run.steps) as progress, _interrupts() as stop, self._writing():
            while self.index < run.steps and not stopped:
                if self._watched():
                    break
                if due(self.index, run.health_every):
                    self._examine(trackers)
                logs = self.step(self.index)
                self.index += 1
                self.metrics.add(logs)
                if self.index % run.log_every == 0 or self.index == run.steps:
                    means = self.metrics.write(self.index)
                    trackers.log(means, self.index)
                    progress.show(means)
                progress.advance()
                if self.index < run.steps and due(self.index, run.preview_every):
                    self._show()
                if self.index < run.steps and due(self.index, run.save_every):
                    self.save()
                stopped = distributed.any_of(bool(stop))
            self.save()
        if run.health_every and not stopped:
            self._examine(trackers)
        trackers.close()
        if stopped:
            raise KeyboardInterrupt
        self._watched()
        self._show()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Checkpoints begun within the block are written, or have failed, after it."""
        try:
            yield
        finally:
            if self.checkpoints is not None:
                self.checkpoints.join()
        if self.checkpoints is not None:
            self.checkpoints.finish()

    def _examine(self, trackers: Trackers) -> None:
        """Figures of health; nobody moves."""
        if self.health is None:
            return
        with self.placed.awake("ema"):
            figures = self.health(self.nets, self.index)
        self.placed.after_turn()
        trackers.log({f"health/{name}": value for name, value in figures.items()}, self.index)

    def _watched(self) -> bool:
        if self.watch is None:
            return False
        with self.placed.awake("ema"):
            return self.watch(self.nets.ema, self.index)

    def _show(self) -> None:
        if self.preview:
            with self.placed.awake("ema"):
                self.preview(self.nets.ema, self.index)

    def save(self) -> None:
        """Begin to write a checkpoint of everything that the next step depends on; nothing without a run directory.

        Raises:
            OSError: if the one before could not be written.
        """
        if self.checkpoints is not None:
            scales = {name: (one.scale, one.clean) for name, one in self.scales.items()}
            done = Progressed(self.index, self.metrics.window(), scales)
            self.checkpoints.save(done, self.nets, self.optimizers)

    def resume(self) -> bool:
        """Go on from the newest good checkpoint, bit for bit as if there had been no interruption.

        Returns:
            Whether there was one.
        """
        done = self.checkpoints.load(self.nets, self.optimizers) if self.checkpoints else None
        done = done or Progressed(0)
        self.index = done.index
        self.scales |= {name: LossScale(*scale) for name, scale in done.scales.items()}
        self.metrics.rewind(done.index, done.window)  # a run stopped before its first checkpoint may have left lines
        return self.index > 0


def due(index: int, every: int) -> bool:
    """Whether something that happens ``every`` steps (0: never) happens at ``index``."""
    return every > 0 and index % every == 0


@contextmanager
def _interrupts() -> Iterator[list[float]]:
    """Collects SIGINT and SIGTERM instead of raising, so that a step is finished; a second one raises at once.

    Launchers repeat what the terminal has sent to all their processes; that is no second one.
    """
    seen: list[float] = []

    def note(signum: int, frame: FrameType | None) -> None:
        echo = distributed.world() > 1 and seen and time.monotonic() - seen[0] < ECHO
        if seen and not echo:
            raise KeyboardInterrupt
        seen.append(time.monotonic())

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
