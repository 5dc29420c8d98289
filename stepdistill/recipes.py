"""Finding recipes: by name under train/, in a Python file, or in a run's recipe.json."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from stepdistill.paths import project_dir
from stepdistill.recipe import Recipe, suggest

T = TypeVar("T")


def bundled() -> dict[str, Callable[[], Recipe]]:
    """All recipe functions under train/, by name."""
    found: dict[str, Callable[[], Recipe]] = {}
    for path in sorted(project_dir("train").glob("*.py")):
        if "-> Recipe" in path.read_text():  # scripts that make teachers stand there too
            found |= _recipes_in(_import(path))
    return found


def find(name: str) -> Recipe:
    """The recipe that ``name`` stands for.

    Args:
        name: a function under train/, ``file.py`` (with one recipe), ``file.py:function``, or a ``recipe.json``.

    Raises:
        ValueError: if there is none, with a close name; or if a file cannot be run.
        FileNotFoundError: if a file is named that is not there.
    """
    path_text, _, function = name.partition(":") if ".py" in name else (name, "", "")
    path = Path(path_text)
    if path.suffix not in (".json", ".py"):
        recipes, function = bundled(), name
    elif not path.is_file():
        raise FileNotFoundError(f"recipe {name!r}: no such file")
    elif path.suffix == ".json":
        return Recipe.load(path)
    else:
        recipes = _recipes_in(_import(path))
        if not function and len(recipes) > 1:
            raise ValueError(f"recipe {name!r}: choose one of {', '.join(f'{name}:{r}' for r in sorted(recipes))}")
        function = function or next(iter(recipes), "")
    if not recipes:
        raise ValueError(f"recipe {name!r}: no function there that takes nothing and is declared `-> Recipe`")
    if function not in recipes:
        raise ValueError(f"recipe {function!r}: not known{suggest(function, recipes)}")
    return _run(recipes[function], f"recipe {name!r}")


def _import(path: Path) -> ModuleType:
    """The file as a module, run once: objectives in it are registered, and their types are found by module name."""
    path = path.resolve()
    name = f"stepdistill_recipes_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            _run(lambda: spec.loader.exec_module(module), f"recipe file {path}")
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _run(code: Callable[[], T], what: str) -> T:
    """Somebody's own code, whose mistakes are bad input and not ours."""
    try:
        return code()
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{error}") from error


def _recipes_in(module: ModuleType) -> dict[str, Callable[[], Recipe]]:
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == module.__name__
        and function.__annotations__.get("return") in ("Recipe", Recipe)
        and not inspect.signature(function).parameters
    }
