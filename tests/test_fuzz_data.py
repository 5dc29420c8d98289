"""A fuzzer's first examples, in seconds; ``python eval/fuzz.py`` tries ten thousand."""

from __future__ import annotations

import pytest

from tests.fuzzing import fuzz, tried


@pytest.mark.parametrize("name", fuzz.KINDS["data"])
def test_whatever_is_in_the_data_a_batch_comes_out_or_one_clear_line(name: str) -> None:
    tried(name)
