"""Texts to conditions and images to latents, once: through the cache on disk, or a table in memory.

The numbers of a group's members depend, in their last bits, on who is encoded together. So whenever one member of a
group is not in the cache the whole group is encoded, and a fill that was killed ends with the same bits.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import diffusers
import torch
import transformers
from torch import Tensor, nn

from stepdistill.data.base import Setting, companions, lent, to_device, weights_hash
from stepdistill.data.cache import Store
from stepdistill.data.report import Bad
from stepdistill.data.rows import FITTING, Row, fitted
from stepdistill.logging import Progress
from stepdistill.models.denoiser import Cond
from stepdistill.models.families.base import Size

AT_ONCE = 64
"""Prompts encoded together."""
PIXELS_AT_ONCE = 2**22
"""Of images that the autoencoder takes together, at most 64."""

VERDICT = "bad"
"""Name of the tensor, a text, that stands in the cache for a thing that cannot be used."""

T = TypeVar("T")


class Encoded(NamedTuple):
    """Members of a group that could be used."""

    tensors: dict[str, Tensor]
    """Each (G, ...) on the CPU."""
    members: list[int]
    """Their numbers in the group, G of them."""


class Encoding(ABC, Generic[T]):
    """A group of things to tensors, by some networks of the pipeline, through the cache.

    Args:
        setting: the run.
        store: the cache; None keeps nothing.
        size: of the samples, in pixels; None takes the teacher's.
        bad: told of every thing that cannot be used; raises if the user wants that.
    """

    kind: str
    vae: bool
    title: str

    def __init__(self, setting: Setting, store: Store | None, size: Size | None, bad: Callable[[T, Bad], None]):
        self.setting, self.store, self.bad = setting, store, bad
        self.size = size or setting.opened.size
        self._law = ""

    @abstractmethod
    def identity(self, thing: T) -> bytes:
        """What tells it from others; may raise Bad."""

    @abstractmethod
    def prepared(self, thing: T) -> Any:
        """Made ready for ``encode``; may raise Bad."""

    @abstractmethod
    def encode(self, things: list[Any]) -> dict[str, Tensor]:
        """Prepared things, at least one, to tensors (G, ...)."""

    def law(self) -> str:
        """What the tensors depend on beside the things: weights, configs, sizes, versions; computed once."""
        if not self._law:
            opened = self.setting.opened
            parts = {name: part for name, part in companions(opened).items() if (name == "vae") == self.vae}
            facts = [
                self.kind, opened.family.name, opened.family.sample_shape(opened.pipeline, self.size),
                weights_hash(*parts.values()), {name: _config(part) for name, part in parts.items()},
                _config(opened.pipeline), diffusers.__version__, transformers.__version__, *self.facts(),
            ]  # fmt: skip
            self._law = hashlib.sha256(repr(facts).encode()).hexdigest()
        return self._law

    def facts(self) -> list[object]:
        """What else the tensors depend on."""
        return []

    def __call__(self, group: Sequence[T]) -> Encoded:
        """A group's tensors, encoded where the cache has not all of them."""
        keys = self._keys(group)
        found = {i: self.store.get(key) if self.store else None for i, key in keys.items()}
        if None in found.values():
            found |= self._made(group, keys, {i for i, tensors in found.items() if tensors is None})
        return self._usable(group, found)

    def all(self, things: Sequence[T], at_once: int) -> Encoded:
        """All of them in groups, from the cache or made now; the networks go back where they were.

        Several processes begin at different groups, so that they share the work by way of the cache.
        """
        groups = {start: things[start : start + at_once] for start in range(0, len(things), at_once)}
        found: dict[int, Encoded] = {}
        for start, group in groups.items() if self.store else ():
            stored = {i: self.store.get(key) for i, key in self._keys(group).items()}
            if None not in stored.values():
                found[start] = self._usable(group, stored)
        missing = [start for start in groups if start not in found]
        if missing:
            turn = os.getpid() % len(missing) if self.store else 0
            total = sum(len(groups[start]) for start in missing)
            with (
                lent(self.setting.opened, self.setting.device, vae=self.vae),
                Progress(self.title, 0, total) as progress,
            ):
                for start in (*missing[turn:], *missing[:turn]):
                    found[start] = self(groups[start])
                    progress.advance(len(groups[start]))
        parts = [(start, found[start]) for start in groups if found[start].members]
        names = parts[0][1].tensors if parts else ()
        tensors = {name: torch.cat([part.tensors[name] for _, part in parts]) for name in names}
        return Encoded(tensors, [start + i for start, part in parts for i in part.members])

    def _key(self, thing: T) -> str:
        content = hashlib.sha256(self.identity(thing)).hexdigest()
        return f"{self.kind}-{hashlib.sha256(f'{self.law()} {content}'.encode()).hexdigest()}"

    def _keys(self, group: Sequence[T]) -> dict[int, str]:
        keys = {}
        for i, thing in enumerate(group):
            try:
                keys[i] = self._key(thing) if self.store else ""
            except Bad as problem:
                self.bad(thing, problem)
        return keys

    def _usable(self, group: Sequence[T], found: Mapping[int, dict[str, Tensor]]) -> Encoded:
        """The tensors of those that have no verdict against them; ``bad`` is told the verdicts."""
        for i, tensors in found.items():
            if VERDICT in tensors:
                self.bad(group[i], Bad(*bytes(tensors[VERDICT].tolist()).decode().split(": ", 1)))
        members = [i for i in sorted(found) if VERDICT not in found[i]]
        names = found[members[0]] if members else ()
        return Encoded({name: torch.stack([found[i][name] for i in members]) for name in names}, members)

    def _made(self, group: Sequence[T], keys: dict[int, str], absent: set[int]) -> dict[int, dict[str, Tensor]]:
        """Tensors or verdicts of the absent members; the whole group is encoded."""
        ready: dict[int, Any] = {}
        made: dict[int, dict[str, Tensor]] = {}
        for i in keys:
            try:
                ready[i] = self.prepared(group[i])
            except Bad as problem:
                made[i] = {VERDICT: torch.tensor(list(str(problem).encode()), dtype=torch.uint8)}
        if ready:
            for name, part in companions(self.setting.opened).items():
                if (name == "vae") == self.vae:
                    part.to(self.setting.device)  # to stay, unless they are lent
            tensors = {name: value.cpu() for name, value in self.encode(list(ready.values())).items()}
            made |= {i: {name: value[row] for name, value in tensors.items()} for row, i in enumerate(ready)}
        made = {i: made[i] for i in absent}
        if self.store:
            self.store.put({keys[i]: tensors for i, tensors in made.items()})
        return made


class Texts(Encoding[str]):
    """Prompts to conditions."""

    kind, vae, title = "prompts", False, "encoding prompts"

    def identity(self, thing: str) -> bytes:
        """See ``Encoding``."""
        return thing.encode()

    def prepared(self, thing: str) -> str:
        """See ``Encoding``."""
        return thing

    def encode(self, things: list[str]) -> dict[str, Tensor]:
        """See ``Encoding``."""
        return self.setting.opened.encode(things, self.size)

    def facts(self) -> list[object]:
        """How long texts may be."""
        parts = self.setting.opened.pipeline.components.items()
        tokenizers = [(n, p) for n, p in parts if isinstance(p, transformers.PreTrainedTokenizerBase)]
        return [(n, p.model_max_length, sorted(p.get_vocab().items())) for n, p in tokenizers]


class Latents(Encoding[Row]):
    """Images, scaled and cropped to a size, to the modes of their latents."""

    kind, vae, title = "latents", True, "encoding images"

    def __init__(
        self, setting: Setting, store: Store | None, size: Size, bad: Callable[[Row, Bad], None], enlarge: float
    ):
        super().__init__(setting, store, size, bad)
        self.enlarge = enlarge

    @property
    def at_once(self) -> int:
        """Images that are encoded together."""
        return max(1, min(64, PIXELS_AT_ONCE // math.prod(self.size)))

    def identity(self, thing: Row) -> bytes:
        """See ``Encoding``."""
        content = thing.content()
        return content if isinstance(content, bytes) else content.contiguous().numpy().tobytes()

    def prepared(self, thing: Row) -> Tensor:
        """See ``Encoding``."""
        return fitted(thing.content(), self.size, self.enlarge)

    def encode(self, things: list[Tensor]) -> dict[str, Tensor]:
        """See ``Encoding``."""
        images = torch.stack(things).to(self.setting.device).float() / 127.5 - 1
        return {"latents": torch.cat([self.setting.opened.to_latents(part) for part in images.split(self.at_once)])}

    def facts(self) -> list[object]:
        """How images are fitted."""
        return [FITTING, self.enlarge]


def encoded(
    texts: Sequence[str], setting: Setting, memory: float, store: Store | None = None, size: Size | None = None
) -> Callable[[Tensor], Cond]:
    """A function from row numbers (B,) of ``texts`` to their conditions, each (B, ...) on the run's device.

    Args:
        texts: prompts; those that occur twice are encoded once.
        setting: the run.
        memory: GB that the table of all of them may take; beyond it they are encoded, or read from the cache, whenever
            they are asked for.
        store: the cache.
        size: of the samples, in pixels, for families that are told it; None takes the teacher's.

    Raises:
        ValueError: if the teacher takes no prompts.
    """
    encoding, device = Texts(setting, store, size, _never), setting.device
    unique = list(dict.fromkeys(texts))
    first = encoding.all(unique[:AT_ONCE], AT_ONCE).tensors
    each = sum(value.nbytes for value in first.values()) / len(unique[:AT_ONCE])
    if each * len(unique) > memory * 1e9:
        return lambda rows: to_device(encoding([texts[i] for i in rows.tolist()]).tensors, device)
    rest = encoding.all(unique[AT_ONCE:], AT_ONCE).tensors
    table = to_device({k: torch.cat([v, rest[k]]) if rest else v for k, v in first.items()}, device)
    place = {text: i for i, text in enumerate(unique)}
    entry = torch.tensor([place[text] for text in texts])
    return lambda rows: {k: v[entry[rows]] for k, v in table.items()}


def _never(text: str, problem: Bad) -> None:
    raise problem


def _config(part: nn.Module | diffusers.DiffusionPipeline) -> list[tuple[str, object]]:
    """Settings of a network or a pipeline, without the places they were loaded from."""
    config = part.config if isinstance(part.config, dict) else part.config.to_dict()
    return sorted((k, repr(v)) for k, v in config.items() if k not in ("_name_or_path", "transformers_version"))
