"""From a suite to rows: whom to sample, how, in how many steps; read from configs alone, so that asking is cheap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from stepdistill.bench.cache import Cache
from stepdistill.bench.suite import Subject, Suite
from stepdistill.exported import read_configs, trained_steps
from stepdistill.lora_files import find_lora
from stepdistill.paths import project_dir
from stepdistill.recipe import Recipe, Teacher
from stepdistill.sampling import StepRule

ANY_STEPS = (1, 2, 4, 8)
"""Of students that serve every step count, where nobody names any."""


@dataclass(frozen=True)
class Row:
    """One line of the table to be; small, so that it travels between processes."""

    name: str
    role: Literal["teacher", "student"]
    kind: Literal["teacher", "exported", "pipeline"]
    """Who opens it: the suite's teacher; a student that this library wrote; any other pipeline, with a LoRA or not."""
    source: str
    """Folder, hub id or ``bundled:NAME``."""
    lora: str
    lora_scale: float
    steps: int
    rule: StepRule | None
    """None goes the way of the scheduler that comes with it."""
    guidance: float
    """0 leaves it to the teacher's range, or else to none."""
    method: str
    identity: str
    """SHA-256 over weights and configs."""

    def facts(self) -> dict[str, Any]:
        """What an outcome depends on; names in tables do not count."""
        how = {"steps": self.steps, "rule": repr(self.rule), "guidance": self.guidance}
        return how | {"kind": self.kind, "weights": self.identity, "lora_scale": self.lora_scale if self.lora else None}


def rows_of(suite: Suite, cache: Cache) -> tuple[list[Row], list[str]]:
    """All rows of a suite, the teacher's first, and notes of what was left out.

    Raises:
        FileNotFoundError: if a subject is not there.
        ValueError: if a subject is damaged, or of another teacher.
    """
    rows, notes = _teacher_rows(suite, cache), []
    for subject, name in zip(suite.students, _names(suite.students), strict=True):
        wanted = subject.steps or suite.steps
        found, served = _student_rows(subject, name, wanted, suite, cache)
        rows += [row for row in found if row.steps in wanted or not wanted]
        left = [k for k in wanted if k not in served]
        if left:
            notes.append(f"{name}: left out at {_steps(left)}; it serves {_steps(served)}")
    return rows, notes


def teacher_hash(teacher: Teacher, cache: Cache) -> str:
    """SHA-256 over the teacher's files (its LoRA's too); settings such as guidance are no part of it."""
    identity = _pipeline_hash(teacher.source, cache)
    files = [p for p in (teacher.custom_pipeline, teacher.lora and find_lora(Path(teacher.lora))) if p]
    return ":".join([identity, *(cache.file_hash(Path(p)) for p in files)])


def _teacher_rows(suite: Suite, cache: Cache) -> list[Row]:
    identity, scale = teacher_hash(suite.teacher, cache), _scale(suite.teacher)
    first = suite.solvers[0]
    pairs = [(rule, k) for rule in suite.solvers for k in suite.teacher_steps]
    if suite.long_run and (first, suite.long_run) not in pairs:
        pairs.append((first, suite.long_run))
    return [
        Row("teacher", "teacher", "teacher", suite.teacher.source, "", 1.0, k, rule, scale, "-", identity)
        for rule, k in pairs
    ]


def _scale(teacher: Teacher) -> float:
    return teacher.guidance if teacher.guidance_range is None else sum(teacher.guidance_range) / 2


def _student_rows(
    subject: Subject, name: str, wanted: Sequence[int], suite: Suite, cache: Cache
) -> tuple[list[Row], list[int]]:
    """Rows at every step count that it serves (of those wanted, where it serves all), and these counts."""
    path = Path(subject.source)
    if not subject.lora and path.is_dir():
        recipe = recipe_of(path)
        if recipe is not None and recipe.teacher.source != suite.teacher.source:
            raise ValueError(
                f"student {name!r}: its teacher is {recipe.teacher.source}, and the suite's {suite.teacher.source}; "
                "measure it in a suite of its own"
            )
        method = subject.method or (type(recipe.objective).__name__ if recipe else "distilled")
        folders = _exported_folders(path)
        if folders:
            rows = [
                Row(name, "student", "exported", str(folder), "", 1.0, k, None, subject.guidance, method, identity)
                for k, folder in sorted(folders.items())
                for identity in [cache.folder_hash(folder)]
            ]
            return rows, [row.steps for row in rows]
    source, trained = subject.source or suite.teacher.source, None
    identity = _pipeline_hash(source, cache)
    if not source.startswith("bundled:"):
        source = str(pipeline_folder(source))  # of a hub id the files that the hash is of
    if subject.lora:
        file = find_lora(Path(subject.lora))
        identity += ":" + cache.file_hash(file)
        config = file.parent / "scheduler" / "scheduler_config.json"
        if config.is_file() and subject.rule is None:
            identity += ":" + cache.file_hash(config)
            trained = _trained(config)
    steps = trained or list(wanted or ANY_STEPS)
    method = subject.method or ("LoRA" if subject.lora else "pipeline")
    base = Row(
        name, "student", "pipeline", source, subject.lora, subject.lora_scale, 1, subject.rule, subject.guidance,
        method, identity,
    )  # fmt: skip
    return [replace(base, steps=k) for k in steps], steps


def _exported_folders(path: Path) -> dict[int, Path]:
    """Pipelines that this library wrote, of a run or of one folder, by the step count that each is trained for."""
    if (path / "pipeline").is_dir():
        folders = [path / "pipeline", *sorted(path.glob("pipeline-*step"))]
    elif (path / "model_index.json").is_file():
        folders = [path]
    else:
        raise FileNotFoundError(
            f"{path}: neither a run with a pipeline/ nor a pipeline folder (no model_index.json)"
            + ("; its training has not ended" if (path / "checkpoints").is_dir() else "")
        )
    if len(folders) == 1 and not _is_exported(folders[0]):
        return {}
    return {trained_steps(folder, *read_configs(folder)): folder for folder in folders}


def _is_exported(folder: Path) -> bool:
    """Whether this library wrote it; where that cannot be read, it did, so that reading it says what is wrong."""
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
        if "trained_steps" in index:
            return True
        config = folder / "scheduler" / "scheduler_config.json"
        return "_trained_steps" in json.loads(config.read_bytes()) if config.is_file() else False
    except (ValueError, TypeError):
        return True


def _trained(config: Path) -> list[int] | None:
    """Step counts of a LoRA's own scheduler; None where it serves all."""
    try:
        return json.loads(config.read_bytes()).get("_trained_steps")
    except ValueError as error:
        raise ValueError(f"{config} is damaged ({error}); export the LoRA again") from error


def _pipeline_hash(source: str, cache: Cache) -> str:
    return cache.folder_hash(pipeline_folder(source))


def pipeline_folder(source: str) -> Path:
    """Where a pipeline's files are on this machine; a hub id that was never used here is fetched.

    Raises:
        FileNotFoundError: if there is no such folder, or the hub cannot be reached.
    """
    if source.startswith("bundled:"):
        return project_dir("assets") / source.removeprefix("bundled:")
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise FileNotFoundError(
            f"{source}: neither a run with a pipeline/ nor a pipeline folder (no model_index.json), nor a hub id "
            "owner/name"
        )
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except HFValidationError as error:
        raise FileNotFoundError(f"{source}: no such folder, and no hub id owner/name ({error})") from error
    except LocalEntryNotFoundError:
        pass
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(source, use_safetensors=True))
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{source}: no such folder, and as a hub id it is neither in the local cache nor reachable ({reason[:160]})"
        ) from error


def recipe_of(source: Path) -> Recipe | None:
    """The recipe that made a run, or the pipeline folder of one; None where none is kept."""
    for folder in (source, source.absolute().parent):
        if (folder / "recipe.json").is_file():
            return Recipe.load(folder / "recipe.json")
    return None


def _names(students: Sequence[Subject]) -> list[str]:
    """Names in tables: those given, or the sources; of two alike the second is numbered."""
    names = [s.name or s.lora or s.source for s in students]
    return [n if names.index(n) == i else f"{n} ({names[: i + 1].count(n)})" for i, n in enumerate(names)]


def _steps(counts: Sequence[int]) -> str:
    return f"{', '.join(map(str, counts))} step{'s' if list(counts) != [1] else ''}"
