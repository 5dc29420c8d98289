"""Every objective keeps the promises that let a reader, a recipe and the command line rely on it unseen."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

import stepdistill.objectives
from stepdistill.cli import methods_table
from stepdistill.objective import Objective, register, registered
from stepdistill.recipe import decode, encode
from stepdistill.recipes import bundled
from stepdistill.sampling import Sampler, trailing
from stepdistill.schedule import DiscreteVP
from stepdistill.testing import MixtureTeacher, exact_student

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "stepdistill" / "objectives"
OBJECTIVES = {name: cls for name, cls in registered().items() if cls.__module__.startswith("stepdistill.objectives.")}
ROLES = {"student", "teacher", "critic", "disc"}


@pytest.fixture(params=OBJECTIVES)
def name(request: pytest.FixtureRequest) -> str:
    """Each registered name."""
    return request.param


@pytest.fixture
def cls(name: str) -> type[Objective]:
    """Its class."""
    return OBJECTIVES[name]


def source(cls: type) -> Path:
    """The file that a class stands in."""
    return Path(inspect.getsourcefile(cls))


def test_there_are_objectives() -> None:
    assert {"kd", "dmd2", "cd", "tscd", "ladd"} <= set(OBJECTIVES)


def test_defaults_suffice_and_make_a_frozen_hashable_value(cls: type[Objective]) -> None:
    objective = cls()
    assert objective == cls() and hash(objective) == hash(cls())
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.anything = 1


def test_it_reads_back_from_json_as_it_was(cls: type[Objective]) -> None:
    again = decode(json.loads(json.dumps(encode(cls()))), Objective, "objective")
    assert type(again) is cls and again == cls()


def test_its_docstring_says_where_in_the_paper_it_stands(cls: type[Objective]) -> None:
    assert re.search(r"\b(eq|eqs|sec|alg|app|fig|tab)\. ?\w", inspect.getdoc(cls))


def test_the_first_line_of_its_file_names_the_registered_paper(cls: type[Objective]) -> None:
    first = source(cls).read_text().splitlines()[0]
    assert re.fullmatch(r"\d{4}\.\d{4,5}", cls.paper)
    assert re.search(rf"\barXiv:{re.escape(cls.paper)}\b", first)


def test_it_stands_in_the_folder_of_its_family_under_its_name(name: str, cls: type[Objective]) -> None:
    assert source(cls) == FOLDER / cls.family / f"{name}.py"


def test_its_file_is_short(cls: type[Objective]) -> None:
    assert len(source(cls).read_text().splitlines()) <= 150


def test_it_is_final(cls: type[Objective]) -> None:
    assert cls.__subclasses__() == []
    assert cls.__bases__ == (Objective,)


def test_it_asks_for_networks_and_data_that_exist(cls: type[Objective]) -> None:
    objective = cls()
    movers = {mover for turn in objective.turns() for mover in turn.moves}
    teacher = MixtureTeacher.ring(DiscreteVP.linear())
    own = set(objective.extras(exact_student(teacher, Sampler(trailing(1)))))
    assert "student" in movers and "teacher" not in movers and movers.isdisjoint(objective.averages())
    assert objective.needs <= ROLES and movers <= ROLES | own
    assert objective.data <= {"x0", "path"}
    names = [turn.name for turn in objective.turns()]
    assert len(set(names)) == len(names)  # logs are told apart by them


def test_every_field_is_explained(cls: type[Objective]) -> None:
    """By the string below it, which is what the command line shows."""
    (node,) = (node for node in ast.parse(source(cls).read_text()).body if getattr(node, "name", None) == cls.__name__)
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(below, ast.Expr) and isinstance(below.value.value, str), ast.unparse(field)


def test_it_is_exported_tested_and_has_a_recipe(name: str, cls: type[Objective]) -> None:
    assert getattr(stepdistill.objectives, cls.__name__) is cls and cls.__name__ in stepdistill.objectives.__all__
    assert (ROOT / "tests" / "objectives" / f"test_{name}.py").is_file()
    recipe = bundled()[f"digits_{name}"]()
    assert type(recipe.objective) is cls


def test_the_folders_table_lists_what_there_is() -> None:
    assert methods_table() in (FOLDER / "README.md").read_text()  # stepdistill methods --markdown


def test_no_file_of_objectives_registers_nothing() -> None:
    files = {path for path in FOLDER.glob("*/*.py") if path.name != "__init__.py"}
    assert files == {source(cls) for cls in OBJECTIVES.values()}


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"'kd' is registered already, by stepdistill.objectives.trajectory.kd"):
        register("kd", family="trajectory", paper="0000.00000")(OBJECTIVES["kd"])
