"""What to change in a recipe so that it fits a card: the least change first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from stepdistill.recipe import Recipe, Weights

GIB = 2**30
RESERVE = 0.06
"""Share of a card that the driver, the libraries' scratch space and the allocator's gaps take."""

Peak = Callable[[Recipe, float], float]
"""Peak bytes of a recipe; or, if what stands between turns is more than the number of bytes given, that."""


@dataclass(frozen=True)
class Fit:
    """A recipe that fits."""

    recipe: Recipe
    changes: tuple[str, ...]
    """Against the recipe asked about; empty if that fits."""
    peak: float
    """Bytes."""

    options: tuple[str, ...] = ()
    """The same for ``stepdistill distill``'s command line."""

    def __str__(self) -> str:
        return f"{', '.join(self.changes) or 'as it is'}: {self.peak / GIB:.3g} GiB"


@dataclass(frozen=True)
class _Change:
    says: str
    cost: int
    """What it takes in time, and a LoRA in what the student can learn, against the others."""
    to: Callable[[Recipe], Recipe]


def fit(recipe: Recipe, card: float, peak_of: Peak, devices: int = 1) -> Fit | None:
    """The recipe with the least change under which it fits.

    Batches are divided first, since micro-batches give the same updates; then come bfloat16 arithmetic, recomputed
    activations, idle networks on the CPU, and adapters, alone and together.

    Args:
        recipe: what shall run.
        card: its memory in GiB.
        peak_of: of a recipe; asked of it as it is, of the two smallest micro-batches, and of larger ones by those.
        devices: that share a batch.

    Returns:
        None if nothing fits.
    """
    limit = card * GIB * (1 - RESERVE)
    peak = peak_of(recipe, limit)
    if peak <= limit:
        return Fit(recipe, (), peak)
    for changes in _combinations(_changes(recipe)):
        changed = recipe
        for change in changes:
            changed = change.to(changed)
        batch, peak = _largest_batch(changed, limit, peak_of, devices)
        if batch:
            says = [change.says for change in changes]
            if batch < recipe.run.batch:
                changed = micro_batches(changed, batch)
                says.append(f"batch {batch} x accumulate {changed.run.accumulate}")
            return Fit(changed, tuple(says), peak, _options(recipe, changed))
    return None


def _options(old: Recipe | None, new: Recipe | None) -> tuple[str, ...]:
    fields = ("run.batch", "run.accumulate", "run.dtype", "placement.checkpointing", "placement.offload",
              "student.form", "student.rank", "critic.form", "critic.rank")  # fmt: skip
    found, prefix = [], "--"
    while old and new:  # the warm starts, too
        for field in fields:
            part, name = field.split(".")
            value = getattr(getattr(new, part), name)
            if value != getattr(getattr(old, part), name):
                found.append(f"{prefix}{field} {' '.join(value) if isinstance(value, tuple) else value}")
        old, new, prefix = old.warm_start, new.warm_start, f"{prefix}warm-start."
    return tuple(found)


def micro_batches(recipe: Recipe, batch: int) -> Recipe:
    """The same updates in micro-batches of ``batch`` samples."""
    whole = recipe.run.batch * recipe.run.accumulate
    return replace(recipe, run=replace(recipe.run, batch=batch, accumulate=whole // batch))


def _largest_batch(recipe: Recipe, limit: float, peak_of: Peak, devices: int) -> tuple[int, float]:
    """The largest divisor of the recipe's batch that fits and ``devices`` can share, or 0, and its peak."""
    batch = recipe.run.batch
    if batch % devices:
        raise ValueError(f"run.batch {batch} is shared by {devices} devices: use a multiple of {devices}")
    sizes = [b for b in range(devices, batch + 1, devices) if batch % b == 0]
    smallest = peak_of(micro_batches(recipe, sizes[0]), limit)
    if smallest > limit or len(sizes) == 1:
        return (sizes[0] if smallest <= limit else 0), smallest
    second = peak_of(micro_batches(recipe, sizes[1]), limit)
    each = (second - smallest) / (sizes[1] - sizes[0])
    for size in reversed(sizes[2:]):
        if smallest + (size - sizes[0]) * each <= limit:
            exact = peak_of(micro_batches(recipe, size), limit)
            if exact <= limit:
                return size, exact
    return (sizes[1], second) if second <= limit else (sizes[0], smallest)


def _changes(recipe: Recipe) -> list[_Change]:
    """Those that this recipe does not have yet."""
    found: list[_Change] = []
    movers = {name for turn in recipe.objective.turns() for name in turn.moves}
    players = [role for role in ("student", "critic") if role in movers]
    if recipe.run.dtype == "float32":
        found.append(_Change("bfloat16", 1, lambda r: replace(r, run=replace(r.run, dtype="bfloat16"))))
    kept = [role for role in players if role not in recipe.placement.checkpointing]
    if kept:
        says = f"activations of {_and(players)} recomputed"
        found.append(
            _Change(says, 2, lambda r: replace(r, placement=replace(r.placement, checkpointing=tuple(players))))
        )
    full = [role for role in players if _weights(recipe, role) == Weights(targets=_weights(recipe, role).targets)]
    if full:
        found.append(_Change(f"{_and(full)} as LoRA", 5, lambda r: _as_lora(r, full)))
    idle = _idle(recipe)
    if idle and not recipe.placement.shard and set(idle) - set(recipe.placement.offload):
        found.append(_Change(f"{_and(idle)} offloaded", 3, _offload))
    return found


def _combinations(changes: Sequence[_Change]) -> Iterator[tuple[_Change, ...]]:
    sets = [some for n in range(len(changes) + 1) for some in combinations(changes, n)]
    yield from sorted(sets, key=lambda some: sum(change.cost for change in some))


def _weights(recipe: Recipe, role: str) -> Weights:
    return recipe.student if role == "student" else recipe.critic


def _as_lora(recipe: Recipe, roles: Sequence[str]) -> Recipe:
    """The recipe with adapters in these roles; a student's warm starts have the same ones."""
    changed = {role: Weights("lora", rank=64, targets=_weights(recipe, role).targets) for role in roles}
    if recipe.warm_start and "student" in roles:
        changed["warm_start"] = _as_lora(recipe.warm_start, ["student"])
    return replace(recipe, **changed)


def _idle(recipe: Recipe) -> list[str]:
    """Roles that nobody moves and nobody adapts."""
    shared = any(weights.form == "lora" and not weights.own_base for weights in (recipe.student, recipe.critic))
    averages = [] if recipe.student.form == "lora" else ["ema", *recipe.objective.averages()]
    return [*([] if shared else ["teacher"]), *averages]


def _offload(recipe: Recipe) -> Recipe:
    return replace(recipe, placement=replace(recipe.placement, offload=tuple(_idle(recipe))))


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
