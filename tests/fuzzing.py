"""``eval/fuzz.py``, whose first examples tests run; FUZZ_EXAMPLES sets their number for each attack."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
sys.path.append(str(Path(__file__).resolve().parents[1] / "eval"))
fuzz = importlib.import_module("fuzz")


def tried(name: str, examples: int = 50) -> dict[str, int]:
    """How the first examples of an attack ended; both well and in an error, or it meets one kind of input only."""
    examples = int(os.environ.get("FUZZ_EXAMPLES", examples))
    ended = fuzz.attack(name, examples)
    assert sum(ended.values()) >= examples
    if examples >= 50:
        assert ended["refused"] and len(ended) > 1, ended
    return ended
