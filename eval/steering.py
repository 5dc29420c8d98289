"""What negative prompts by attention do to students that know no guidance: ``eval/shapes/steering.json``.

    python eval/steering.py runs/eval/shapes_sd_dmd2/seed0 runs/eval/shapes_sd3_dmd2/seed0

Prompts that name no colour of the object, with that colour as the negative prompt; the shapes and the background that
the prompt does name should stay. Shares by the bundled attribute classifier.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import put_into_readme
from torch import Tensor

from stepdistill.evaluation.shapes import load_judges
from stepdistill.exported import load_exported
from stepdistill.generate import folder_of
from stepdistill.shapes import COLOURS, HEADS, SHAPES
from stepdistill.steering import negative

SETTINGS = (("nasa", 0.25), ("nasa", 0.5), ("nasa", 1.0), ("nag", 2.0), ("nag", 4.0), ("nag", 8.0))


@dataclass(frozen=True)
class Arguments:
    """Steer exported students of the shapes benchmark away from a colour."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories or exported pipelines."""
    colours: tuple[str, ...] = ("red", "blue")
    n: int = 150
    """Images a row."""
    out: Path = Path(__file__).parent / "shapes" / "steering.json"


def main(given: Arguments) -> None:
    """One row a student, colour, method and scale."""
    torch.set_num_threads(1)
    rows = []
    for run in given.runs:
        pipeline = load_exported(folder_of(run))
        pipeline.set_progress_bar_config(disable=True)
        name = run.parent.name if run.name.startswith("seed") else run.name
        for colour in given.colours:
            for method, scale in (("none", 0.0), *SETTINGS):
                seen = judged(negative(pipeline, scale, "nasa" if method == "none" else method), colour, given.n)
                share = {key: round(float(x.double().mean()), 4) for key, x in seen.items()}
                rows.append({"student": name, "colour": colour, "method": method, "scale": scale, "n": given.n} | share)
                print(rows[-1], flush=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")
    put_into_readme("steering", table(rows))


def table(rows: list[dict[str, object]]) -> str:
    """The middling scales as Markdown, colours side by side."""
    lines = [
        "| student | method | scale | objects of the colour: red, blue | right shape: red, blue |",
        "|" + " --- |" * 5,
    ]
    shown = (("none", 0.0), ("nasa", 0.5), ("nag", 4.0))
    settings = dict.fromkeys((r["student"], *s) for r in rows for s in shown)
    for setting in settings:
        found = [r for r in rows if (r["student"], r["method"], r["scale"]) == setting]
        seen, right = (", ".join(f"{100 * r[k]:.1f} %" for r in found) for k in ("colour_seen", "shape_right"))
        lines.append(f"| {setting[0]} | {setting[1]} | {setting[2]:g} | {seen} | {right} |")
    return "\n".join(lines) + f"\n\nPrompts that name no colour of the object, {rows[0]['n']} images a row, one step.\n"


def judged(pipe: object, colour: str, n: int) -> dict[str, Tensor]:
    """Which of ``n`` objects have the colour, and which the shape and the background that was asked for."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(n)]
    prompts = [f"a {shape} on a white background" for shape in shapes]
    images = pipe(prompts, negative_prompt=colour, generator=torch.Generator().manual_seed(0), output_type="pt").images
    found = load_judges().classifier.attributes(images.float() * 2 - 1)
    column = {name: found[:, i] for i, name in enumerate(HEADS)}
    return {
        "colour_seen": column["colour"] == list(COLOURS).index(colour),
        "shape_right": column["shape"] == torch.tensor([SHAPES.index(s) for s in shapes]),
        "background_right": column["background"] == list(COLOURS).index("white"),
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments))
