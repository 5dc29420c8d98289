"""Damaged checkpoints under a run that is resumed: a fuzzer's first examples."""

from __future__ import annotations

import pytest

from tests.fuzzing import fuzz, tried


@pytest.mark.parametrize("name", fuzz.KINDS["checkpoints"])
def test_whatever_is_in_them_a_good_state_comes_back_or_there_is_one_clear_line(name: str) -> None:
    tried(name)
