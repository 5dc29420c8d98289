"""Attacks on recipes, on disk and as arguments: a recipe that can be run, or one clear line."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
from pathlib import Path
from typing import Any

from fuzz_parts import JSON, NUMBERS, ODD, Attack, Draw, Ended, assert_one_clear_line, files, places
from hypothesis import strategies as st

from stepdistill.cli import main as command
from stepdistill.recipes import find

NAMES = ("digits_dmd2", "digits_tscd", "shapes_sd_dmd2", "digits_icd", "shapes_sd_shared", "digits_f_distill")
FIELDS = (
    *("--run.steps", "--run.batch", "--run.dtype", "--teacher.guidance", "--teacher.source", "--optim.student.lr"),
    *("--sampler.times", "--objective.x", "--data.count", "--student.form", "--warm-start.run.steps"),
    *("--nope", "--out", "-x"),
)


@functools.cache
def templates() -> list[dict[str, Any]]:
    """Sound recipes, encoded."""
    return [json.loads(find(name).to_json()) for name in NAMES]


def mutated(draw: Draw) -> Any:
    """A sound recipe with one to three places deleted, replaced, renamed, exchanged or filled with something else."""
    recipe = copy.deepcopy(draw(st.sampled_from(templates())))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(recipe))
        if not found:
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        how = draw(st.sampled_from(["delete", "replace", "number", "rename", "exchange", "add"]))
        if how == "delete":
            del container[key]
        elif how == "replace":
            container[key] = draw(JSON)
        elif how == "number":
            container[key] = draw(st.sampled_from(NUMBERS) | st.integers() | st.floats())
        elif how == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(ODD) | st.just(f"{key}s"))] = container.pop(key)
        elif how == "exchange":
            other, at = found[draw(st.integers(0, len(found) - 1))]
            container[key] = copy.deepcopy(other[at])
        elif how == "add" and isinstance(container, dict):
            container[draw(st.text(max_size=5) | st.sampled_from(ODD))] = draw(JSON)
    return recipe


def recipe_fields(draw: Draw, folder: Path) -> Ended:
    """A recipe.json that is JSON, and no recipe or a strange one."""
    text = json.dumps(mutated(draw), ensure_ascii=draw(st.booleans()))
    return _commanded(folder, text.encode("utf-8", "surrogatepass"), draw)


def recipe_bytes(draw: Draw, folder: Path) -> Ended:
    """A recipe.json that was cut, bent, encoded otherwise, or is something else altogether."""
    text = json.dumps(draw(st.sampled_from(templates())), indent=draw(st.sampled_from([None, 2])))
    raw = bytearray(text.encode())
    how = draw(st.sampled_from(["cut", "flipped", "encoded", "bytes", "deep", "doubled", "json", "whole"]))
    if how == "cut":
        del raw[draw(st.integers(0, len(raw) - 1)) :]
    elif how == "flipped":
        for _ in range(draw(st.integers(1, 4))):
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif how == "encoded":
        raw = bytearray(text.encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "cp037"]))))
    elif how == "bytes":
        raw = bytearray(draw(st.binary(max_size=60)))
    elif how == "deep":
        raw = bytearray(draw(st.sampled_from([b"[", b'{"warm_start":'])) * draw(st.sampled_from([10, 100_000])))
    elif how == "doubled":
        raw = raw * 2
    elif how == "json":
        raw = bytearray(json.dumps(draw(JSON)).encode())
    return _commanded(folder, bytes(raw), draw)


def recipe_arguments(draw: Draw, folder: Path) -> Ended:
    """Odd arguments on the command line behind a sound recipe."""
    name = draw(
        st.sampled_from([*NAMES, "digits_dmd", "digits_kd@", "digits_kd@0", "digits_kd@99999999999", "", "@", "x.py"])
    )
    args = [name]
    for _ in range(draw(st.integers(0, 2))):
        args.append(draw(st.sampled_from(FIELDS)))
        args += [str(v) for v in draw(st.lists(st.sampled_from(NUMBERS) | st.sampled_from(ODD), max_size=2))]
    return _ended(["distill", *args, "--print"], folder)


def _commanded(folder: Path, raw: bytes, draw: Draw) -> Ended:
    """What commands that read a recipe make of it."""
    (folder / "recipe.json").write_bytes(raw)
    path = str(folder / "recipe.json")
    return _ended(draw(st.sampled_from([["distill", path, "--print"], ["doctor", str(folder), "--quick"]])), folder)


def _ended(args: list[str], folder: Path) -> Ended:
    """Run a command.

    Raises:
        AssertionError: if it ends in anything but success or one clear line, or a file was changed.
    """
    before = files(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command(args)
            code = 0
        except SystemExit as stopped:
            code = stopped.code
    assert files(folder) == before, "a file was changed"
    if code == 0:
        return "used"
    said = (err.getvalue() or out.getvalue()).strip()
    assert code in ((1, 2) if args[0] == "doctor" else (2,)), f"exit code {code}: {said[:300]}"
    assert said and "Traceback" not in said, said[:300]
    lines = said.splitlines()
    if lines[0].startswith("stepdistill: "):  # others are tyro's own, framed, or the doctor's
        assert_one_clear_line(said)
    return "refused"


ATTACKS: dict[str, Attack] = {
    "recipe fields": recipe_fields,
    "recipe bytes": recipe_bytes,
    "recipe arguments": recipe_arguments,
}
