"""Rows of data that cannot be used: what is wrong with them, and the books on those left out."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

from stepdistill.checkpoint import write_atomically

LISTED = 100
"""Rows that data.json names; all are counted."""


class Bad(ValueError):
    """A row that cannot be used.

    Args:
        kind: of trouble, in a word or two, such as "no caption".
        detail: one line.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {printable(detail)}" if detail else kind)
        self.kind = kind


def printable(text: str, most: int = 300) -> str:
    """A text of somebody else's on one line, without control characters; its end where it is long."""
    line = " ".join(text.split())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return escaped if len(escaped) <= most else f"...{escaped[-most:]}"


class Report:
    """What a run's data held and what of it was left out, each row once.

    In memory, until a run directory is named for it.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.source = ""
        self.rows: int | None = None
        self.reasons: Counter[str] = Counter()
        self._examples: list[dict[str, str]] = []
        self._seen: set[str] = set()
        self._warned = 0
        self._written: tuple[int, ...] = ()

    @property
    def skipped(self) -> int:
        """Rows left out so far."""
        return len(self._seen)

    def keep(self, path: Path) -> None:
        """Write data.json there, now and whenever there is news; nothing for sources that read no rows."""
        self.path = path
        if self.source:
            self.tell()

    def opened(self, source: str, rows: int | None) -> None:
        """Rows that a source has, good and bad; None where nobody knows, as in a stream."""
        self.source, self.rows = source, rows
        self.tell()

    def skip(self, name: str, problem: Bad) -> None:
        """Take down a row that is left out; the same row counts once."""
        if name in self._seen:
            return
        self._seen.add(name)
        self.reasons[problem.kind] += 1
        if len(self._examples) < LISTED:
            self._examples.append({"row": printable(name), "problem": str(problem)})

    def tell(self) -> None:
        """Bring data.json up to date, to within two per cent, and warn whenever the rows left out have doubled."""
        if self.path is not None and (not self._written or self.skipped - self._written[0] > self._written[0] // 50):
            write_atomically(self.path, lambda aside: aside.write_text(json.dumps(self.as_dict(), indent=2) + "\n"))
            self._written = (self.skipped,)
        if self.skipped and self.skipped >= 2 * self._warned:
            self._warned = self.skipped
            of = "" if self.rows is None else f" of {self.rows}"
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.reasons.most_common())
            first = self._examples[0]
            warnings.warn(
                f"{self.source}: {self.skipped}{of} rows cannot be used and are left out ({kinds}), the first is "
                f"{first['row']} ({first['problem']})",
                stacklevel=3,
            )

    def first(self) -> str:
        """The first row left out, and why; nothing if there is none."""
        return "; ".join(f"{one['row']} ({one['problem']})" for one in self._examples[:1])

    def as_dict(self) -> dict[str, object]:
        """What data.json holds."""
        return {
            "source": self.source,
            "rows": self.rows,
            "skipped": self.skipped,
            "reasons": dict(self.reasons.most_common()),
            "examples": self._examples,
        }
