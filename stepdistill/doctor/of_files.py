"""What the files of a run give away; no network is made."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepdistill.doctor.run import Check, Examined
from stepdistill.logging import Line
from stepdistill.symptoms import SYMPTOMS, Finding

QUIET = 3600.0
"""Seconds without a new line after which a run that is not finished counts as stopped."""
ROUNDING = 0.01
"""Relative distance of predictions up to which a new student is its teacher."""


def curves(run: Examined) -> Iterator[Finding]:
    """What metrics and health lines say; see ``stepdistill.symptoms``."""
    for symptom in SYMPTOMS:
        yield from symptom(run.curves)


def starts_elsewhere(run: Examined) -> Iterator[Finding]:
    """A student that does not begin as its teacher, though nothing in the recipe makes it another one."""
    first = next((line for line in run.curves.health if line["step"] == 0), {})
    gap = first.get("start_gap", 0.0)
    other = run.recipe.warm_start is not None or run.recipe.student.layers
    if gap > ROUNDING and not other:
        yield Finding(
            "starts_elsewhere",
            "the student does not start as its teacher",
            f"at step 0 their predictions differ by {gap:.1%}",
            "weights that were not copied, another kind of prediction, schedule or scaling in the network's call",
            "compare both on one noised sample before training; for a network of your own copy the teacher's weights",
        )


def damaged_checkpoints(run: Examined) -> Iterator[Finding]:
    """Checkpoints that cannot be read, or whose bytes have changed."""
    for path, wrong in run.checkpoints.items():
        if wrong:
            rest = [p.name for p, w in run.checkpoints.items() if not w]
            yield Finding(
                "damaged_checkpoint",
                "a checkpoint is damaged",
                f"{path.name}: {wrong}",
                "a disk or a copy that failed",
                f"nothing: a resumed run goes on from {rest[-1]}" if rest else "start the run anew; none can be read",
            )


def bad_weights(run: Examined) -> Iterator[Finding]:
    """NaN or infinity in weights, saved or exported."""
    sources = [("the newest checkpoint", ((k, v) for k, v in run.saved[1].items() if k.startswith("nets.")))]
    for folder in ("pipeline*", "lora"):
        for file in sorted(run.folder.glob(f"{folder}/**/*.safetensors")):
            sources.append((str(file.relative_to(run.folder)), _tensors(file)))
    for where, tensors in sources:
        for name, value in tensors:
            if value.is_floating_point() and not bool(value.isfinite().all()):
                yield Finding(
                    "bad_weights",
                    "weights are not finite",
                    f"{int((~value.isfinite()).sum())} of {value.numel()} numbers of {name} in {where}",
                    "an update with a gradient that overflowed, or a damaged file",
                    "go back to an earlier checkpoint with a lower learning rate, or export again",
                )
                break


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError):
        return  # damaged: said by whoever loads the pipeline


def metrics_end_early(run: Examined) -> Iterator[Finding]:
    """Lines of metrics.jsonl that are torn, missing, or fewer than steps were done."""
    path, lines, steps = run.folder / "metrics.jsonl", run.curves.metrics, run.recipe.run.steps
    last = lines[-1]["step"] if lines else 0
    finished, plan = run.pipeline.is_dir(), run.recipe.evaluation
    early = plan is not None and plan.patience > 0  # such a run may have ended anywhere
    reached = steps if finished and not early else run.done // run.recipe.run.log_every * run.recipe.run.log_every
    if last < reached:
        torn = path.is_file() and len(path.read_bytes().splitlines()) > len(lines)
        found = f"its line {len(lines) + 1} cannot be read" if torn else f"it ends at step {last}"
        yield Finding(
            "metrics_end_early",
            "metrics.jsonl ends early",
            f"{found}, and the run has done {steps if finished and not early else run.done} steps",
            "a file that was changed or cut, or a full disk",
            "free the disk; figures that are lost come back with a run resumed from an older checkpoint only",
        )
    missing, first = _missing(lines, run.recipe.run.log_every)
    if missing:
        yield Finding(
            "metrics_have_gaps",
            "metrics.jsonl has gaps",
            f"{missing} lines are missing, the first at step {first}",
            "a file that was changed by hand",
            "nothing for the student; curves of the report lack these points",
        )
    quiet = time.time() - path.stat().st_mtime if path.is_file() else 0.0
    if not finished and quiet > QUIET:
        yield Finding(
            "stopped",
            "the run has stopped",
            f"step {max(last, run.done)} of {steps}, and nothing was logged for {quiet / 3600:.1f} hours",
            "it was interrupted or killed",
            f"the same command again goes on from step {run.done}",
        )


def _missing(lines: Sequence[Line], every: int) -> tuple[int, int]:
    """How many lines before the last are missing, and the first step that is."""
    seen = {line["step"] for line in lines}
    expected = range(every, max(seen, default=0), every)
    first = next((step for step in expected if step not in seen), 0)
    return len(expected) - sum(step in expected for step in seen), first


def leftovers(run: Examined) -> Iterator[Finding]:
    """Files of writers that were killed, and a disk with no room for the next checkpoint."""
    names = ("**/.*.part", "**/.*.old")
    found = sorted({path for name in names for path in run.folder.glob(name) if "stages" not in _within(run, path)})
    if found:
        size = sum(file.stat().st_size for path in found for file in (path, *path.rglob("*")) if file.is_file())
        yield Finding(
            "leftovers",
            "leftovers on disk",
            f"{len(found)} of them with {size / 1e6:.1f} MB, such as {found[0].relative_to(run.folder)}",
            "a writer that was killed; what it was to replace is whole",
            "delete them while nothing is running here",
        )
    newest = max((path.stat().st_size for path in run.checkpoints), default=0)
    free = shutil.disk_usage(run.folder).free
    if free < 2 * newest and not run.pipeline.is_dir():
        yield Finding(
            "disk_full",
            "the disk has no room for the next checkpoint",
            f"{free / 1e6:.0f} MB are free, a checkpoint takes {newest / 1e6:.0f} MB",
            "other files on the same disk",
            "free some; run.keep_last 1 keeps fewer checkpoints",
        )


def _within(run: Examined, path: Path) -> tuple[str, ...]:
    return path.relative_to(run.folder).parts[:1]  # stages are examined on their own


CHECKS: tuple[Check, ...] = (
    curves,
    starts_elsewhere,
    damaged_checkpoints,
    bad_weights,
    metrics_end_early,
    leftovers,
)
