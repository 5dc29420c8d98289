"""Malformed recipes and damaged checkpoints by the thousand: one clear line or a sound run, and nothing is lost.

``python eval/fuzz_runs.py --examples 10000 --out eval/fuzz_runs.json`` runs every attack below in turn and counts how
it ended; ``tests/test_fuzz_recipes.py`` and ``tests/test_fuzz_checkpoints.py`` run a few of each. A new attack is one
function of a hypothesis ``draw`` and an empty folder in ``ATTACKS``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stepdistill.build import build, open_teacher
from stepdistill.checkpoint import checksum, read_checkpoint, write_atomically
from stepdistill.cli import main as command
from stepdistill.data import DigitsData
from stepdistill.models.families import Opened
from stepdistill.objectives import DMD2
from stepdistill.recipe import Recipe, Teacher
from stepdistill.recipes import find
from stepdistill.sampling import Sampler, trailing
from stepdistill.trainer import AdamW, Run, Trainer

Draw = Callable[[st.SearchStrategy[Any]], Any]
Ended = str
LONGEST = 1500
"""Characters of an error's line."""


# Recipes

NAMES = ("digits_dmd2", "digits_tscd", "shapes_sd_dmd2", "digits_icd", "shapes_sd_shared", "digits_f_distill")
ODD = (
    "",
    " ",
    "\ud800",
    "x" * 3000,
    "a\x00b",
    "a\nb",
    "\x1b[31m",
    "Recipe",
    "DMD2",
    "KD",
    "Ddim",
    "bundled:digits",
    "../..",
)
NUMBERS = (0, -1, 1, 0.5, 2, 10**400, -(2**63), 2**63, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), -0.0)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(ODD + NUMBERS)
)
FIELDS = (
    *("--run.steps", "--run.batch", "--run.dtype", "--teacher.guidance", "--teacher.source", "--optim.student.lr"),
    *("--sampler.times", "--objective.x", "--data.count", "--student.form", "--warm-start.run.steps"),
    *("--nope", "--out", "-x"),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "steps", "lr", "x", "times"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@functools.cache
def templates() -> list[dict[str, Any]]:
    """Sound recipes, encoded."""
    return [json.loads(find(name).to_json()) for name in NAMES]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with every key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def mutated(draw: Draw) -> Any:
    """A sound recipe with one to three places deleted, replaced, renamed, exchanged or filled with something else."""
    recipe = copy.deepcopy(draw(st.sampled_from(templates())))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(recipe))
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
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
            other, at = places[draw(st.integers(0, len(places) - 1))]
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
        assert len(lines) == 1 and len(said) < LONGEST, f"not one clear line: {said[:300]!r}"
    return "refused"


# Checkpoints


@functools.cache
def teacher() -> Opened:
    """The bundled digits teacher."""
    torch.set_num_threads(1)
    return open_teacher(Teacher("bundled:digits"))


RECIPE = Recipe(
    teacher=Teacher("bundled:digits"),
    objective=DMD2(student_every=2),
    data=DigitsData(),
    optim={name: AdamW(1e-3) for name in ("student", "critic", "disc")},
    sampler=Sampler(trailing(2)),
    run=Run(steps=4, batch=2, log_every=1, save_every=2, keep_last=2),
)


@functools.cache
def finished() -> tuple[Path, dict[int, dict[str, Tensor]]]:
    """The folder of a run with checkpoints of steps 2 and 4, and everyone's weights at each."""
    out = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    new_trainer(out).fit()
    states = {}
    for path in sorted((out / "checkpoints").iterdir()):
        states[int(path.stem)] = _weights(read_checkpoint(path, verify=True)[1])
    return out, states


@functools.cache
def other() -> bytes:
    """A checkpoint of a run with a smaller critic."""
    meta, tensors = read_checkpoint(finished()[0] / "checkpoints" / "00000004.safetensors")
    return signed(meta, {k: v for k, v in tensors.items() if not k.startswith("nets.critic.")})


@functools.cache
def _built() -> Trainer:
    """Networks and data, which take most of the time, once for all examples."""
    return build(RECIPE, opened=teacher()).trainer


def new_trainer(out: Path) -> Trainer:
    """A trainer in ``out`` with fresh optimizers, over networks that a checkpoint will overwrite."""
    built = _built()
    optimizers = {name: spec.build(built.nets[name].parameters()) for name, spec in RECIPE.players.items()}
    return Trainer(built.nets, RECIPE.objective, optimizers, built.data, RECIPE.run, specs=built.specs, out=out)


def signed(meta: Any, tensors: dict[str, Tensor]) -> bytes:
    """A checkpoint file with the checksum that belongs to its content."""
    text = json.dumps(meta)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one"
        save_file(tensors, file, metadata={"stepdistill": text, "sha256": checksum(text, tensors)})
        return file.read_bytes()


def checkpoint_bytes(draw: Draw, folder: Path) -> Ended:
    """Files that were bent, cut, emptied, exchanged, or are something else."""
    return _resumed(draw, folder, _bent)


def checkpoint_content(draw: Draw, folder: Path) -> Ended:
    """Files whose checksum is right, and whose tensors or description are not."""
    return _resumed(draw, folder, _forged)


def _bent(draw: Draw, file: Path) -> None:
    raw = bytearray(file.read_bytes())
    how = draw(st.sampled_from(["flipped", "header", "cut", "empty", "bytes", "longer", "other", "folder"]))
    if how == "flipped":
        for _ in range(draw(st.integers(1, 3))):
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif how == "header":
        raw[draw(st.integers(0, 3000))] ^= 1 << draw(st.integers(0, 7))
    elif how == "cut":
        del raw[draw(st.integers(0, len(raw) - 1)) :]
    elif how == "longer":
        raw += draw(st.binary(min_size=1, max_size=9))
    elif how == "folder":
        file.unlink()
        file.mkdir()
        return
    else:
        raw = bytearray({"empty": b"", "bytes": draw(st.binary(max_size=40)), "other": other()}[how])
    file.write_bytes(bytes(raw))


def _forged(draw: Draw, file: Path) -> None:
    meta, tensors = read_checkpoint(file)
    how = draw(st.sampled_from(["dtype", "shape", "drop", "add", "slot", "meta", "unmeta"]))
    name = draw(st.sampled_from(sorted(tensors)))
    if how == "dtype":
        tensors[name] = tensors[name].to(draw(st.sampled_from([torch.float16, torch.int64, torch.float64, torch.bool])))
    elif how == "shape":
        tensors[name] = draw(st.sampled_from([tensors[name][None], tensors[name].flatten()[:1], torch.zeros(0)]))
    elif how == "drop":
        del tensors[name]
    elif how == "add":
        tensors[
            draw(st.sampled_from(["x", "nets.y.z", "optim.student.9999.exp_avg", "optim.student.a", "optim.x.0.step"]))
        ] = torch.zeros(2)
    elif how == "slot":
        slots = [k for k in sorted(tensors) if k.startswith("optim.")]
        del tensors[draw(st.sampled_from(slots))]
    elif how == "meta":
        container, key = draw(st.sampled_from(list(_places(meta))))
        container[key] = draw(JSON)
    else:
        container, key = draw(st.sampled_from(list(_places(meta))))
        del container[key]
    file.write_bytes(signed(meta, {k: v.contiguous() for k, v in tensors.items()}))


def _resumed(draw: Draw, folder: Path, damage: Callable[[Draw, Path], None]) -> Ended:
    """Damage one checkpoint or both of a finished run, and resume.

    Raises:
        AssertionError: if a state comes back that no checkpoint held, if it ends in anything but the last good one or
            one clear line, or if a file is gone.
    """
    source, states = finished()
    shutil.copytree(source, folder, dirs_exist_ok=True)
    paths = sorted((folder / "checkpoints").iterdir())
    for path in draw(st.sampled_from([paths[1:], paths[1:], paths[:1], paths])):
        damage(draw, path)
    if draw(st.integers(0, 9)) == 0:
        swap = folder / "swap"
        for one, another in ((paths[0], swap), (paths[1], paths[0]), (swap, paths[1])):
            one.rename(another)
    before = files(folder)
    trainer = new_trainer(folder)
    with torch.no_grad():
        for value in trainer.nets.trainable_state().values():
            value.fill_(0)  # nothing may be left of the example before
    try:
        resumed = trainer.resume()
    except (ValueError, OSError) as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < LONGEST, f"not one clear line: {text[:300]!r}"
        resumed = None
    after = files(folder)
    metrics = str(folder / "metrics.jsonl")
    assert before.keys() == after.keys(), "a file is gone"
    assert all(before[k] == after[k] for k in before if k != metrics), "a checkpoint was changed"
    if resumed is None:
        assert before[metrics] == after[metrics], "metrics were cut though nothing was resumed"
        return "refused"
    if damage is _bent:  # what is forged may well hold other weights, or another step
        assert resumed and trainer.index in states, f"resumed at step {trainer.index}"
        found = trainer.nets.trainable_state()
        wrong = [k for k, v in states[trainer.index].items() if not torch.equal(v, found[k])]
        assert not wrong, f"weights of no checkpoint: {wrong[0]}"
    trainer.index = min(trainer.index, RECIPE.run.steps - 1)
    with contextlib.redirect_stderr(io.StringIO()):
        trainer.step(trainer.index)  # optimizers and metrics must be usable too
        trainer.metrics.write(trainer.index)
    return "resumed"


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("nets."): v.clone() for k, v in tensors.items() if k.startswith("nets.")}


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files; folders count as empty ones."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


ATTACKS: dict[str, Callable[[Draw, Path], Ended]] = {
    "recipe fields": recipe_fields,
    "recipe bytes": recipe_bytes,
    "recipe arguments": recipe_arguments,
    "checkpoint bytes": checkpoint_bytes,
    "checkpoint content": checkpoint_content,
}
"""By name: each makes malformed input in an empty folder, tries it, and says how it ended; raises if it ended badly."""


def attack(name: str, examples: int) -> Counter[Ended]:
    """Run one attack so many times; how they ended.

    Raises:
        AssertionError: with the smallest input that ended badly.
    """
    found: Counter[Ended] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[ATTACKS[name](data.draw, folder)] += 1
        finally:
            shutil.rmtree(folder)

    one()
    return found


def main() -> None:
    """Run all attacks and keep the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000, help="in all attacks together")
    parser.add_argument("--only", choices=list(ATTACKS), help="one attack")
    parser.add_argument("--out", type=Path, help="counts, as JSON")
    asked = parser.parse_args()
    names = [asked.only] if asked.only else list(ATTACKS)
    counts = {}
    for name in names:
        start = time.monotonic()
        counts[name] = dict(attack(name, -(-asked.examples // len(names))))
        print(
            f"{name}: {sum(counts[name].values())} tried, {counts[name]}, {time.monotonic() - start:.0f} s", flush=True
        )
    if asked.out:
        write_atomically(asked.out, lambda aside: aside.write_text(json.dumps(counts, indent=2) + "\n"))


if __name__ == "__main__":
    main()
