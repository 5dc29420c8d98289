"""Imports flow downwards; recipes, benchmarks and pipelines are never imported by the library."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    "paths",
    "randomness",
    "distributed",
    "schedule",
    "functional",
    "kernels",
    "attention",
    "models",
    "sampling",
    "steering",
    "student",
    "editing",
    "stock",
    "testing",
    "objective",
    "parts",
    "objectives",
    "placement",
    "checkpoint",
    "logging",
    "shapes",
    "data",
    "run",
    "trainer",
    "profiling",
    "recipe",
    "recipes",
    "folders",
    "evaluation",
    "model_card",
    "lora_files",
    "known_teachers",
    "build",
    "rehearsal",
    "memory",
    "fitting",
    "plan",
    "exported",
    "export",
    "inference",
    "generate",
    "symptoms",
    "health",
    "validation",
    "distill",
    "doctor",
    "bench",
    "quickstart",
    "cli",
    "__main__",
)
"""A module or package imports from those before it, and from itself."""


def module_name(path: Path) -> str:
    """``stepdistill.models.nets`` of its file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Full names that a file imports anywhere in it, those of modules and of what is taken from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = {module_name(path): path for path in sorted((ROOT / "stepdistill").rglob("*.py"))}
GRAPH = {name: (imported(path) & FILES.keys()) - {name} for name, path in FILES.items()}


def layer(module: str) -> str:
    """The second part of a module's name."""
    return module.split(".")[1]


def test_every_module_has_its_place() -> None:
    assert {layer(name) for name in FILES if "." in name} == set(LAYERS)


def test_imports_flow_downwards() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if "." in name and "." in other and LAYERS.index(layer(other)) > LAYERS.index(layer(name))
    ]
    assert upward == []


def test_no_two_modules_import_each_other() -> None:
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(FILES)  # raises on a cycle


def test_whoever_reads_a_recipe_knows_all_objectives() -> None:
    """Otherwise a run's recipe.json could be read only after something else has imported the class it names."""
    assert "stepdistill.objectives" in GRAPH["stepdistill.recipe"]


@pytest.mark.parametrize("folder", ["train", "eval", "pipelines", "tests"])
def test_the_library_imports_nothing_that_imports_the_library(folder: str) -> None:
    assert [name for name, path in FILES.items() if any(i.split(".")[0] == folder for i in imported(path))] == []


def test_objectives_know_nothing_of_one_another() -> None:
    """A variant of a method contains the method, so its own file may import that one; nobody imports two."""
    for name, others in GRAPH.items():
        if name.startswith("stepdistill.objectives.") and name.count(".") == 3:
            assert len([other for other in others if other.startswith("stepdistill.objectives.")]) <= 1, name


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.name)
def test_a_pipeline_imports_torch_diffusers_and_the_standard_library_only(path: Path) -> None:
    """Diffusers runs the file where this library is not installed."""
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops - {"torch", "diffusers"} <= set(sys.stdlib_module_names)


def test_formulas_import_nothing_but_torch() -> None:
    for name, path in FILES.items():
        if layer(f"{name}.") in ("functional", "schedule"):
            tops = {i.split(".")[0] for i in imported(path)}
            assert tops - {"torch", "stepdistill"} <= set(sys.stdlib_module_names), name
