"""What the measuring scripts share: recipes with variants, and tables in the project's README."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stepdistill.quickstart import reseeded
from stepdistill.recipe import Recipe
from stepdistill.recipes import find


def recipe_of(name: str, seed: int = 0) -> Recipe:
    """The recipe with a training seed; nothing is measured within the run.

    Args:
        name: a recipe's name; ``name/no-gan`` switches its adversarial term off.
        seed: of training, warm starts included.

    Raises:
        ValueError: for an unknown recipe or variant.
    """
    base, _, variant = name.partition("/")
    recipe = find(base)
    if variant == "no-gan":
        objective = replace(recipe.objective, gan=replace(recipe.objective.gan, weight=0.0))
        recipe = replace(recipe, objective=objective)
    elif variant:
        raise ValueError(f"{name}: the only variant is no-gan")
    return replace(reseeded(recipe, seed), evaluation=None)


def put_into_readme(name: str, text: str) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` in README.md."""
    readme = Path(__file__).resolve().parents[1] / "README.md"
    head, _, rest = readme.read_text().partition(f"<!-- {name}:begin -->")
    _, _, tail = rest.partition(f"<!-- {name}:end -->")
    readme.write_text(f"{head}<!-- {name}:begin -->\n{text}<!-- {name}:end -->{tail}")
