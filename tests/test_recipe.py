"""Recipes: read back what was written, found by name or file, and refused in one line that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stepdistill import objective, recipes
from stepdistill.data import DigitsData, Labels, TeacherPairs
from stepdistill.functional.distances import Huber
from stepdistill.objectives import (
    CD,
    DMD2,
    ICD,
    ICT,
    KD,
    LADD,
    LCM,
    PCM,
    SCM,
    SNOOPI,
    TSCD,
    VSD,
    DisBack,
    GuidedDistillation,
    MeanFlow,
    SiD,
    TwinFlow,
)
from stepdistill.parts.discretisation import Doubling
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim, OneStep
from stepdistill.parts.segments import Segments
from stepdistill.parts.times import LogitNormal, LogNormal
from stepdistill.recipe import Evaluation, Heads, Recipe, Teacher, Weights, decode, encode, suggest
from stepdistill.recipes import find
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.trainer import AdamW, Run

TEACHER = Teacher("bundled:digits")
OWN = "; a method of your own is known once its file is: name file.py instead"
KD_RECIPE = Recipe(TEACHER, KD(), TeacherPairs(), {"student": AdamW()})
DMD2_RECIPE = Recipe(
    Teacher("owner/name", guidance=3.0, interval=(0.1, 0.9), custom_pipeline="code.py"),
    DMD2(BackwardSim(True), times=LogitNormal(0.5, 2.0), gan=Gan(weight=0.5, loss="hinge", r1=1.0), student_every=2),
    DigitsData(),
    {name: AdamW(1e-3, betas=(0.0, 0.9), warmup=3, decay="cosine") for name in ("student", "critic", "disc")},
    sampler=Sampler(trailing(2), Tcd(0.5)),
    run=Run(steps=3, ema=0.5, dtype="bfloat16"),
    heads=Heads("critic", ("mid_block",), 8),
    evaluation=Evaluation(64, (0, 1), (1, 50)),
    warm_start=Recipe(
        Teacher("owner/name"),
        TSCD(segments=Segments(2, 4), distance=Huber()),
        DigitsData(),
        {"student": AdamW()},
        sampler=Sampler(trailing(2)),
    ),
)


def as_json(recipe: Recipe = DMD2_RECIPE) -> dict[str, Any]:
    """A recipe's JSON value, to be damaged."""
    return json.loads(recipe.to_json())


def refused(value: Any) -> str:
    """The one line that a recipe in JSON is refused with."""
    with pytest.raises(ValueError, match=r"^recipe: ") as caught:
        Recipe.from_json(json.dumps(value))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("recipe: ")


def put(value: Any, path: str, new: Any) -> Any:
    """``value`` with the entry at ``a.b.c`` replaced, or added."""
    *way, last = path.split(".")
    inner = value
    for key in way:
        inner = inner[key]
    inner[last] = new
    return value


# Round trips


@pytest.mark.parametrize("name", recipes.bundled())
def test_every_bundled_recipe_reads_back_as_it_was(name: str) -> None:
    recipe = recipes.find(name)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()


def test_a_recipe_with_every_field_set_reads_back_as_it_was() -> None:
    again = Recipe.from_json(DMD2_RECIPE.to_json())
    assert again == DMD2_RECIPE
    assert type(again.objective.times) is LogitNormal and type(again.sampler.rule) is Tcd
    assert type(again.warm_start.objective.segments) is Segments


def test_fields_that_are_left_out_take_their_defaults_and_whole_numbers_pass_as_fractions() -> None:
    value = as_json(KD_RECIPE)
    for name in ("run", "sampler", "heads", "warm_start", "evaluation"):
        del value[name]
    value["optim"]["student"] = {"type": "AdamW", "lr": 1}
    recipe = Recipe.from_json(json.dumps(value))
    assert recipe == replace(KD_RECIPE, optim={"student": AdamW(1.0)})
    assert type(recipe.optim["student"].lr) is float


def test_stages_are_the_chain_of_warm_starts_oldest_first() -> None:
    first = replace(KD_RECIPE, run=Run(steps=1))
    second = replace(KD_RECIPE, run=Run(steps=2), warm_start=first)
    third = replace(KD_RECIPE, run=Run(steps=3), warm_start=second)
    assert [stage.run.steps for stage in third.stages()] == [1, 2, 3]
    assert Recipe.from_json(third.to_json()).stages() == third.stages()


def test_encoding_names_every_type() -> None:
    assert encode(Gan(weight=0.5, times=LogitNormal())) == {
        "type": "Gan",
        "weight": 0.5,
        "loss": "softplus",
        "times": {"type": "LogitNormal", "mean": 0.0, "std": 1.0},
        "r1": 0.0,
        "r1_noise": 0.1,
    }


# Bad JSON


@pytest.mark.parametrize(
    ("path", "new", "line"),
    [
        ("type", "Recipes", "recipe: 'Recipes' is no Recipe; did you mean 'Recipe'?"),
        ("objective.type", "DMD3", "recipe.objective: 'DMD3' is no Objective; did you mean 'DMD'?" + OWN),
        ("objective", "DMD2", "recipe.objective: 'DMD2' is no Objective; did you mean 'DMD2'?" + OWN),
        ("objective.times.type", "Unifrom", "recipe.objective.times: 'Unifrom' is no Times; did you mean 'Uniform'?"),
        ("objective.gan.wieght", 1.0, "recipe.objective.gan.wieght: no such field of Gan; did you mean 'weight'?"),
        ("run.stpes", 1, "recipe.run.stpes: no such field of Run; did you mean 'steps'?"),
        ("run.steps", "3", "recipe.run.steps: expected int, got '3'"),
        ("run.steps", 3.5, "recipe.run.steps: expected int, got 3.5"),
        ("run.steps", True, "recipe.run.steps: expected int, got True"),
        ("run.ema", "much", "recipe.run.ema: expected float, got 'much'"),
        ("run.dtype", "int8", "recipe.run.dtype: 'int8' is none of 'float32', 'bfloat16', 'float16'"),
        ("teacher.source", None, "recipe.teacher.source: expected str, got None"),
        ("teacher.interval", [0.0], "recipe.teacher.interval: expected 2 values, got 1"),
        ("sampler.times", 1.0, "recipe.sampler.times: expected a list, got 1.0"),
        ("sampler.times", [1.0, "a"], "recipe.sampler.times[1]: expected float, got 'a'"),
        ("optim", [], "recipe.optim: expected an object, got []"),
        ("optim.student.lr", "fast", "recipe.optim.student.lr: expected float, got 'fast'"),
        ("warm_start.run.batch", "a", "recipe.warm_start.run.batch: expected int, got 'a'"),
        ("evaluation.seeds", [0, "1"], "recipe.evaluation.seeds[1]: expected int, got '1'"),
    ],
)
def test_what_does_not_belong_is_refused_by_the_path_of_its_field(path: str, new: Any, line: str) -> None:
    assert refused(put(as_json(), path, new)) == line


@pytest.mark.parametrize("path", ["teacher.source", "objective", "data", "optim"])
def test_a_missing_field_is_named(path: str) -> None:
    value = as_json()
    *way, last = path.split(".")
    del (value[way[0]] if way else value)[last]
    assert refused(value) == f"recipe.{path}: missing field of {'Teacher' if way else 'Recipe'}"


@pytest.mark.parametrize(
    ("path", "new", "line"),
    [
        ("run.steps", 0, "recipe.run: run.steps must be at least 1; got 0"),
        ("run.ema", 1.0, "recipe.run: run.ema must lie in [0, 1); got 1.0"),
        ("run.clip", -1.0, "recipe.run: run.clip must be at least 0; got -1.0"),
        ("optim.critic.lr", -1.0, "recipe.optim.critic: AdamW.lr must be at least 0; got -1.0"),
        ("teacher.guidance", -1.0, "recipe.teacher: teacher.guidance must be at least 0, and 1 is none; got -1.0"),
        (
            "teacher.interval",
            [0.5, 0.5],
            "recipe.teacher: teacher.interval must be two rising fractions in [0, 1]; got [0.5, 0.5]",
        ),
        ("objective.times", {"type": "Uniform", "low": 0.9, "high": 0.1}, "recipe.objective.times: times need "),
        ("sampler.times", [0.5, 1.0], "recipe.sampler: times must fall strictly from at most 1"),
        ("sampler.rule.gamma", 2.0, "recipe.sampler.rule: gamma must lie in [0, 1]; got 2.0"),
        ("heads.width", 0, "recipe.heads: heads.width must be at least 1; got 0"),
        ("warm_start.objective.segments.count", 3, "recipe.warm_start.objective.segments: solver_steps must be"),
        ("evaluation.n", 5, "recipe.evaluation: evaluation.n must be larger than 5"),
        ("evaluation.seeds", [], "recipe.evaluation: evaluation.seeds must be different numbers"),
        ("evaluation.seeds", [1, 1], "recipe.evaluation: evaluation.seeds must be different numbers"),
        ("evaluation.seeds", [-1], "recipe.evaluation: evaluation.seeds must be different numbers"),
        ("evaluation.teacher_steps", [0], "recipe.evaluation: evaluation.teacher_steps must be step counts"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(path: str, new: Any, line: str) -> None:
    assert refused(put(as_json(), path, new)).startswith(line)


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for content, line in ((b"{", "not JSON"), (b"\xff\xfe", "not text"), (b"[]", "recipe: \\[\\] is no Recipe")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path}: {line}"):
            Recipe.load(path)


def test_a_declared_type_that_holds_its_subclasses_is_decoded_as_the_one_that_is_named() -> None:
    assert decode({"type": "TeacherPairs", "count": 4}, TeacherPairs, "data") == TeacherPairs(4)
    with pytest.raises(ValueError, match="data: 'Labels' is no TeacherPairs"):
        decode({"type": "Labels"}, TeacherPairs, "data")


def test_a_suggestion_is_the_closest_name_or_all_there_are() -> None:
    assert suggest("studnet", ["student", "critic"]) == "; did you mean 'student'?"
    assert suggest("x", ["student", "critic"]) == "; there are critic, student"


# What does not fit together


@pytest.mark.parametrize(
    ("objective", "data", "missing"),
    [(KD(), DigitsData(), "path"), (CD(), Labels(), "x0"), (LADD(), Labels(), "x0"), (TSCD(), Labels(), "x0")],
)
def test_data_that_lack_what_the_objective_needs_are_refused(objective: Any, data: Any, missing: str) -> None:
    movers = {name for turn in objective.turns() for name in turn.moves}
    with pytest.raises(ValueError, match=rf"objective {type(objective).__name__} needs data with \['{missing}'\], and"):
        Recipe(TEACHER, objective, data, {name: AdamW() for name in movers})


def test_dmd2_needs_real_data_for_its_gan_only() -> None:
    players = {"student": AdamW(), "critic": AdamW()}
    Recipe(TEACHER, DMD2(gan=Gan(weight=0.0)), Labels(), players)
    with pytest.raises(ValueError, match=r"needs data with \['x0'\], and data Labels gives conditions only"):
        Recipe(TEACHER, DMD2(), Labels(), players | {"disc": AdamW()})


def test_a_switched_off_discriminator_may_keep_its_optimizer() -> None:
    """So that ``--objective.gan.weight 0`` works on any DMD2 recipe; nothing is built for it."""
    players = {"student": AdamW(), "critic": AdamW(), "disc": AdamW()}
    recipe = Recipe(TEACHER, DMD2(gan=Gan(weight=0.0)), DigitsData(), players)
    assert set(recipe.players) == {"student", "critic"}


@pytest.mark.parametrize(
    ("objective", "data", "sampler", "line"),
    [
        (
            DMD2(OneStep(), gan=Gan(weight=0.0)),
            Labels(),
            Sampler(trailing(4)),
            "OneStep trains the first of the sampler's 4",
        ),
        (LADD(OneStep()), DigitsData(), Sampler(trailing(2)), "OneStep trains the first of the sampler's 2"),
        (KD(), TeacherPairs(), Sampler(trailing(4), Renoise()), "KD trains jumps"),
        (TSCD(), DigitsData(), Sampler(trailing(4), Renoise()), "does not jump from edge to edge"),
        (
            CD(intervals=Doubling(4, 8)),
            DigitsData(),
            Sampler(trailing(3), Renoise()),
            "no point of the grid of 8 intervals",
        ),
    ],
)
def test_a_sampler_that_the_objective_does_not_train_is_refused(
    objective: Any, data: Any, sampler: Sampler, line: str
) -> None:
    """Among them the known bug class: a student of several steps without backward simulation."""
    movers = {name for turn in objective.turns() for name in turn.moves}
    with pytest.raises(ValueError, match=line):
        Recipe(TEACHER, objective, data, {name: AdamW() for name in movers}, sampler=sampler)


@pytest.mark.parametrize(
    ("objective", "teacher", "line"),
    [
        (GuidedDistillation(), TEACHER, "teacher.guidance 1 leaves guided distillation nothing to learn"),
        (
            VSD(null_rate=0.0),
            replace(TEACHER, guidance=4.0),
            "null_rate 0: a guided critic must know the null condition",
        ),
        (SNOOPI(), replace(TEACHER, guidance_range=(1.0, 4.0)), "SNOOPI draws guidance itself"),
        (ICD(), replace(TEACHER, guidance_range=(1.0, 4.0)), "inverter undoes one scale"),
    ],
)
def test_guidance_that_does_not_go_with_the_objective_is_refused(objective: Any, teacher: Teacher, line: str) -> None:
    movers = {name for turn in objective.turns() for name in turn.moves}
    optim = {name: AdamW() for name in movers}
    with pytest.raises(ValueError, match=line):
        Recipe(teacher, objective, DigitsData(), optim)


def test_a_told_student_may_be_invertible_at_all_scales() -> None:
    teacher, told = replace(TEACHER, guidance_range=(1.0, 4.0)), Weights(told_guidance=True)
    Recipe(teacher, ICD(), DigitsData(), {"student": AdamW(), "inverter": AdamW()}, student=told)


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        (VSD(), "its critic is told, too; set objective.critic_guided False"),
        (SiD(critic_guidance=2.0, critic_null_rate=0.1), "leave objective.critic_guidance and fit_guidance 1"),
        (DisBack(), "DisBack guides its records by their null condition"),
    ],
)
def test_a_critic_that_is_told_its_scale_is_guided_by_nothing_else(objective: Any, line: str) -> None:
    teacher, told = replace(TEACHER, guidance_range=(1.0, 4.0)), Weights(told_guidance=True)
    optim = {name: AdamW() for turn in objective.turns() for name in turn.moves}
    with pytest.raises(ValueError, match=line):
        Recipe(teacher, objective, DigitsData(), optim, student=told)


@pytest.mark.parametrize("objective", [LCM(), PCM(), TSCD(), ICD()], ids=lambda objective: type(objective).__name__)
def test_objectives_as_they_come_serve_four_even_steps(objective: Any) -> None:
    rule = Renoise() if isinstance(objective, LCM) else Ddim()
    objective.check(Sampler(trailing(4), rule))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CD(intervals=Doubling(0, 8)),
        lambda: CD(intervals=Doubling(16, 8)),
        lambda: CD(target_decay=2.0),
        lambda: TSCD(to_edge=1.5),
        lambda: Gan(weight=-1.0),
        lambda: Gan(r1_noise=0.0),
        lambda: LogNormal(std=float("nan")),
        lambda: LogitNormal(std=0.0),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"must|needs|need"):
        make()


def test_a_grid_other_than_the_segments_edges_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not the upper edges of 4 segments, \[1.0, 0.75, 0.5, 0.25\]"):
        Recipe(TEACHER, TSCD(), DigitsData(), {"student": AdamW()}, sampler=Sampler(trailing(2)))


@pytest.mark.parametrize("names", ["", "student critic", "student critic disk", "student critic disc teacher"])
def test_optimizers_other_than_the_objectives_players_are_refused(names: str) -> None:
    with pytest.raises(ValueError, match=r"each network that DMD2 moves: \['critic', 'disc', 'student'\]; got \["):
        Recipe(TEACHER, DMD2(), DigitsData(), {name: AdamW() for name in names.split()})


def test_a_student_that_leaves_the_solvers_grid_is_refused() -> None:
    Recipe(TEACHER, KD(), TeacherPairs(solver=Sampler(trailing(6))), {"student": AdamW()}, sampler=Sampler(trailing(3)))
    with pytest.raises(ValueError, match=r"time 0.8 is not on the solver's grid of 16 steps; .* multiple of 5 steps"):
        Recipe(TEACHER, KD(), TeacherPairs(), {"student": AdamW()}, sampler=Sampler(trailing(5)))


def test_heads_on_the_features_of_a_critic_that_is_not_there_are_refused() -> None:
    optim = {"student": AdamW(), "disc": AdamW()}
    with pytest.raises(ValueError, match=r"heads.backbone is 'critic', and LADD has no critic; use 'teacher'"):
        Recipe(TEACHER, LADD(), DigitsData(), optim, heads=Heads("critic"))


def test_a_warm_start_from_another_teacher_is_refused() -> None:
    other = replace(KD_RECIPE, teacher=Teacher("owner/other"))
    with pytest.raises(ValueError, match=r"warm_start.teacher.source must be this recipe's own, 'bundled:digits'"):
        replace(KD_RECIPE, warm_start=other)


def test_data_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.count must be at least 1; got 0"):
        TeacherPairs(count=0)
    with pytest.raises(ValueError, match=r"data.classes must be at least 0; got -1"):
        TeacherPairs(classes=-1)
    with pytest.raises(ValueError, match=r"data.classes must be at least 0; got -1"):
        Labels(-1)


# Finding them

HEADER = """
from __future__ import annotations
from dataclasses import dataclass, replace
from stepdistill.objective import register
from stepdistill.objectives import KD
from stepdistill.recipe import Recipe
from stepdistill.recipes import find
"""
ONE = 'def mine() -> Recipe:\n    "Mine."\n    return find("digits_kd")\n'
OTHER = 'def yours() -> Recipe:\n    return replace(find("digits_kd"), warm_start=mine())\n'


def file_of(folder: Path, *parts: str, name: str = "recipes.py") -> Path:
    """A file of recipes."""
    path = folder / name
    path.write_text("\n".join((HEADER, *parts)))
    return path


def test_a_bundled_recipe_is_found_by_name_and_a_close_one_suggested() -> None:
    assert recipes.find("digits_kd") == recipes.bundled()["digits_kd"]()
    with pytest.raises(ValueError, match=r"^recipe 'digits_kdd': not known; did you mean 'digits_kd'"):
        recipes.find("digits_kdd")


def test_a_recipe_is_found_in_a_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, ONE)
    assert recipes.find(str(path)) == recipes.find(f"{path}:mine") == recipes.find("digits_kd")


def test_of_several_recipes_in_a_file_one_must_be_named(tmp_path: Path) -> None:
    path = file_of(tmp_path, ONE, OTHER)
    assert recipes.find(f"{path}:yours").warm_start == recipes.find("digits_kd")
    with pytest.raises(ValueError, match=rf"choose one of {path}:mine, {path}:yours$"):
        recipes.find(str(path))
    with pytest.raises(ValueError, match="recipe 'your': not known; did you mean 'yours'"):
        recipes.find(f"{path}:your")


def test_helpers_and_imported_names_are_no_recipes(tmp_path: Path) -> None:
    helpers = "def _private() -> Recipe: ...\ndef with_argument(n: int) -> Recipe: ...\ndef other() -> int: ...\n"
    path = file_of(tmp_path, helpers)
    with pytest.raises(ValueError, match=r"no function there that needs no arguments and is declared `-> Recipe`"):
        recipes.find(str(path))
    assert recipes.find(str(file_of(tmp_path, helpers, ONE, name="more.py"))) == recipes.find("digits_kd")


def test_a_recipe_is_read_from_the_json_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(DMD2_RECIPE.to_json())
    assert recipes.find(str(path)) == DMD2_RECIPE


@pytest.mark.parametrize("name", ["nowhere.py", "nowhere.py:mine", "nowhere.json"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"recipe '{tmp_path / name}': no such file"):
        recipes.find(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def mine( -> Recipe:", "SyntaxError"),
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def mine() -> Recipe:\n    return Recipe(taecher=1)", "TypeError: .*taecher"),
        ("def mine() -> Recipe:\n    return replace(find('digits_kd'), optim={})", "optim must have one entry"),
    ],
)
def test_a_mistake_in_a_recipe_file_is_one_line_that_names_the_file(text: str, reason: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, text)
    for _ in range(2):  # a file that failed is not taken for one that was run
        with pytest.raises(ValueError, match=rf"^recipe (file )?'?{path}'?: {reason}"):
            recipes.find(str(path))


def test_an_objective_of_ones_own_can_be_used_from_the_file_that_defines_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataclass decorator and the registry both need the file to be a module, run once."""
    monkeypatch.setattr(objective, "_REGISTRY", objective.registered())  # to be forgotten after this test
    text = """
@register("mine_only", family="trajectory", paper="0000.00000")
@dataclass(frozen=True)
class MineOnly(KD.__base__):
    needs = frozenset({"student"})
    weight: float = 2.0
    def turns(self): return KD().turns()

def mine() -> Recipe:
    return replace(find("digits_kd"), objective=MineOnly(3.0))
"""
    path = file_of(tmp_path, text)
    recipe = recipes.find(str(path))
    assert recipe == recipes.find(str(path))
    assert Recipe.from_json(recipe.to_json()) == recipe and recipe.objective.weight == 3.0


@pytest.mark.parametrize("name", ["ct", "ict", "ect", "ladd", "gdd", "diffusion_gan"])
def test_guidance_that_no_loss_asks_for_is_refused(name: str) -> None:
    recipe = find(f"digits_{name}")
    with pytest.raises(ValueError, match=r"teacher\.guidance would be lost: .* never asks the guided teacher"):
        replace(recipe, teacher=replace(recipe.teacher, guidance=2.0))


@pytest.mark.parametrize("name", ["cd", "lcm", "icd", "pcm", "tscd"])
@pytest.mark.parametrize("solver", [DpmPP2M(), Renoise(), Tcd(0.3)])
def test_solvers_that_are_no_single_step_are_refused(name: str, solver: StepRule) -> None:
    recipe = replace(find(f"digits_{name}"), warm_start=None)
    assert replace(recipe, objective=replace(recipe.objective, solver=Heun())).objective.solver == Heun()
    with pytest.raises(ValueError, match=r"objective.solver .* is no single step of the teacher's ODE"):
        replace(recipe, objective=replace(recipe.objective, solver=solver))


@pytest.mark.parametrize("name", ["cd", "mdt"])
def test_a_consistency_function_is_not_sampled_by_jumps(name: str) -> None:
    with pytest.raises(ValueError, match=r"student jumps to the data only; use Renoise"):
        replace(find(f"digits_{name}@2"), sampler=Sampler(trailing(2), Ddim()))


@pytest.mark.parametrize("name", ["ladd", "gdd", "diffusion_gan"])
def test_an_adversarial_method_without_its_loss_is_refused(name: str) -> None:
    recipe = find(f"digits_{name}")
    with pytest.raises(ValueError, match=r"objective.gan.weight 0 leaves nothing to learn from"):
        replace(recipe, objective=replace(recipe.objective, gan=replace(recipe.objective.gan, weight=0.0)))


def test_guidance_is_learned_where_the_velocity_is_the_teachers() -> None:
    for on_data in (SCM(distil=False), MeanFlow(velocity="data"), TwinFlow(velocity="data")):
        assert not on_data.guides
    assert SCM().guides and MeanFlow(velocity="teacher").guides and TwinFlow(velocity="teacher", guidance=0.0).guides


def test_snoopis_critic_must_know_what_it_is_guided_by() -> None:
    with pytest.raises(ValueError, match=r"objective.base.null_rate 0: a guided critic must know the null condition"):
        SNOOPI(base=VSD(null_rate=0.0))
    with pytest.raises(ValueError, match=r"objective.base.critic_guided is off"):
        SNOOPI(base=VSD(critic_guided=False))


def test_intervals_of_ict_have_a_level_between_their_ends() -> None:
    with pytest.raises(ValueError, match=r"objective.intervals.start must be at least 2; got 1"):
        ICT(intervals=Doubling(1, 4, 10)).check(Sampler(trailing(1)))
