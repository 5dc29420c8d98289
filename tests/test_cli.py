"""The command line: what bad input gets is one line, exit status 2, and a disk as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stepdistill.build import new_student, open_teacher
from stepdistill.cli import COMMANDS, USAGE, main
from stepdistill.data import Prompts
from stepdistill.distill import distill
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.grids import save_grid
from stepdistill.evaluation.records import load_records
from stepdistill.export import load_student, save_pipeline
from stepdistill.generate import sample
from stepdistill.models.families import open_pipeline
from stepdistill.objective import registered
from stepdistill.objectives import DMD2
from stepdistill.parts.gan import Gan
from stepdistill.recipe import Recipe, Teacher
from stepdistill.recipes import bundled, find
from stepdistill.sampling import Sampler, trailing
from stepdistill.trainer import AdamW, Trainer
from tests.tiny import sd

TINY = """
from stepdistill.data import DigitsData, TeacherPairs
from stepdistill.objectives import KD, LADD
from stepdistill.recipe import Recipe, Teacher
from stepdistill.sampling import Sampler, trailing
from stepdistill.trainer import AdamW, Run

RUN = Run(steps=2, batch=2, log_every=1)

def kd() -> Recipe:
    "Two steps of regression."
    data = TeacherPairs(4, solver=Sampler(trailing(2)))
    return Recipe(Teacher("bundled:digits"), KD(), data, {"student": AdamW()}, Sampler(trailing(2)), RUN)

def ladd() -> Recipe:
    "Two steps of a game."
    players = {"student": AdamW(), "disc": AdamW()}
    return Recipe(Teacher("bundled:digits"), LADD(), DigitsData(), players, Sampler(trailing(2)), RUN)
"""


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The command line within this process, in an empty working directory, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))

    def command(*args: str | Path) -> Ran:
        capsys.readouterr()
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as exit_:
            code = exit_.code
        return Ran(code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two tiny recipes."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the regression."""
    out = tmp_path_factory.mktemp("finished")
    distill(find(f"{recipes}:kd"), out)
    return out


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported two-step student, not trained."""
    opened = open_teacher(Teacher("bundled:digits"))
    path = tmp_path_factory.mktemp("student") / "pipeline"
    return save_pipeline(new_student(opened, Sampler(trailing(2))), opened, path)


def tree(folder: Path) -> dict[str, bytes | None]:
    """All there is in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(ran: Ran, pattern: str) -> None:
    """Exit status 2 and one line that says why."""
    assert ran.code == 2, ran
    assert ran.out == "", ran
    assert ran.err.startswith("stepdistill: ") and ran.err.count("\n") == 1 and ran.err.endswith("\n"), ran
    assert re.search(pattern, ran.err), ran


# The commands


def test_without_a_command_the_usage_is_shown(run: Run) -> None:
    assert run() == (2, USAGE + "\n", "")
    assert run("--help") == (0, USAGE + "\n", "")
    assert all(f"stepdistill {name} " in USAGE for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_help(command: str, run: Run) -> None:
    ran = run(command, "--help")
    assert ran.code == 0 and command in ran.out and ran.err == ""


def test_methods_lists_every_registered_objective(run: Run) -> None:
    ran = run("methods")
    assert ran.code == 0
    for name, cls in registered().items():
        assert re.search(rf"^{name} +{cls.family} +arXiv:{cls.paper} ", ran.out, re.MULTILINE)
    rows = json.loads(run("methods", "--json").out)
    assert {row["name"] for row in rows} == set(registered())
    assert all(sorted(row) == ["data", "family", "name", "needs", "paper", "steps", "what"] for row in rows)
    assert all(set(row["steps"]) <= {1, 2, 4, 8} for row in rows)
    (kd,) = (row for row in rows if row["name"] == "kd")
    assert kd["needs"] == ["student"] and kd["data"] == ["path"] and kd["paper"] == "arXiv:2101.02388"
    assert kd["steps"] == [1, 2, 4, 8]


def test_plan_counts_what_a_recipe_will_take(run: Run) -> None:
    recipe = find("digits_kd")
    made = recipe.data.count * recipe.data.solver.steps
    (stage,) = json.loads(run("plan", "digits_kd", "--json").out)
    assert stage["evaluations"] == recipe.run.steps * recipe.run.batch * 3 + made
    said = run("plan", "digits_kd", "--card", "24").out
    assert f"{stage['evaluations']:,} network evaluations" in said
    peak = next(line.split()[1] for line in said.splitlines() if line.startswith("peak"))
    assert float(peak) == pytest.approx(stage["memory"]["peak"] / 2**30, rel=0.01)
    assert "on 24 GiB: as it is: " in said


def test_distill_lists_every_bundled_recipe_with_its_first_line(run: Run) -> None:
    ran = run("distill", "--help")
    listed = ran.out.partition("recipes:")[2]
    assert set(re.findall(r"\w+", listed)) >= set(bundled())
    assert re.search(r"^  digits_kd +Regression onto", listed, re.MULTILINE)


def test_every_field_can_be_set_and_the_resolved_recipe_printed(run: Run, recipes: Path, tmp_path: Path) -> None:
    overrides = (
        "--run.steps 7 --optim.disc.lr 0.5 --objective.gan.weight 3 --sampler.times 1.0 --objective.student-every 4"
    )
    ran = run("distill", f"{recipes}:ladd", "--print", *overrides.split())
    recipe = Recipe.from_json(ran.out)
    assert ran.code == 0 and ran.err == ""
    assert recipe.run.steps == 7 and recipe.optim["disc"].lr == 0.5 and recipe.sampler.times == (1.0,)
    assert recipe.objective.gan.weight == 3.0 and recipe.objective.student_every == 4
    assert recipe.optim["student"] == find(f"{recipes}:ladd").optim["student"]
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_recipe_prints_itself(name: str, run: Run) -> None:
    ran = run("distill", name, "--print")
    assert Recipe.from_json(ran.out) == find(name)


def test_an_option_of_evaluation_switches_it_on(run: Run) -> None:
    options = ("--evaluation.judge", "judge.py:judge", "--evaluation.every", "500", "--print")
    printed = run("distill", "sd_own_finetune", *options).out
    assert json.loads(printed)["evaluation"]["judge"] == "judge.py:judge"
    assert json.loads(run("distill", "sd_own_finetune", "--print").out)["evaluation"] is None


def test_distill_runs_and_resumes_a_recipe(run: Run, recipes: Path, tmp_path: Path) -> None:
    ran = run("distill", f"{recipes}:kd", "--out", "a")
    assert ran.code == 0
    assert "load the student with:" in ran.out and "DiffusionPipeline.from_pretrained(" in ran.out
    before = tree(tmp_path)
    assert run("distill", f"{recipes}:kd", "--out", "a").code == 0  # there is nothing left to do
    assert tree(tmp_path) == before
    assert run("distill", "a/recipe.json", "--out", "b").code == 0
    assert (tmp_path / "b/metrics.jsonl").read_bytes() == (tmp_path / "a/metrics.jsonl").read_bytes()


def test_sample_draws_what_the_student_draws(run: Run, student: Path, tmp_path: Path) -> None:
    ran = run("sample", student, "--labels", "3", "7", "--rows", "2", "--seed", "5", "--out", "deep/a.png")
    assert ran.code == 0 and ran.out == "wrote deep/a.png: 2 rows of classes 3, 7\n"
    cond = {"class_labels": torch.tensor([3, 7, 3, 7])}
    expected = load_student(student).sample((4, 1, 8, 8), cond, seed=5)
    save_grid(tmp_path / "b.png", to_uint8(expected), 2)
    assert (tmp_path / "deep/a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert run("sample", student, "--steps", "2").code == 0
    assert Image.open(tmp_path / "samples.png").size[0] > Image.open(tmp_path / "deep/a.png").size[0]


def test_sample_takes_a_run_and_runs_none_of_its_code(run: Run, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy/pipeline/pipeline.py").write_text("raise SystemError('this file was run')")
    assert run("sample", "copy").code == 0


def test_bench_writes_the_records_that_it_prints(run: Run, student: Path, tmp_path: Path) -> None:
    ran = run("bench", student, "--n", "64", "--seeds", "0", "1", "--teacher-steps", "1", "2", "--json")
    records = load_records(tmp_path / "runs" / "bench-runs" / "results.json")
    assert (tmp_path / "runs" / "bench-runs" / "report" / "index.html").is_file()
    assert ran.code == 0 and [row["value"] for row in json.loads(ran.out)] == [record.value for record in records]
    assert {(r.role, r.steps) for r in records} == {("teacher", 1), ("teacher", 2), ("student", 2)}
    fd = {(r.role, r.steps): r.value for r in records if r.metric == "fd"}
    assert fd["student", 2] == fd["teacher", 2]  # an untrained student is its teacher


# Prompts


@pytest.fixture(scope="module")
def from_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported student of a tiny text-to-image teacher, with the recipe that a run keeps beside it; not trained."""
    run = tmp_path_factory.mktemp("from_prompts")
    opened = open_pipeline(sd.pipeline())
    save_pipeline(new_student(opened, Sampler(trailing(2))), opened, run / "pipeline")
    recipe = Recipe(
        Teacher("owner/name", guidance=2.0),
        DMD2(gan=Gan(weight=0.0)),
        Prompts(prompts=("a red ring", "rain", "sun")),
        {"student": AdamW(), "critic": AdamW()},
    )
    (run / "recipe.json").write_text(recipe.to_json())
    return run


def test_sample_draws_prompts_by_the_stock_pipeline(run: Run, from_prompts: Path, tmp_path: Path) -> None:
    ran = run("sample", from_prompts, "--prompts", "a cat", "a dog", "--rows", "3", "--seed", "5", "--out", "a.png")
    assert ran.code == 0 and ran.out == "wrote a.png: 3 rows of 2 prompts\n"
    save_grid(tmp_path / "b.png", sample(from_prompts, ["a cat", "a dog"] * 3, seed=5, output="uint8"), 2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (tmp_path / "p.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    assert run("sample", from_prompts, "--prompts-file", "p.jsonl", "--rows", "3", "--seed", "5").code == 0
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("parts", [(), ("--parts", "cache_text"), ("--parts", "channels_last")], ids=str)
def test_sample_optimised_draws_the_same(parts: tuple[str, ...], run: Run, from_prompts: Path, student: Path) -> None:
    """Pictures may differ by one level, where rounding falls the other way."""
    for source, wanted in ((from_prompts, ("--prompts", "a cat", "a dog")), (student, ("--labels", "3", "1"))):
        assert run("sample", source, *wanted, "--rows", "2", "--out", "a.png").code == 0
        assert run("sample", source, *wanted, "--rows", "2", "--optimize", *parts, "--out", "b.png").code == 0
        a, b = (np.asarray(Image.open(name), dtype=int) for name in ("a.png", "b.png"))
        assert a.shape == b.shape and abs(a - b).max() <= 1


def test_sample_takes_the_runs_own_prompts_by_default(run: Run, from_prompts: Path) -> None:
    assert run("sample", from_prompts).out == "wrote samples.png: 4 rows of 3 prompts\n"
    assert run("sample", from_prompts / "pipeline").out == "wrote samples.png: 4 rows of 3 prompts\n"


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        ("--labels 3", "--labels: .* takes prompts; give --prompts"),
        ("--prompts a --prompts-file p.txt", "--prompts and --prompts-file are both given"),
        ("--prompts-file p.txt", "--prompts-file p.txt: no such file"),
        ("--prompts-file empty.txt", "--prompts-file empty.txt: no prompts in it"),
        ("--prompts a --steps 4", "steps 4: this student was trained for 2"),
        ("--prompts a --steps 4 --optimize", "steps 4: this student was trained for 2"),
        ("--prompts a --parts compile", "--parts: a part of --optimize; give both"),
        ("--prompts a --tiny-decoder d", "--tiny-decoder: a part of --optimize; give both"),
        ("--prompts a --optimize --tiny-decoder ./d", "tiny_decoder ./d: no folder or hub id of an AutoencoderTiny"),
        ("--prompts a --optimize --parts cuda_graph", "cuda_graph: the pipeline is on cpu; move it to a GPU"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(
    args: str, pattern: str, run: Run, from_prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert_refused(run("sample", from_prompts, *args.split()), pattern)
    assert tree(tmp_path) == {"empty.txt": b"\n"}


def test_prompts_are_asked_for_where_none_are_known_and_refused_where_none_are_taken(
    run: Run, from_prompts: Path, student: Path, tmp_path: Path
) -> None:
    shutil.copytree(from_prompts / "pipeline", tmp_path / "alone")
    assert_refused(run("sample", "alone"), '--prompts: alone takes prompts; give some, as in --prompts "a red circle"')
    assert_refused(run("sample", student, "--prompts", "a cat"), "--prompts: .* takes no prompts")


def test_bench_measures_students_of_one_teacher_that_can_be_judged(
    run: Run, from_prompts: Path, student: Path, finished: Path, tmp_path: Path
) -> None:
    said = "have different teachers, bundled:digits at guidance 1.0 and owner/name at guidance 2.0; measure them one"
    assert_refused(run("bench", student, from_prompts), said)
    sd.pipeline().save_pretrained(tmp_path / "teacher")
    recipe = (from_prompts / "recipe.json").read_text().replace("owner/name", str(tmp_path / "teacher"))
    shutil.copytree(from_prompts, tmp_path / "run")
    (tmp_path / "run/recipe.json").write_text(recipe)
    assert_refused(run("bench", "run"), "evaluation judges digits .* makes samples of")
    (tmp_path / "run/recipe.json").write_text("{")
    assert_refused(run("bench", "run"), "run/recipe.json: not JSON")


def test_bench_knows_a_runs_method(run: Run, finished: Path, tmp_path: Path) -> None:
    ran = run("bench", finished, "--n", "20", "--seeds", "0", "--teacher-steps", "2", "--out", "results.json")
    assert ran.code == 0
    records = load_records(tmp_path / "results.json")
    assert {(r.role, r.method, r.n) for r in records} == {("teacher", "-", 20), ("student", "KD", 20)}


# What bad input gets


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["distil"], "no command 'distil'; did you mean 'distill'"),
        (["xyz"], "no command 'xyz'; there are bench, distill, doctor, methods, plan, quickstart, sample"),
        (["distill", "digits_kdd"], "recipe 'digits_kdd': not known; did you mean 'digits_kd"),
        (["distill", "nowhere.py"], "recipe 'nowhere.py': no such file"),
        (["distill", "nowhere.json"], "recipe 'nowhere.json': no such file"),
        (["distill", "broken.json"], "broken.json: not JSON"),
        (["distill", "broken.py"], "broken.py: SyntaxError"),
        (["distill", "--out", "x", "digits_kd"], "distill --out: the recipe comes first"),
        (["sample", "nowhere"], "nowhere: neither a run with a pipeline/ nor a pipeline folder"),
        (["bench"], "bench: name a suite, or at least one run directory"),
        (["bench", "digits_teachr"], "digits_teachr: neither a run .* did you mean 'digits_teacher'"),
        (["bench", "nowhere"], "nowhere: neither a run with a pipeline/ nor a pipeline folder"),
        (["bench", "digits_teacher", "--n", "5"], "n must be larger than 5"),
        (["bench", "digits_teacher", "--seeds", "1", "1"], "seeds must be different"),
        (["bench", "digits_teacher", "--teacher-steps", "4", "0"], "teacher_steps must be"),
        (["bench", "digits_teacher", "--out", "broken.json/out"], "broken.json is no folder that can be written"),
        (["bench", "digits_teacher", "--jobs", "0"], "--jobs must be at least 1"),
        (["quickstart", "--out", "broken.json"], "broken.json: is a file; name a folder"),
        (["quickstart", "--out", "used"], "used: there are other files already, and no recipe.json; name another"),
        (["quickstart", "--seed", "-1"], "run.seed must lie in"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(
    args: list[str], pattern: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.py").write_text("def a( -> Recipe:")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    before = tree(tmp_path)
    assert_refused(run(*args), pattern)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        ("kd --out file", "--out file: is a file; name a folder"),
        ("kd --out file/run", "--out file/run: .*file is no folder that can be written to"),
        ("kd --out used", "--out used: there are other files already, and no recipe.json; name another folder"),
        ("kd --teacher.source ./nowhere", "teacher './nowhere': no such folder"),
        ("kd --teacher.source used", "teacher 'used': no model_index.json there"),
        ("kd --teacher.source bundled:cats", "cats': no such folder"),
        ("kd --run.device cuda:99", "run.device 'cuda:99': cannot be used on this machine"),
        ("kd --run.device gpu", "run.device 'gpu': cannot be used on this machine"),
        ("kd --data.classes 12 --data.count 12", "class labels must be integers from 0 to 10"),
        ("ladd --heads.taps nothing", "heads.taps: 'nothing' is none of the family's features: down_blocks.0"),
        ("ladd --sampler.times 1.0 0.3", "times \\[1.0, 0.3\\]: stock schedulers go in even steps"),
        ("ladd --sampler.times 0.5", "times \\[0.5\\]: stock schedulers go in even steps"),
    ],
)
def test_a_recipe_that_cannot_be_run_leaves_nothing_behind(
    args: str, pattern: str, run: Run, recipes: Path, tmp_path: Path
) -> None:
    """So that the same command, mended, finds its run directory free."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    before = tree(tmp_path)
    name, *options = args.split()
    assert_refused(run("distill", f"{recipes}:{name}", *options), pattern)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        ("--run.stepz 3", r"--run\.stepz"),
        ("--run.steps three", r"--run\.steps"),
        ("--run.steps 0", r"run\.steps must be at least 1; got 0"),
        ("--run.dtype int8", r"--run\.dtype"),
        ("--optim.critic.lr 1", r"--optim\.critic\.lr"),
        ("--sampler.times 1.0 0.75", r"0\.75 is not on the solver's"),
        ("--optim.student.lr -1", r"AdamW\.lr must be at least 0"),
    ],
)
def test_a_field_that_is_unknown_or_wrong_is_named_and_changes_nothing(
    args: str, pattern: str, run: Run, recipes: Path, tmp_path: Path
) -> None:
    ran = run("distill", f"{recipes}:kd", *args.split())
    assert ran.code == 2 and ran.out == "" and "Traceback" not in ran.err
    assert re.search(pattern, ran.err)
    assert tree(tmp_path) == {}


def test_resuming_another_recipe_is_refused_with_the_difference_and_the_cure(
    run: Run, recipes: Path, finished: Path
) -> None:
    before = tree(finished)
    ran = run("distill", f"{recipes}:kd", "--out", finished, "--run.batch", "3", "--optim.student.lr", "0.5")
    differing = r"a run of another recipe is there already \(optim.student.lr is \S+ there and 0.5 here; "
    assert_refused(ran, differing + r"run.batch is 2 there and 3 here\); name another folder, or go on with that one: ")
    assert f"stepdistill distill {finished}/recipe.json --out {finished}" in ran.err
    ran = run("distill", f"{recipes}:kd", "--out", finished, "--no-resume")
    assert_refused(ran, "a run is there already; leave out --no-resume to go on")
    assert tree(finished) == before


def test_where_a_run_computes_may_change_when_it_is_resumed(run: Run, recipes: Path, finished: Path) -> None:
    args = ["--out", finished, "--placement.checkpointing", "student", "--placement.shard"]
    assert run("distill", f"{recipes}:kd", *args).code == 0


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        ("--labels 3 11", r"class labels must be integers from 0 to 10; got \[3, 11\]"),
        ("--labels -1", r"class labels must be integers from 0 to 10; got \[-1\]"),
        ("--steps 4", r"steps 4: this student was trained for 2 \(times 1, 0.5\); use steps 2"),
        ("--rows 0", "--rows must be at least 1; got 0"),
        ("--labels 3 10", "10 is the null label, which stands for no class"),
        ("--seed -1", "--seed must lie in"),
        ("--seed 4294967296", "--seed must lie in"),
        ("--out .", "--out .: is a folder"),
        ("--out file/a.png", "file is a file; name a folder"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused(
    args: str, pattern: str, run: Run, student: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(run("sample", student, *args.split()), pattern)
    assert tree(tmp_path) == {"file": b"mine"}


def _missing(weights: Path) -> None:
    weights.unlink()


def _truncated(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:10_000])


def _pickled(weights: Path) -> None:
    torch.save(load_file(weights), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()


def _reshaped(weights: Path) -> None:
    state = load_file(weights)
    name = next(iter(state))
    save_file(state | {name: torch.zeros(3)}, weights)


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (_missing, "diffusion_pytorch_model.safetensors is missing"),
        (_truncated, "diffusion_pytorch_model.safetensors is damaged"),
        (_pickled, "diffusion_pytorch_model.bin, a pickle, which is never opened"),
        (_reshaped, r"weight \S+ is \(3,\), config.json says"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "bench"])
def test_weights_that_are_missing_or_damaged_are_named(
    command: str, damage: Callable[[Path], None], pattern: str, run: Run, student: Path, tmp_path: Path
) -> None:
    shutil.copytree(student, tmp_path / "copy")
    damage(tmp_path / "copy/unet/diffusion_pytorch_model.safetensors")
    before = tree(tmp_path)
    assert_refused(run(command, "copy"), pattern)
    assert tree(tmp_path) == before


def test_a_traceback_is_shown_on_request(run: Run) -> None:
    ran = run("--debug", "sample", "nowhere")
    assert ran.code == 2 and ran.err.startswith("Traceback") and "\nstepdistill: nowhere" in ran.err


# ^C


def test_an_interrupted_run_exits_with_130_and_goes_on_when_it_is_resumed(
    run: Run, recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    args = ["distill", f"{recipes}:kd", "--out", str(out), "--run.steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stepdistill", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert time.monotonic() - sent < 15
    assert err.splitlines()[-1] == "stepdistill: interrupted; the same command goes on"
    assert "Traceback" not in err
    (checkpoint,) = (out / "checkpoints").iterdir()
    done = int(checkpoint.stem)
    assert 0 < done < 100_000

    taken: list[int] = []
    step = Trainer.step

    def three(trainer: Trainer, index: int) -> dict[str, torch.Tensor]:
        taken.append(index)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, index)

    monkeypatch.setattr(Trainer, "step", three)
    assert run(*args).code == 130
    assert taken == [done, done + 1, done + 2]
    assert (out / "checkpoints" / f"{done + 3:08d}.safetensors").is_file()
    logged = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, done + 4))


@pytest.mark.parametrize("asked", [lambda args: torch.empty(10**14), lambda args: bytearray(10**15)])
def test_more_memory_than_there_is_gets_one_line(
    asked: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "methods", asked)
    with pytest.raises(SystemExit) as stopped:
        main(["methods"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("stepdistill: out of memory: ")
