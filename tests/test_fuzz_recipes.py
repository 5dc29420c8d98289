"""Malformed recipes, on disk and on the command line: a fuzzer's first examples."""

from __future__ import annotations

import pytest

from tests.fuzzing import fuzz, tried


@pytest.mark.parametrize("name", fuzz.KINDS["recipes"])
def test_whatever_is_in_them_they_are_read_or_there_is_one_clear_line(name: str) -> None:
    tried(name, 10 if name == "recipe arguments" else 50)  # tyro takes a third of a second for each
