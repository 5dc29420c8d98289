"""What attacks share: how an example draws, how it may end, and what must hold however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Ended = str
"""``refused`` after one clear line; or ``used``, ``some skipped``, ``resumed``."""
Attack = Callable[[Draw, Path], Ended]
"""Makes malformed input in an empty folder, tries it, says how it ended; raises AssertionError if it ended badly."""
LONGEST = 1500
"""Characters of an error's line."""


def usually(common: Any, rare: st.SearchStrategy[Any], share: float = 0.7) -> st.SearchStrategy[Any]:
    """A value, or now and then what a strategy gives."""
    return st.integers(0, 99).flatmap(lambda die: st.just(common) if die < 100 * share else rare)


def assert_one_clear_line(text: str) -> None:
    """Of an error."""
    assert text and "\n" not in text and len(text) < LONGEST, f"not one clear line: {text[:300]!r}"


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files; folders count as empty ones."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with every key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


# Odd values

ODD = (
    *("", " ", "\ud800", "x" * 3000, "a\x00b", "a\nb", "\x1b[31m"),
    *("Recipe", "DMD2", "KD", "Ddim", "bundled:digits", "../.."),
)
NUMBERS = (0, -1, 1, 0.5, 2, 10**400, -(2**63), 2**63, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), -0.0)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(ODD + NUMBERS)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "steps", "lr", "x", "times"]), inner, max_size=3)
    ),
    max_leaves=5,
)
