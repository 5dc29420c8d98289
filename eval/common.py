"""What the measuring scripts share: recipes with variants, and tables in the project's README."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stepdistill.quickstart import reseeded
from stepdistill.recipe import Recipe
from stepdistill.recipes import find

GAN_COST = 1.34
"""Two steps of digits_dmd2 over two without a GAN, in the milliseconds of overhead.json (0.64 M parameters)."""


def recipe_of(name: str, seed: int = 0) -> Recipe:
    """The recipe with a training seed; nothing is measured within the run.

    Args:
        name: a recipe's name; ``name/no-gan`` switches its adversarial term off, ``name/no-gan-equal-cost`` spends
            the time saved on more steps.
        seed: of training, warm starts included.

    Raises:
        ValueError: for an unknown recipe or variant.
    """
    base, _, variant = name.partition("/")
    recipe = find(base)
    if variant in ("no-gan", "no-gan-equal-cost"):
        objective = replace(recipe.objective, gan=replace(recipe.objective.gan, weight=0.0))
        recipe = replace(recipe, objective=objective)
    elif variant:
        raise ValueError(f"{name}: variants are no-gan and no-gan-equal-cost")
    if variant == "no-gan-equal-cost":
        recipe = replace(recipe, run=replace(recipe.run, steps=round(GAN_COST * recipe.run.steps)))
    return replace(reseeded(recipe, seed), evaluation=None)


def put_into_readme(name: str, text: str) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` in README.md."""
    readme = Path(__file__).resolve().parents[1] / "README.md"
    head, _, rest = readme.read_text().partition(f"<!-- {name}:begin -->")
    _, _, tail = rest.partition(f"<!-- {name}:end -->")
    readme.write_text(f"{head}<!-- {name}:begin -->\n{text}<!-- {name}:end -->{tail}")
