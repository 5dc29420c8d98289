"""What a bench leaves behind: records, CSV, a table, plots and the page; made of outcomes and of nothing else."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import stepdistill
from stepdistill.bench.cache import Cache, key_of
from stepdistill.bench.measure import Asked, Outcome
from stepdistill.bench.page import write_page
from stepdistill.bench.suite import Suite
from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.benchmark import records_of
from stepdistill.evaluation.records import Record, save_records
from stepdistill.evaluation.report import drawn
from stepdistill.evaluation.tables import brief_table, differences, metrics_of, table_rows

STAMP = "bench.json"
"""Says what the files beside it were made of, so that they are not made again."""
MINUS_TEACHER = ("minus_teacher", "minus_teacher_ci95")
"""Columns of results.csv beyond a record's fields."""
PAGES = ("columns", "intervals", "records", "tables", "grids", "report", "page", "plots")
MADE_BY = ("bench/output.py", "bench/page.py", *(f"evaluation/{name}.py" for name in PAGES))


def stamp_of(suite: Suite, asked: Sequence[Asked], notes: Sequence[str], title: str, cache: Cache) -> str:
    """The key of a bench's files: its rows' names and facts, and the code that lays them out."""
    root = Path(stepdistill.__file__).parent
    rows = [[one.row.name, one.row.method, *map(dict, one.scores.values()), dict(one.time)] for one in asked]
    code = [cache.file_hash(root / name) for name in MADE_BY]
    return key_of({"title": title, "rows": rows, "notes": list(notes), "code": code})


def unchanged(out: Path, stamp: str, cache: Cache) -> bool:
    """Whether the files in ``out`` are those that were made under this stamp."""
    try:
        made = json.loads((out / STAMP).read_bytes())
        return made["stamp"] == stamp and all(cache.file_hash(out / n) == sha for n, sha in made["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # any doubt: make them again
        return False


def records_from(outcomes: Sequence[Outcome]) -> list[Record]:
    """Records of all rows."""
    records = []
    for one in outcomes:
        first = next(iter(one.scores.values()))
        scores = [value["scores"] for value in one.scores.values()]
        row: dict[str, Any] = {key: first[key] for key in ("sampler", "nfe", "guidance", "dtype", "versions", "date")}
        row |= {"subject": one.row.name, "role": one.row.role, "method": one.row.method, "steps": one.row.steps}
        records += records_of(scores, one.seconds, first["protocols"], seeds=list(one.scores), device=one.device, **row)
    table_rows(records)  # refuses what does not belong into one table
    return records


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """One line a record, one column a field; lists and objects as JSON. Of students two more: the value minus that of
    the teacher's long run on the same noise, and half the width of its interval.
    """
    buffer = io.StringIO()
    names = [*(f.name for f in fields(Record)), *MINUS_TEACHER]
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    rows = table_rows(records)
    gaps = {
        id(rows[i].cells[metric]): (gap.value, gap.half_width)
        for metric in metrics_of(records)
        for i, gap in differences(rows, metric).items()
    }
    for record in records:
        row = asdict(record) | dict(zip(MINUS_TEACHER, gaps.get(id(record), ()), strict=False))
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    write_atomically(path, lambda aside: aside.write_text(buffer.getvalue(), encoding="utf-8"))


def table_text(records: Sequence[Record], notes: Sequence[str]) -> str:
    """The short table in Markdown, and what was left out of it."""
    return brief_table(records) + "".join(f"\n- {note}" for note in notes) + ("\n" if notes else "")


def write_all(
    out: Path, suite: Suite, outcomes: Sequence[Outcome], notes: Sequence[str], *, title: str, stamp: str, cache: Cache
) -> list[Record]:
    """Write everything into ``out``.

    Raises:
        ValueError: if rows differ in protocol; names the field.
        OSError: if the disk refuses; what was there before stands, and the cache keeps what was measured.
    """
    records = records_from(outcomes)
    save_records(out / "results.json", records)
    write_csv(out / "results.csv", records)
    text = f"# {title}\n\n{table_text(records, notes)}"
    write_atomically(out / "table.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    write_atomically(out / "suite.json", lambda aside: aside.write_text(suite.to_json() + "\n", encoding="utf-8"))
    made = write_page(out, outcomes, records, notes, title=title, plots=plots_of(records, cache))
    files = ["results.json", "results.csv", "table.md", "suite.json", *made]
    hashes = {name: cache.file_hash(out / name) for name in files}
    content = json.dumps({"stamp": stamp, "files": hashes}, indent=1)
    write_atomically(out / STAMP, lambda aside: aside.write_text(content, encoding="utf-8"))
    cache.flush()
    return records


def plots_of(records: Sequence[Record], cache: Cache) -> list[tuple[str, str]]:
    """Captions and SVG of all plots; of the same records they are drawn once, which takes longer than all else."""
    root = Path(stepdistill.__file__).parent
    code = [cache.file_hash(root / "evaluation" / f"{name}.py") for name in ("columns", "tables", "page", "plots")]
    drawn_from = key_of({"records": [asdict(record) for record in records]})
    facts = {"what": "plots", "records": drawn_from, "code": code, "matplotlib": version("matplotlib")}
    kept = cache.load(key_of(facts))
    if kept is None:
        kept = {"plots": drawn(records)}
        cache.save(key_of(facts), facts, kept)
    return [(caption, svg) for caption, svg in kept["plots"]]


def check_out(out: Path) -> None:
    """Make sure, before anything is measured, that ``out`` can be written.

    Raises:
        ValueError: if it cannot, or holds somebody else's results.
    """
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out}: {above} is no folder that can be written to; name another")
    if out.is_dir() and (out / "recipe.json").is_file():
        raise ValueError(f"--out {out}: is a run, whose own results would be lost; name another folder")
