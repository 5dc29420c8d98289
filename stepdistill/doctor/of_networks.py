"""What shows when teacher, checkpoint and exported pipeline are opened and held against each other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.build import new_critic_of, new_student_of, plain_network
from stepdistill.distill import told
from stepdistill.doctor.run import Check, Examined
from stepdistill.exported import read_configs
from stepdistill.models.lora import network_of
from stepdistill.sampling import Renoise
from stepdistill.symptoms import Finding


def pipeline_is_sound(run: Examined) -> Iterator[Finding]:
    """An exported pipeline that is missing, damaged, or whose scheduler goes another way than the student's."""
    if not run.pipeline.is_dir():
        if run.done >= run.recipe.run.steps:
            yield Finding(
                "not_exported",
                "the trained student was not exported",
                f"checkpoints reach step {run.done}, and there is no {run.pipeline.name}/",
                "a run that was stopped while it exported, or a full disk",
                "the same command again exports it",
            )
        return
    wanted = run.recipe.sampler
    try:
        found = run.exported.sampler
    except (ValueError, OSError) as error:
        yield Finding(
            "bad_pipeline",
            "the exported pipeline cannot be used",
            str(error).splitlines()[0],
            "files that were changed, lost or damaged since the export: other timesteps are another student",
            f"move {run.pipeline.name}/ away and run the same command again: it exports from the last checkpoint",
        )
        return
    if found.steps != wanted.steps or not np.allclose(found.times, wanted.times, rtol=1e-4, atol=1e-5):
        yield Finding(
            "timesteps",
            "the exported timesteps are not the trained ones",
            f"the scheduler goes through {_times(found.times)}, the student was trained at {_times(wanted.times)}",
            "a scheduler's config that was changed, or the pipeline of another run",
            f"move {run.pipeline.name}/ away and run the same command again: it exports from the last checkpoint",
        )
    elif wanted.steps > 1 and isinstance(found.rule, Renoise) != isinstance(wanted.rule, Renoise):
        yield Finding(
            "rule",
            "the exported scheduler takes other steps",
            f"the scheduler's are {found.rule}, the student was trained for {wanted.rule}",
            "a scheduler that was exchanged after the export",
            f"move {run.pipeline.name}/ away and run the same command again: it exports from the last checkpoint",
        )


def guidance_counts_twice(run: Examined) -> Iterator[Finding]:
    """Calls of the exported pipeline that pass another scale than the student was trained for."""
    if not run.pipeline.is_dir() or run.recipe.null_rate:
        return  # a student that keeps its null condition may be guided
    _, scheduler = read_configs(run.pipeline)
    record = scheduler.config.get("_student")
    if record is None:
        return  # the pipeline is our own, and takes no scale
    opened, teacher = run.opened, run.recipe.teacher
    usual = opened.family.sampling(opened.pipeline)
    names = [name for name in ("guidance_scale", "true_cfg_scale") if name in record["call"] or name in usual]
    is_told = opened.family.guidance_input(network_of(opened.denoiser.net)) or run.recipe.student.told_guidance
    if is_told and "guidance_scale" not in names:
        names.append("guidance_scale")  # the call's own default is what is passed
    for name in names:
        passed = record["call"].get(name, _default(opened.pipeline, name))
        expected = (told(teacher) or teacher.guidance) if is_told and name == "guidance_scale" else usual.get(name)
        if passed is None or expected is None or abs(passed - expected) < 1e-6:
            continue
        folded = teacher.guidance if teacher.guidance_range is None else teacher.guidance_range
        off = abs(abs(passed - expected) - 1) < 1e-6
        yield Finding(
            "guidance",
            "guidance is counted off by one" if off and is_told else "the student is guided again at inference",
            f"the pipeline is called with {name} {passed:g} where {expected:g} is right; the student was trained under "
            f"teacher.guidance {folded}",
            "w of the literature is guidance_scale - 1"
            if off and is_told
            else "guidance that is part of the student was switched on again in the exported pipeline",
            f"call it with {name}={expected:g}, or export again",
        )


def _default(pipeline: Any, name: str) -> float | None:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return parameters[name].default if name in parameters else None


def average_not_applied(run: Examined) -> Iterator[Finding]:
    """An export with the student's raw weights in place of their average."""
    raw, average = run.state("student"), run.state("ema")
    if not run.pipeline.is_dir() or not raw or not average:
        return
    student = new_student_of(run.recipe, run.opened)
    there = _plain(run.exported.net.state_dict())
    away = {}
    for name, state in (("student", raw), ("ema", average)):
        student.load_state_dict(state)
        away[name] = distance(there, _plain(plain_network(student, run.opened).state_dict()))
    if away["student"] < 0.1 * away["ema"]:
        yield Finding(
            "average_not_applied",
            "the average was not applied",
            f"exported weights are {away['student']:.2g} from the raw student's and {away['ema']:.2g} from their "
            "running average's (relative)",
            "an export of nets.student in place of nets.ema",
            f"move {run.pipeline.name}/ away and run the same command again: it exports the average",
        )


def never_moved(run: Examined) -> Iterator[Finding]:
    """A student or a critic that is what it was at the start, after training."""
    fresh = {"critic": new_critic_of, "student": new_student_of}
    for role, make in fresh.items():
        state = run.state(role)
        taken = sum(turn.taken(run.done) for turn in run.recipe.objective.turns() if role in turn.moves)
        started = role == "student" and run.recipe.warm_start is not None  # from weights that are not at hand
        if not state or not taken or started:
            continue
        adapters = {k: v for k, v in state.items() if "lora_B" in k}
        if adapters:  # these start at zero, beside others that start at random
            still = not any(bool(v.any()) for v in adapters.values())
        else:
            still = distance(state, make(run.recipe, run.opened).state_dict()) == 0
        if still:
            yield Finding(
                f"{role}_never_moved",
                f"the {role} is dead",
                f"after {taken} of its updates not one of its {sum(v.numel() for v in state.values())} weights differs "
                "from the teacher's",
                f"optim.{role}.lr 0 or far too small, gradients that do not reach it, or an optimizer of other weights",
                f"look at the gradient norm of its turn in metrics.jsonl, and at optim.{role}.lr",
            )


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Relative root-mean-square distance over what both hold."""
    shared = [k for k in one if k in other and one[k].is_floating_point() and one[k].shape == other[k].shape]
    squares = sum(float((one[k].double() - other[k].double()).square().sum()) for k in shared)
    norm = sum(float(other[k].double().square().sum()) for k in shared)
    return (squares / norm) ** 0.5 if norm else 0.0


@torch.no_grad()
def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: the next state is loaded into the same network."""
    return {k: v.detach().cpu().clone() for k, v in state.items()}


def _times(times: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{t:g}" for t in times) + "]"


CHECKS: tuple[Check, ...] = (pipeline_is_sound, guidance_counts_twice, average_not_applied, never_moved)
