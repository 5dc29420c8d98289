"""An endless stream of rows by position, shuffled within blocks, so that a position can be found again."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from stepdistill.objective import Step

KEPT = 3
"""Blocks kept in memory: a batch may reach over an edge, and a bad row's stand-in stands behind it."""


class Rewindable(Protocol):
    """What ``datasets.IterableDataset`` offers."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stream:
    """Rows of a data set that is only read forwards, epoch after epoch, as if they could be picked.

    Block k holds the rows k S, ..., k S + S - 1 of the endless stream and is permuted by a generator of its own:
    position p is a function of p, the seed and the data set, and nothing needs to be remembered of what came before.
    (A shuffle buffer that is refilled row by row, as ``datasets`` has, is a function of everything read so far.) The
    reader's state at each block is noted down, in a file if one is given, so that going to a block again, after a
    resume say, does not read everything before it.

    Args:
        fresh: makes the data set, which must give the same rows in the same order every time.
        block: S.
        seed: of the permutations.
        notes: file for the states; None keeps them in memory.

    Raises:
        ValueError: if the data set is empty.
    """

    def __init__(self, fresh: Callable[[], Rewindable], block: int, seed: int, notes: Path | None = None):
        self.fresh, self.block, self.seed, self.notes = fresh, block, seed, notes
        # of blocks: the number of the first row, and the data set's state before it
        self._states: dict[int, tuple[int, dict[str, Any] | None]] = {0: (0, None)}
        self._blocks: OrderedDict[int, list[tuple[int, dict[str, Any]]]] = OrderedDict()
        self._reader: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._next = -1
        if notes is not None and notes.is_file():
            for line in notes.read_text().splitlines():
                self._recall(line)

    def at(self, position: int) -> tuple[int, dict[str, Any]]:
        """The row at a position, and its number in the data set."""
        number, offset = divmod(position, self.block)
        rows = self._blocks.get(number)
        if rows is None:
            rows = self._blocks[number] = self._read(number)
            if len(self._blocks) > KEPT:
                self._blocks.popitem(last=False)
        return rows[self._order(number)[offset]]

    @functools.lru_cache(maxsize=KEPT)  # noqa: B019 (as long-lived as the run)
    def _order(self, number: int) -> list[int]:
        return torch.randperm(self.block, generator=Step.at(number, self.seed, self.block).rng).tolist()

    def _read(self, number: int) -> list[tuple[int, dict[str, Any]]]:
        if number != self._next:
            self._next = max(known for known in self._states if known <= number)
            row, state = self._states[self._next]
            self._row, self._data = row, self.fresh()
            if state is not None:
                self._data.load_state_dict(state)
            self._reader = self._onwards()
        while True:
            self._note(self._next)
            rows = list(itertools.islice(self._reader, self.block))
            self._next += 1
            if self._next > number:
                return rows

    def _onwards(self) -> Iterator[tuple[int, dict[str, Any]]]:
        while True:
            for cells in self._data:
                self._row += 1
                yield self._row - 1, cells
            if self._row == 0:
                raise ValueError("data.path: the data set is empty")
            self._row, self._data = 0, self.fresh()

    def _note(self, number: int) -> None:
        if number in self._states:
            return
        self._states[number] = (self._row, self._data.state_dict())
        if self.notes is not None:
            self.notes.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps([number, *self._states[number]])
            with self.notes.open("a") as file:  # one write a line: several processes may note the same
                file.write(f"{line} {_checksum(line)}\n")

    def _recall(self, line: str) -> None:
        text, _, checksum = line.rpartition(" ")
        if checksum == _checksum(text):  # a killed process may have torn its last line
            number, row, state = json.loads(text)
            self._states[number] = (row, state)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
