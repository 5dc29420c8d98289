"""Malformed recipes, on disk and on the command line: a fuzzer's first examples.

``python eval/fuzz_runs.py`` tries thousands; FUZZ_EXAMPLES sets the number here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
SPEC = importlib.util.spec_from_file_location(
    "fuzz_runs", Path(__file__).resolve().parents[1] / "eval" / "fuzz_runs.py"
)
fuzz_runs = sys.modules["fuzz_runs"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz_runs)

ATTACKS = [name for name in fuzz_runs.ATTACKS if name.startswith("recipe")]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150")) // len(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_whatever_is_in_them_the_run_is_sound_or_there_is_one_clear_line(name: str) -> None:
    examples = EXAMPLES // 5 if name == "recipe arguments" else EXAMPLES  # tyro takes a third of a second for each
    ended = fuzz_runs.attack(name, examples)
    assert sum(ended.values()) >= examples
    if examples >= 50:
        assert ended["refused"] and ended["used"], "the attack meets one kind of input only"
