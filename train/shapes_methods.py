"""Every method on the bundled text-to-image teachers, with its digits recipe's objective, optimizers and grid.

``shapes_sd_METHOD`` and ``shapes_sd3_METHOD``; ``stepdistill distill shapes_sd3_pcm@4`` asks for four steps. The
settings were found on digits: a place to start from. Those of ``shapes.py`` are tuned, and take precedence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from stepdistill.data import Data, DigitsData, Labels, ShapesData, ShapesPrompts, TeacherPairs
from stepdistill.objective import registered
from stepdistill.objectives import SNOOPI, VSD
from stepdistill.recipe import Evaluation, Recipe
from stepdistill.recipes import find
from stepdistill.sampling import DpmPP2M, Sampler, trailing

TUNED = ("shapes_sd_cd", "shapes_sd_dmd2", "shapes_sd_kd", "shapes_sd_tscd", "shapes_sd3_dmd2", "shapes_sd3_kd")
GUIDANCE = 3.0
DATA: dict[type[Data], Data] = {
    DigitsData: ShapesData(),
    Labels: ShapesPrompts(),
    TeacherPairs: TeacherPairs(count=4000, solver=Sampler(trailing(8), DpmPP2M()), prompts=ShapesPrompts()),
}


def _on_shapes(recipe: Recipe, teacher: str) -> Recipe:
    """A digits recipe and its warm starts on another teacher."""
    fixed = recipe.objective.guides and recipe.teacher.guidance_range is None and not recipe.null_rate
    objective = recipe.objective
    if isinstance(objective, VSD):
        objective = replace(objective, null_rate=VSD().null_rate)  # a guided critic must know the null condition
    if isinstance(objective, SNOOPI):
        objective = replace(objective, guidance=SNOOPI().guidance)  # around this teacher's
    return replace(
        recipe,
        teacher=replace(recipe.teacher, source=f"bundled:{teacher}", guidance=GUIDANCE if fixed else 1.0),
        objective=objective,
        data=DATA[type(recipe.data)],
        run=replace(recipe.run, batch=32),
        evaluation=Evaluation(n=1000, teacher_steps=(1, 4, 25)),
        warm_start=recipe.warm_start and _on_shapes(recipe.warm_start, teacher),
    )


def _recipe_for(teacher: str, method: str) -> Callable[..., Recipe]:
    def recipe(steps: int = 0) -> Recipe:
        """A method's digits settings on captioned shapes."""
        return _on_shapes(find(f"digits_{method}@{steps}" if steps else f"digits_{method}"), teacher)

    return recipe


for _teacher in ("shapes-sd", "shapes-sd3"):
    for _method, _class in registered().items():
        _name = f"{_teacher.replace('-', '_')}_{_method}"
        if _class.__module__.startswith("stepdistill.objectives.") and _name not in TUNED:
            globals()[_name] = _recipe_for(_teacher, _method)
