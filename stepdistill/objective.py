"""What an objective is: frozen hyper-parameters that list their turns.

An objective owns no network, no optimizer and no state. The trainer walks through ``turns()``; each turn names who
moves and the losses that move them. Random draws come from ``Step`` alone.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from stepdistill.functional.distances import LPIPS, Distance
from stepdistill.models.denoiser import Cond, Denoiser
from stepdistill.models.nets import Nets
from stepdistill.randomness import Part, Stream
from stepdistill.sampling import Sampler


@dataclass(frozen=True)
class Batch:
    """What one micro-step trains on; which fields are set depends on the data, see ``Objective.data``."""

    cond: Cond
    """Conditions, each (B, ...)."""
    shape: tuple[int, ...]
    """Shape of the samples, (B, ...)."""
    x0: Tensor | None = None
    """Real samples, (B, ...)."""
    path: Tensor | None = None
    """The teacher's own states on the student's grid, (B, K + 1, ...): from the noise, index 0, to its sample."""

    def __len__(self) -> int:
        """Number of samples."""
        return self.shape[0]


@dataclass(frozen=True)
class Step:
    """What changes from step to step: the index, the randomness, and what this step's turns may share."""

    index: int
    rng: Stream
    shared: dict[str, Tensor] = field(default_factory=dict, compare=False)
    """Detached tensors that one turn leaves for the next at the same index and batch, such as the student's sample."""
    number: int | None = None
    """Which micro-batch of the run this is, from 0; None takes the index, as where each step has one micro-batch."""

    @classmethod
    def at(
        cls,
        index: int,
        *stream: int,
        device: torch.device | str = "cpu",
        shared: dict[str, Tensor] | None = None,
        part: Part = Part(),  # noqa: B008 (immutable)
        number: int | None = None,
    ) -> Step:
        """A step whose draws depend on ``index`` and ``stream`` (seed, turn, micro-batch) and nothing else.

        Draws are one row a sample. ``part`` says which samples of the batch are this process's: it gets their rows of
        what one process with the whole batch would draw.

        torch's CPU generator takes 32 bits of seed, so among 100,000 steps one or two share their draws.
        """
        digest = hashlib.blake2b(struct.pack(f"<{len(stream) + 1}q", index, *stream), digest_size=8).digest()
        rng = Stream(device, part).manual_seed(int.from_bytes(digest, "little", signed=True))
        return cls(index, rng, {} if shared is None else shared, number)

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, (B, ...), float32."""
        rng = self.rng
        return rng.rows(shape[0], lambda n: torch.randn((n, *shape[1:]), generator=rng, device=rng.device))

    def rows(self, n: int, chosen: Callable[[int], bool]) -> Tensor:
        """Which of this process's ``n`` samples are chosen, by their number in the run: counted on from batch to batch,
        over all processes, so that small batches take turns; int64.
        """
        part = self.rng.part
        first = ((self.index if self.number is None else self.number) * part.of + part.index) * n
        return torch.tensor([i for i in range(n) if chosen(first + i)], dtype=torch.long, device=self.rng.device)

    def evaluated(self, rows: Tensor) -> Tensor:
        """Of chosen rows those that networks are evaluated for: all, or the first sample if this process has none and
        others may have. A network in shards is evaluated by all processes, or by none; what is too much is dropped.
        """
        return rows if len(rows) or self.rng.part.of == 1 else rows.new_zeros(1)

    def rand(self, n: int) -> Tensor:
        """Uniform in [0, 1), (n,), float64."""
        return self.rng.rows(n, self._rand)

    def integers(self, high: int, n: int) -> Tensor:
        """Uniform in {0, ..., high - 1}, (n,), int64."""
        return self.rng.rows(n, lambda n: torch.randint(high, (n,), generator=self.rng, device=self.rng.device))

    def stratified(self, n: int) -> Tensor:
        """Uniform in [0, 1), (n,), float64: one in each of as many equal cells as the batch has samples, shuffled."""

        def draw(n: int) -> Tensor:
            cells = torch.randperm(n, generator=self.rng, device=self.rng.device)  # so that no sample has its own cell
            return (cells + self._rand(n)) / n

        return self.rng.rows(n, draw)

    def shared_rand(self) -> Tensor:
        """Uniform in [0, 1), (1,), float64: one number for the whole batch, on all processes."""
        return self._rand(1)

    def shared_integer(self, high: int) -> int:
        """Uniform in {0, ..., high - 1}: one number for the whole batch, on all processes."""
        return int(torch.randint(high, (1,), generator=self.rng, device=self.rng.device))

    def _rand(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.rng, device=self.rng.device, dtype=torch.float64)


class Loss:
    """A scalar to backpropagate, and named terms to log.

    Args:
        total: what is minimised.
        **terms: detached when logged; scalars.
    """

    def __init__(self, total: Tensor, **terms: Tensor):
        self.total = total
        self.terms = terms

    def logs(self) -> dict[str, Tensor]:
        """Detached scalars by name, ``loss`` among them; still on their device."""
        return {"loss": self.total.detach()} | {k: v.detach() for k, v in self.terms.items()}


class Turn:
    """One optimizer update: losses backpropagated one after the other, then a step of those who move.

    Args:
        *losses: each (nets, batch, step) -> Loss; their graphs never coexist.
        moves: names of the networks that are updated; everyone else is a fixed function.
        every: the turn is taken at indices divisible by it (two-time-scale updates).
        name: what the logs call it; default the networks moved.
        start: the first index at which it may be taken.
        stop: the first index from which it is not taken any more; None keeps it to the end.

    Raises:
        ValueError: if it would never be taken.
    """

    def __init__(
        self,
        *losses: Callable[[Nets, Batch, Step], Loss],
        moves: tuple[str, ...],
        every: int = 1,
        name: str | None = None,
        start: int = 0,
        stop: int | None = None,
    ):
        if every < 1:
            raise ValueError(f"every (the objective's student_every) must be at least 1; got {every}")
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"a turn needs 0 <= start < stop; got start {start} and stop {stop}")
        self.losses = losses
        self.moves = moves
        self.every = every
        self.name = name or "+".join(moves)
        self.start = start
        self.stop = stop

    def due(self, index: int) -> bool:
        """Whether the turn is taken at ``index``."""
        return index % self.every == 0 and self.start <= index and (self.stop is None or index < self.stop)

    def taken(self, steps: int) -> int:
        """How often the turn is taken in the first ``steps`` steps."""
        end = steps if self.stop is None else min(self.stop, steps)
        return max(-(-end // self.every) - -(-self.start // self.every), 0)


@dataclass(frozen=True)
class Objective(ABC):
    """Hyper-parameters of one method; its own config."""

    needs: ClassVar[frozenset[str]]
    """Networks that must be there: of student, teacher, critic, disc."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Networks that move under some settings only, such as a discriminator whose term may be switched off."""
    data: ClassVar[frozenset[str]] = frozenset()
    """Batch fields beyond the conditions that must be set: of x0, path. Empty: data-free."""
    two_time: ClassVar[bool] = False
    """Whether the student is told, beside the time, the time it heads for; see ``models.two_time``."""
    guides: ClassVar[bool] = True
    """Whether the student learns the teacher's guidance: whether a loss, or the data, asks the guided teacher."""
    between_images: ClassVar[frozenset[str]] = frozenset()
    """Fields that hold a distance between clean samples, which may be LPIPS."""
    family: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def turns(self) -> tuple[Turn, ...]:
        """The updates of one step, in the order of play."""

    def check(self, sampler: Sampler) -> None:  # noqa: B027 (most objectives serve any grid)
        """Refuse a student's sampler that does not go with this objective.

        Raises:
            ValueError: naming both.
        """

    def check_start(self, sampler: Sampler, start: Sampler | None) -> None:  # noqa: B027 (most start from anywhere)
        """Refuse a warm start's sampler (None: there is no warm start) that does not go with this objective.

        Raises:
            ValueError: naming both.
        """

    def check_guidance(self, *, guided: bool, varies: bool, told: bool) -> None:  # noqa: B027 (most take any)
        """Refuse guidance that does not go with this objective.

        Args:
            guided: the teacher's scale is not 1, or it varies.
            varies: it is drawn for each sample.
            told: the student has the scale as an input.

        Raises:
            ValueError: naming the fields.
        """

    def serves(self, sampler: Sampler) -> tuple[Sampler, ...]:
        """All samplers that a student with this one is trained for: this one alone, unless a method says otherwise."""
        return (sampler,)

    def averages(self) -> Mapping[str, float]:
        """Running averages of the student that the method itself uses, name -> decay, kept in ``Nets``."""
        return {}

    def extras(self, student: Denoiser) -> dict[str, nn.Module]:
        """Modules with state of the method's own, such as learned weightings; kept in ``Nets``."""
        return {}


def with_networks(objective: Objective, network: Callable[[LPIPS], Distance]) -> Objective:
    """An objective that, like those it contains, has networks in the place of ``LPIPS`` values.

    Args:
        objective: left as it is.
        network: makes one.

    Raises:
        ValueError: if an LPIPS stands where no images are compared.
    """
    found: dict[str, Any] = {}
    for name, value in ((f.name, getattr(objective, f.name)) for f in fields(objective)):
        if isinstance(value, Objective):
            found[name] = with_networks(value, network)
        elif isinstance(value, LPIPS):
            if name not in objective.between_images:
                raise ValueError(
                    f"objective.{name}: LPIPS compares images, and {type(objective).__name__}'s {name} stands between "
                    "others; use Huber() or L2()"
                )
            found[name] = network(value)
    return replace(objective, **found) if found else objective


_REGISTRY: dict[str, type[Objective]] = {}
O = TypeVar("O", bound=type[Objective])  # noqa: E741


def register(name: str, *, family: str, paper: str) -> Callable[[O], O]:
    """Class decorator: put an objective into the table that recipes, ``stepdistill methods`` and the docs read.

    Args:
        name: its name in recipes and logs.
        family: the folder it stands in.
        paper: arXiv id.

    Raises:
        ValueError: if the name is taken.
    """

    def add(cls: O) -> O:
        if name in _REGISTRY:
            raise ValueError(f"objective {name!r} is registered already, by {_REGISTRY[name].__module__}")
        cls.family, cls.paper = family, paper
        _REGISTRY[name] = cls
        return cls

    return add


def registered() -> dict[str, type[Objective]]:
    """All registered objectives by name."""
    return dict(_REGISTRY)
