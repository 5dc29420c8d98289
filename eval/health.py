"""What sound and failed students look like to ``stepdistill.symptoms``: figures of runs that are done.

``python eval/health.py RUN ... --out eval/health.json`` draws the samples that health draws at the end of each run and
keeps their figures; thresholds are set beside these.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from stepdistill.build import guided, new_critic_of, new_student_of, open_teacher
from stepdistill.checkpoint import write_atomically
from stepdistill.distill import health_of
from stepdistill.doctor import Examined
from stepdistill.health import Figures
from stepdistill.models.nets import Nets
from stepdistill.recipe import Recipe


@dataclass(frozen=True)
class Asked:
    """Figures of runs that are done."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; those whose recipe or pipeline cannot be read are named and left out."""
    out: Path | None = None
    """JSON; runs that it holds already are not measured again."""


def measured(folder: Path) -> Figures:
    """Health of the newest checkpoint, and as ratios to the teacher's figures."""
    recipe = Recipe.load(folder / "recipe.json")
    run = Examined(folder, recipe)
    opened = open_teacher(recipe.teacher)
    nets = Nets()
    nets["teacher"] = guided(opened, recipe.teacher)
    nets["ema"] = nets["student"] = run.exported  # until a checkpoint that can be read has both
    for role, make in (("student", new_student_of), ("critic", new_critic_of)):
        if run.state(role):
            nets[role] = make(recipe, opened)
            nets[role].load_state_dict(run.state(role), strict=False)  # of adapters a checkpoint holds nothing else
    with TemporaryDirectory() as aside, torch.no_grad():
        health = health_of(opened, recipe, Path(aside), 0)
        figures = health.figures(nets, first=False)
    ratios = {f"{name}_ratio": figures[name] / figures[f"teacher_{name}"] for name in ("diversity", "contrast")}
    if figures["teacher_saturation"]:
        ratios["saturation_ratio"] = figures["saturation"] / figures["teacher_saturation"]
    if "critic_error" in figures:
        ratios["critic_ratio"] = figures["critic_error"] / figures["teacher_error"]
    return {"steps": run.done, **{name: round(value, 4) for name, value in (figures | ratios).items()}}


def main() -> None:
    """Measure what is not there yet; the table is written after every run."""
    asked = tyro.cli(Asked, description=__doc__)
    torch.set_num_threads(1)
    found = json.loads(asked.out.read_text()) if asked.out and asked.out.is_file() else {}
    for folder in asked.runs:
        name = "/".join(folder.parts[-3:])
        if name in found:
            continue
        try:
            found[name] = measured(folder)
        except (ValueError, OSError) as error:
            print(f"{name}: {error}")
            continue
        print(name, found[name], flush=True)
        if asked.out:
            text = json.dumps(dict(sorted(found.items())), indent=1) + "\n"
            write_atomically(asked.out, lambda aside: aside.write_text(text))  # noqa: B023


if __name__ == "__main__":
    main()
