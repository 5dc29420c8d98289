"""Finding recipes: by name under train/, in a Python file, or in a run's recipe.json."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from stepdistill.paths import project_dir
from stepdistill.recipe import Recipe, suggest


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
        ValueError: if there is none; suggests a close name.
        FileNotFoundError: if a file is named that is not there.
    """
    path_text, _, wanted = name.partition(":") if ".py" in name else (name, "", "")
    path = Path(path_text)
    if path.suffix in (".json", ".py") and not path.is_file():
        raise FileNotFoundError(f"recipe {name!r}: no such file")
    if path.suffix == ".json":
        return Recipe.load(path)
    recipes = _recipes_in(_import(path)) if path.suffix == ".py" else bundled()
    if path.suffix == ".py" and not wanted and len(recipes) == 1:
        (wanted,) = recipes
    wanted = wanted or name
    if wanted not in recipes:
        raise ValueError(f"recipe {wanted!r}: not known{suggest(wanted, recipes)}")
    return recipes[wanted]()


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"stepdistill_recipes_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
