"""A suite: which teacher, which students, at which step counts and seeds; found by name as recipes are."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stepdistill.paths import project_dir
from stepdistill.recipe import NEIGHBOURS, Teacher, check_judge, decode, encode, suggest
from stepdistill.recipes import functions_in, import_file, run_code
from stepdistill.sampling import Ddim, DpmPP2M, Heun, StepRule


@dataclass(frozen=True)
class Subject:
    """A student of the suite's teacher, wherever it comes from."""

    source: str = ""
    """A run directory, a pipeline folder, a hub id, or ``bundled:NAME``; empty is the suite's teacher, for a LoRA."""
    name: str = ""
    """In tables; empty takes the source's."""
    lora: str = ""
    """A LoRA, file or folder, that is added to the pipeline at ``source``."""
    lora_scale: float = 1.0
    """Its strength."""
    steps: tuple[int, ...] = ()
    """Step counts to measure it at; empty takes the suite's."""
    rule: StepRule | None = None
    """How a step is made, on evenly spaced times; None goes the way of the scheduler that comes with it."""
    guidance: float = 0.0
    """Guidance scale, for students that take one; 0 leaves it to the teacher's range, or else without guidance."""
    method: str = ""
    """For tables; empty takes the run's objective."""

    def __post_init__(self) -> None:
        """Check what needs no disk."""
        if not (self.source or self.lora):
            raise ValueError("a subject needs a source (run, pipeline folder, hub id) or a lora; both are empty")
        check_steps("steps", self.steps)
        for field in ("guidance", "lora_scale"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be at least 0; got {getattr(self, field)}")


@dataclass(frozen=True)
class Suite:
    """What ``stepdistill bench`` measures: every row (who, how, in how many steps) with every seed."""

    teacher: Teacher
    students: tuple[Subject, ...] = ()
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Step counts of the students; those that a student does not serve are left out and noted. Empty takes all."""
    solvers: tuple[StepRule, ...] = (Ddim(), DpmPP2M(), Heun())
    """Of the teacher."""
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8)
    """Step counts of the teacher under each solver."""
    long_run: int = 50
    """Steps of the teacher's long run, under the first solver; 0 leaves it out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Sampling seeds; two or more give error bars."""
    n: int = 5000
    """Images per seed; Frechet distances of different n never compare."""
    judge: str = ""
    """For a teacher of your own: ``file.py:function``, a function that takes the opened teacher and ``n`` and returns
    an ``Evaluator``; empty takes the bundled benchmark that fits the teacher."""
    judge_files: tuple[str, ...] = ()
    """Files that decide what ``judge`` says (weights, reference statistics, prompts): a change measures anew."""
    device: str = "cpu"
    """Where to sample: cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        """Check what needs no disk."""
        check_steps("steps", self.steps)
        check_steps("teacher_steps", self.teacher_steps)
        if not (self.students or self.teacher_steps or self.long_run):
            raise ValueError("nothing to measure: students, teacher_steps and long_run are all empty")
        if self.long_run < 0:
            raise ValueError(f"long_run must be a number of steps, or 0 for none; got {self.long_run}")
        if not self.solvers:
            raise ValueError("solvers must name at least one rule, such as Ddim()")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**31 for s in self.seeds):
            raise ValueError(f"seeds must be different numbers from 0 to 2^31 - 1; got {list(self.seeds)}")
        if self.n <= NEIGHBOURS:
            raise ValueError(f"n must be larger than {NEIGHBOURS}, the neighbours looked at; got {self.n}")
        check_judge("judge", self.judge)
        names = [s.name for s in self.students if s.name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two students are named {twice[0]!r}; tables would not tell them apart")

    def to_json(self) -> str:
        """Everything, readable by ``find_suite``."""
        return json.dumps(encode(self), indent=1)


def check_steps(field: str, steps: tuple[int, ...]) -> None:
    """Step counts are different and at least 1."""
    if any(k < 1 for k in steps) or len(set(steps)) < len(steps):
        raise ValueError(f"{field} must be different step counts from 1; got {list(steps)}")


def bundled_suites() -> dict[str, Callable[[], Suite]]:
    """All suite functions under eval/suites, by name."""
    found: dict[str, Callable[[], Suite]] = {}
    for path in sorted((project_dir("eval") / "suites").glob("*.py")):
        found |= functions_in(import_file(path, "suite"), Suite)
    return found


def names_a_suite(name: str) -> bool:
    """Whether ``name`` is meant as a suite rather than as a run or a pipeline folder."""
    if Path(name.partition(":")[0]).suffix in (".py", ".json"):
        return True
    return not Path(name).exists() and "/" not in name


def find_suite(name: str) -> Suite:
    """The suite that ``name`` stands for.

    Args:
        name: a function under eval/suites, ``file.py`` (with one suite), ``file.py:function``, or a ``suite.json``.

    Raises:
        ValueError: if there is none, with a close name, or it cannot be read; a misspelt field gets a suggestion.
        FileNotFoundError: if a file is named that is not there.
    """
    path_text, _, function = name.partition(":") if ".py" in name else (name, "", "")
    path = Path(path_text)
    if path.suffix not in (".json", ".py"):
        suites, function = bundled_suites(), name
    elif not path.is_file():
        raise FileNotFoundError(f"suite {name!r}: no such file")
    elif path.suffix == ".json":
        return _read_json(path)
    else:
        suites = functions_in(_plainly(lambda: import_file(path, "suite")), Suite)
        if not function and len(suites) > 1:
            raise ValueError(f"suite {name!r}: choose one of {', '.join(f'{name}:{s}' for s in sorted(suites))}")
        function = function or next(iter(suites), "")
    if not suites:
        raise ValueError(f"suite {name!r}: no function there that needs no arguments and is declared `-> Suite`")
    if function not in suites:
        raise ValueError(
            f"{name}: neither a run with a pipeline/ nor a pipeline folder (no model_index.json), and no suite"
            f"{suggest(function, suites)}"
        )
    return _plainly(lambda: run_code(suites[function], f"suite {name!r}"))


def _read_json(path: Path) -> Suite:
    try:
        return decode(json.loads(path.read_text(encoding="utf-8")), Suite, "suite")
    except ValueError as error:  # of the text, of its encoding, or of a field
        raise ValueError(f"{path}: {error}") from error


def _plainly(code: Callable[[], object]) -> object:
    """A misspelt keyword in somebody's suite file, with the field that was meant."""
    try:
        return code()
    except ValueError as error:
        found = re.search(r"TypeError: (\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        kinds = {kind.__name__: kind for kind in (Suite, Subject, Teacher)}
        if not found or found[1] not in kinds:
            raise
        where = str(error).partition(": TypeError")[0]
        fields = [f.name for f in dataclasses.fields(kinds[found[1]])]
        raise ValueError(f"{where}: {found[2]!r} is no field of {found[1]}{suggest(found[2], fields)}") from error
