"""Files of a run's figures are read as far as they are whole."""

from __future__ import annotations

import json
from pathlib import Path

from stepdistill.logging import read_lines


def test_lines_are_read_up_to_a_torn_or_foreign_one(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    good = [json.dumps({"step": i}).encode() for i in (1, 2)]
    for bad in (b'{"step": 3', b"[1]", b'{"step": "3"}', b"\xff", b"[" * 100_000):
        file.write_bytes(b"\n".join([*good, bad, b'{"step": 4}']))
        assert [line["step"] for line in read_lines(file)] == [1, 2]
