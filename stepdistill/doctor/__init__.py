"""What is wrong with a run: every check is a function from an examined stage to findings, and changes nothing on disk.

``of_recipe`` reads the recipe alone, ``of_files`` what training has written, ``of_networks`` opens teacher, checkpoint
and exported pipeline. A new check is one function in one of their ``CHECKS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from stepdistill.doctor import of_files, of_networks, of_recipe
from stepdistill.doctor.run import Check, Examined
from stepdistill.recipe import Recipe
from stepdistill.symptoms import Finding

__all__ = ["CHECKS", "QUICK", "Diagnosis", "Examined", "diagnose"]

QUICK: tuple[Check, ...] = (*of_recipe.CHECKS, *of_files.CHECKS)
"""Without networks."""
CHECKS: tuple[Check, ...] = (*QUICK, *of_networks.CHECKS)


@dataclass(frozen=True)
class Diagnosis:
    """Of one stage."""

    folder: Path
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()
    """Checks that could not be made, and why."""

    def facts(self) -> dict[str, object]:
        """For JSON."""
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {"folder": str(self.folder), "findings": findings, "not_checked": list(self.not_checked)}


def diagnose(source: Path, *, checks: Sequence[Check] = CHECKS) -> list[Diagnosis]:
    """Examine a run's stages, oldest first; nothing is written.

    Args:
        source: a run directory.
        checks: what to look for.

    Raises:
        FileNotFoundError: if it is none.
    """
    if not (source / "recipe.json").is_file():
        raise FileNotFoundError(f"{source}: no recipe.json in it; name a run directory")
    stages = sorted(path.parent for path in (source / "stages").glob("*/recipe.json"))
    return [_diagnose(folder, checks) for folder in (*stages, source)]


def _diagnose(folder: Path, checks: Sequence[Check]) -> Diagnosis:
    try:
        run = Examined(folder, Recipe.load(folder / "recipe.json"))
    except (ValueError, OSError) as error:
        cure = "put back a copy, or start the run anew; checkpoints are left as they are"
        wrong = Finding("bad_recipe", "recipe.json cannot be read", str(error), "a file that was changed", cure)
        return Diagnosis(folder, (wrong,))
    findings: list[Finding] = []
    not_checked: list[str] = []
    for check in checks:
        try:
            findings += check(run)
        except (ValueError, OSError, SafetensorError) as error:  # the teacher is not at hand, say
            not_checked.append(f"{check.__name__}: {' '.join(str(error).split())}")
    return Diagnosis(folder, tuple(findings), tuple(not_checked))
