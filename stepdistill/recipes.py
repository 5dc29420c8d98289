"""Finding recipes: by name under train/, in a Python file, or in a run's recipe.json."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from stepdistill.paths import project_dir
from stepdistill.recipe import Recipe, suggest

K = TypeVar("K")
T = TypeVar("T")


def bundled() -> dict[str, Callable[..., Recipe]]:
    """All recipe functions under train/, by name; some take ``steps``."""
    found: dict[str, Callable[..., Recipe]] = {}
    for path in sorted(project_dir("train").glob("*.py")):
        if "-> Recipe" in path.read_text():  # scripts that make teachers stand there too
            found |= functions_in(import_file(path), Recipe)
    return found


def find(name: str) -> Recipe:
    """The recipe that ``name`` stands for.

    Args:
        name: a function under train/, ``file.py`` (with one recipe), ``file.py:function``, or a ``recipe.json``.
            ``function@4`` asks a function that takes ``steps`` for a student of four steps.

    Raises:
        ValueError: if there is none, with a close name; or if it takes no steps, or not that many; or if a file cannot
            be run.
        FileNotFoundError: if a file is named that is not there.
    """
    named, _, steps = name.partition("@")
    path_text, _, function = named.partition(":") if ".py" in named else (named, "", "")
    path = Path(path_text)
    if path.suffix not in (".json", ".py"):
        recipes, function = bundled(), named
    elif not path.is_file():
        raise FileNotFoundError(f"recipe {name!r}: no such file")
    elif path.suffix == ".json":
        return Recipe.load(path)
    else:
        recipes = functions_in(import_file(path), Recipe)
        if not function and len(recipes) > 1:
            raise ValueError(f"recipe {name!r}: choose one of {', '.join(f'{name}:{r}' for r in sorted(recipes))}")
        function = function or next(iter(recipes), "")
    if not recipes:
        raise ValueError(f"recipe {name!r}: no function there that needs no arguments and is declared `-> Recipe`")
    if function not in recipes:
        raise ValueError(f"recipe {function!r}: not known{suggest(function, recipes)}")
    if not steps:
        return run_code(recipes[function], f"recipe {name!r}")
    if "steps" not in inspect.signature(recipes[function]).parameters or not steps.isdigit():
        serving = [r for r, f in recipes.items() if "steps" in inspect.signature(f).parameters]
        raise ValueError(
            f"recipe {name!r}: @ is followed by a number of steps, for {', '.join(serving) or 'none here'}"
        )
    return run_code(partial(recipes[function], steps=int(steps)), f"recipe {name!r}")


def import_file(path: Path, what: str = "recipe") -> ModuleType:
    """A file of recipes as a module, run once: objectives in it are registered, their types are found by module name.

    Args:
        path: the file.
        what: what is in it, for errors.
    """
    path = path.resolve()
    name = f"stepdistill_recipes_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            run_code(lambda: spec.loader.exec_module(module), f"{what} file {path}")
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def run_code(code: Callable[[], T], what: str) -> T:
    """Somebody's own code, whose mistakes are bad input and not ours."""
    try:
        return code()
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{error}") from error


def functions_in(module: ModuleType, kind: type[K]) -> dict[str, Callable[..., K]]:
    """The module's own functions that need no arguments and are declared to return ``kind``, by name."""
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == module.__name__
        and function.__annotations__.get("return") in (kind.__name__, kind)
        and all(p.default is not p.empty for p in inspect.signature(function).parameters.values())
    }
