"""A fuzzer's first examples, in seconds; ``python eval/fuzz.py`` tries ten thousand. FUZZ_EXAMPLES sets the number."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).resolve().parents[1] / "eval" / "fuzz.py")
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200")) // len(fuzz.ATTACKS)


@pytest.mark.parametrize("name", fuzz.ATTACKS)
def test_whatever_is_in_the_data_a_batch_comes_out_or_one_clear_line(name: str) -> None:
    ended = fuzz.attack(name, EXAMPLES)
    assert sum(ended.values()) >= EXAMPLES
    if EXAMPLES >= 50:
        assert ended["refused"] and ended["used"] + ended["some skipped"], "the attack meets one kind of input only"
