"""Malformed input by the thousand: whatever is in it, it is used, or one clear line says why not, and nothing is lost.

``python eval/fuzz.py --examples 10000 --out eval/fuzz.json`` runs every attack on data, recipes and checkpoints in turn
and counts how it ended. Stopped, it goes on where it was; asked for more examples, it tries the next ones.
``tests/test_fuzz_*.py`` run a few of each. A new attack is one function in the ``ATTACKS`` of a ``fuzz_*.py``.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import fuzz_checkpoints
import fuzz_data
import fuzz_recipes
from fuzz_parts import Attack, Ended
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from stepdistill.checkpoint import write_atomically

KINDS: dict[str, dict[str, Attack]] = {
    "data": fuzz_data.ATTACKS,
    "recipes": fuzz_recipes.ATTACKS,
    "checkpoints": fuzz_checkpoints.ATTACKS,
}
ATTACKS: dict[str, Attack] = {name: attack for kind in KINDS.values() for name, attack in kind.items()}
CHUNK = 100
"""Examples of one attack between two lines on disk."""
MEMORY = 4 * 2**30
"""Bytes of address space beyond those at the start: whoever asks for more ends badly."""


def attack(name: str, examples: int, chunk: int = 0) -> Counter[Ended]:
    """Run one attack so many times; how they ended.

    Args:
        name: of the attack.
        examples: how many.
        chunk: every number has examples of its own, the same every time.

    Raises:
        AssertionError: with the smallest input that ended badly.
    """
    found: Counter[Ended] = Counter()

    @seed(chunk)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data: st.DataObject) -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            with warnings.catch_warnings(), redirect_stderr(StringIO()):  # no bars
                warnings.simplefilter("ignore")
                found[ATTACKS[name](data.draw, folder)] += 1
        finally:
            shutil.rmtree(folder)

    one()
    return found


def summary(attacks: dict[str, Any], peak: int = 0) -> dict[str, Any]:
    """Counts of every attack and of every kind, and the most memory that a process took, earlier ones too."""
    kinds = {kind: sum(attacks[name]["tried"] for name in names if name in attacks) for kind, names in KINDS.items()}
    peak = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    return {"tried": sum(kinds.values()), "by_kind": kinds, "peak_memory_mib": peak, "attacks": attacks}


def main() -> None:
    """Run all attacks and keep the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000, help="in all attacks together")
    parser.add_argument("--only", choices=list(ATTACKS), help="one attack")
    parser.add_argument("--out", type=Path, help="counts, as JSON")
    asked = parser.parse_args()
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    names = [asked.only] if asked.only else list(ATTACKS)
    goal = -(-asked.examples // len(names))
    before = json.loads(asked.out.read_text()) if asked.out and asked.out.is_file() else {}
    attacks, peak = before.get("attacks", {}), before.get("peak_memory_mib", 0)
    for name in names:
        row = attacks.setdefault(name, {"tried": 0, "chunks": 0, "seconds": 0.0, "ended": {}})
        while row["tried"] < goal:
            start = time.monotonic()
            ended = attack(name, min(CHUNK, goal - row["tried"]), row["chunks"])
            row["tried"] += sum(ended.values())
            row["chunks"] += 1
            row["seconds"] = round(row["seconds"] + time.monotonic() - start, 1)
            row["ended"] = dict(Counter(row["ended"]) + ended)
            if asked.out:
                text = json.dumps(summary(attacks, peak), indent=2) + "\n"
                write_atomically(asked.out, lambda aside: aside.write_text(text))  # noqa: B023
        print(f"{name}: {row['tried']} tried, {row['ended']}, {row['seconds']:.0f} s", flush=True)
    print({k: v for k, v in summary(attacks, peak).items() if k != "attacks"})


if __name__ == "__main__":
    main()
