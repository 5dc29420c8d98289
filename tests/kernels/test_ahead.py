"""Kernels are built for GPUs that are not there, and what cannot be launched is found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import dataclasses, json
from stepdistill.kernels.ahead import build, cases, edges
def case(name, d, sm):
    return next(c for c in cases(sm, (d,)) if c.name == name)
rows = [build(case("steer_attention", 72, 89), 89), build(case("block_sparse_attention dQ 64", 64, 90), 90)]
rows.append(build(case("qk_norm_rope", 64, 80), 80))
rows.append(build(next(c for c in edges() if c.name == "steer_attention, edges"), 90))
steer = case("steer_attention", 64, 89)
rows.append(build(dataclasses.replace(steer, constants=steer.constants | {"BM": 128, "BN": 128}, warps=4), 89))
print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""


def test_some_kernels_are_built_and_one_that_spills_is_refused() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *good, spilling = json.loads(done.stdout)
    assert [row["problem"] for row in good] == [None] * 4
    assert [row["tensor_cores"] for row in good] == [True, True, False, True]
    assert all(0 < row["registers"] <= 255 for row in good)
    assert spilling["spills"] > 0 and "spilled" in spilling["problem"]


def test_the_stored_builds_cover_every_configuration_and_none_has_a_problem() -> None:
    """Rebuilt by ``python eval/attention.py --compile-only``."""
    from stepdistill.kernels.ahead import cases, edges

    stored = json.loads(Path("eval/kernels_compile.json").read_text())["rows"]
    assert [row for row in stored if row["problem"]] == []
    keys = {(r["kernel"], r["d"], r["sm"], r["warps"], r["stages"], r["tiles"]) for r in stored}
    for sm in (80, 89, 90):
        for case in (*cases(sm), *(edges() if sm == 90 else ())):
            tiles = " ".join(
                f"{n}={case.constants[n]}" for n in ("BLOCK", "BM", "BN", "BT", "P") if n in case.constants
            )
            assert (case.name, case.d, sm, case.warps, case.stages, tiles) in keys
