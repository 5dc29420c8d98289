"""Texts to conditions and images to latents, once: through the cache on disk, or a table in memory.

The numbers of a group's members depend, in their last bits, on who is encoded together. So whenever one member of a
group is not in the cache the whole group is encoded, and a fill that was killed ends with the same bits.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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

    def __call__(self, group: Sequence[T]) -> Encoded | None:
        """A group's tensors, encoded where the cache has not all of them; None if none of them can be used."""
        keys = self._keys(group)
        found = {i: self.store.get(key) if self.store else None for i, key in keys.items()}
        if None in found.values():
            found |= self._made(group, keys, {i for i, tensors in found.items() if tensors is None})
        members = [i for i in sorted(found) if found[i] is not None]
        if not members:
            return None
        names = found[members[0]]
        return Encoded({name: torch.stack([found[i][name] for i in members]) for name in names}, members)

    def all(self, things: Sequence[T], at_once: int) -> Encoded | None:
        """All of them in groups, from the cache or made now; the networks go back where they were.

        Several processes begin at different groups, so that they share the work by way of the cache.
        """
        starts = range(0, len(things), at_once)
        found: dict[int, Encoded | None] = {}
        for start in starts:
            group = things[start : start + at_once]
            keys = self._keys(group)
            if self.store and keys and all(map(self.store.has, keys.values())):
                found[start] = self._stored(keys)
        missing = [start for start in starts if found.get(start) is None]
        if missing:
            turn = os.getpid() % len(missing) if self.store else 0
            opened, device = self.setting.opened, self.setting.device
            groups = {start: things[start : start + at_once] for start in (*missing[turn:], *missing[:turn])}
            total = sum(map(len, groups.values()))
            with lent(opened, device, vae=self.vae), Progress(self.title, 0, total) as progress:
                for start, group in groups.items():
                    found[start] = self(group)
                    progress.advance(len(group))
        good = [(start, found[start]) for start in starts if found[start] is not None]
        if not good:
            return None
        tensors = {name: torch.cat([part.tensors[name] for _, part in good]) for name in good[0][1].tensors}
        return Encoded(tensors, [start + i for start, part in good for i in part.members])

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

    def _stored(self, keys: dict[int, str]) -> Encoded | None:
        found = {i: self.store.get(key) for i, key in keys.items()}
        if None in found.values():
            return None
        return Encoded({n: torch.stack([f[n] for f in found.values()]) for n in found[min(found)]}, list(found))

    def _made(self, group: Sequence[T], keys: dict[int, str], absent: set[int]) -> dict[int, dict[str, Tensor] | None]:
        """What the absent members come to, None for those that cannot be used; the whole group is encoded."""
        ready: dict[int, Any] = {}
        for i in keys:
            try:
                ready[i] = self.prepared(group[i])
            except Bad as problem:
                self.bad(group[i], problem)
        if not ready:
            return {}
        for name, part in companions(self.setting.opened).items():
            if (name == "vae") == self.vae:
                part.to(self.setting.device)  # to stay, unless they are lent
        made = {name: value.cpu() for name, value in self.encode(list(ready.values())).items()}
        rows = {i: {n: v[row] for n, v in made.items()} for row, i in enumerate(ready) if i in absent}
        if self.store:
            self.store.put({keys[i]: tensors for i, tensors in rows.items()})
        return rows


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
    rest = encoding.all(unique[AT_ONCE:], AT_ONCE)
    table = to_device({k: torch.cat([v, rest.tensors[k]]) if rest else v for k, v in first.items()}, device)
    place = {text: i for i, text in enumerate(unique)}
    entry = torch.tensor([place[text] for text in texts])
    return lambda rows: {k: v[entry[rows]] for k, v in table.items()}


def _never(text: str, problem: Bad) -> None:
    raise problem


def _config(part: nn.Module | diffusers.DiffusionPipeline) -> list[tuple[str, object]]:
    """Settings of a network or a pipeline, without the places they were loaded from."""
    config = part.config if isinstance(part.config, dict) else part.config.to_dict()
    return sorted((k, repr(v)) for k, v in config.items() if k not in ("_name_or_path", "transformers_version"))
