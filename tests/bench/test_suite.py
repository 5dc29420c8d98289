"""Suites: found by name, file and JSON; what is misspelt gets a suggestion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepdistill.bench.suite import Subject, Suite, bundled_suites, find_suite, names_a_suite
from stepdistill.recipe import Teacher
from stepdistill.sampling import Ddim, Heun, Renoise

HEAD = """
from stepdistill.bench import Subject, Suite
from stepdistill.recipe import Teacher
"""
SUITE = Suite(
    Teacher("bundled:digits", guidance_range=(1.0, 2.0)),
    (Subject("a/b", "ours", steps=(1, 2), rule=Renoise()), Subject(lora="x.safetensors", guidance=2.0)),
    solvers=(Ddim(), Heun()),
    seeds=(3,),
)


def test_a_suite_reads_back_from_json(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(SUITE.to_json())
    assert find_suite(str(tmp_path / "suite.json")) == SUITE


def test_bundled_suites_are_found_by_name_and_make_sense() -> None:
    suites = bundled_suites()
    assert {"digits_teacher", "digits_published", "shapes_sd_teacher", "shapes_sd3_teacher"} <= set(suites)
    assert all(isinstance(make(), Suite) for make in suites.values())
    assert find_suite("digits_teacher") == suites["digits_teacher"]()


def test_a_file_of_suites_is_a_suite(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}def one() -> Suite:\n    return Suite(Teacher('bundled:digits'), n=7)\n")
    assert find_suite(str(file)).n == 7 and find_suite(f"{file}:one").n == 7
    file = tmp_path / "two.py"
    file.write_text(f"{HEAD}def a() -> Suite:\n    return Suite(Teacher('x'))\ndef b() -> Suite:\n    return a()\n")
    with pytest.raises(ValueError, match=r"choose one of .*two\.py:a, .*two\.py:b"):
        find_suite(str(file))


def test_names_files_and_runs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert not names_a_suite("run") and not names_a_suite("runs/mine")
    assert all(map(names_a_suite, ("digits_teacher", "a/b.py", "b.py:f", "c/suite.json")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Suite(teachr_=Teacher('x'))", "'teachr_' is no field of Suite; did you mean 'teacher'"),
        ("Suite(Teacher('x'), (Subject('a', stepps=(1,)),))", "'stepps' is no field of Subject; did you mean 'steps'"),
        ("Suite(Teacher('x', gidance=2.0))", "'gidance' is no field of Teacher; did you mean 'guidance'"),
        ("Suite(Teacher('x'), steps=(0,))", r"steps must be different step counts from 1; got \[0\]"),
        ("Suite(Teacher('x'), seeds=(1, 1))", r"seeds must be different numbers .* got \[1, 1\]"),
        ("Suite(Teacher('x'), n=5)", "n must be larger than 5"),
        ("Suite(Teacher('x'), teacher_steps=(), long_run=0)", "nothing to measure"),
        ("Suite(Teacher('x'), solvers=())", "solvers must name at least one rule"),
        ("Suite(Teacher('x'), long_run=-1)", "long_run must be a number of steps"),
        ("Suite(Teacher('x'), (Subject('a', 'n'), Subject('b', 'n')))", "two students are named 'n'"),
        ("Suite(Teacher('x'), (Subject(),))", "a subject needs a source"),
        ("Suite(Teacher('x'), (Subject('a', guidance=-1.0),))", "guidance must be at least 0; got -1"),
        ("Suite(Teacher('x'), judge='mine')", "judge must be file.py:function"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{HEAD}def one() -> Suite:\n    return {text}\n")
    with pytest.raises(ValueError, match=message) as error:
        find_suite(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": [1]}, r"suite\.stepz: no such field of Suite; did you mean 'steps'"),
        ({"n": "many"}, r"suite\.n: expected int, got 'many'"),
        ({"solvers": [{"type": "Huen"}]}, r"suite\.solvers\[0\]: 'Huen' is no StepRule; did you mean 'Heun'"),
        ({"students": [{"source": "a", "named": "b"}]}, r"suite\.students\[0\]\.named: no such field .* 'name'"),
    ],
)
def test_what_is_wrong_in_json_is_one_line(change: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "suite.json"
    file.write_text(json.dumps(json.loads(SUITE.to_json()) | change))
    with pytest.raises(ValueError, match=message):
        find_suite(str(file))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits_teachr", "neither a run .* and no suite; did you mean 'digits_teacher'"),
        ("nowhere.py", "suite 'nowhere.py': no such file"),
        ("empty.py", "no function there that needs no arguments and is declared `-> Suite`"),
        ("empty.json", r"empty\.json: "),
    ],
)
def test_suites_that_are_not_there(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").touch()
    (tmp_path / "empty.json").touch()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_suite(name)
