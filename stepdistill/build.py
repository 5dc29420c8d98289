"""From a recipe to networks: the only place that instantiates them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stepdistill.data import Setting
from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.nets import Nets
from stepdistill.paths import project_dir
from stepdistill.recipe import Heads, Recipe, Teacher
from stepdistill.sampling import Sampler
from stepdistill.student import Student
from stepdistill.trainer import Trainer


def open_teacher(teacher: Teacher, dtype: torch.dtype = torch.float32) -> Opened:
    """Open the pipeline that a recipe names; ``bundled:NAME`` stands for ``assets/NAME/teacher``."""
    if teacher.source.startswith("bundled:"):
        folder = project_dir("assets") / teacher.source.removeprefix("bundled:") / "teacher"
        code = project_dir("pipelines") / "class_conditional.py"
        return open_pipeline(folder, custom_pipeline=str(code), dtype=dtype)
    return open_pipeline(teacher.source, custom_pipeline=teacher.custom_pipeline, dtype=dtype)


def new_student(opened: Opened, sampler: Sampler) -> Student:
    """A student that starts as a copy of the teacher's network."""
    d = opened.denoiser
    return Student(sampler, copy.deepcopy(d.net).requires_grad_(True), d.schedule, d.kind, d.call, d.dtype)


def new_critic(opened: Opened) -> Denoiser:
    """A critic that starts as a copy of the teacher's network."""
    d = opened.denoiser
    return Denoiser(copy.deepcopy(d.net).requires_grad_(True), d.schedule, d.kind, d.call, d.dtype)


def new_discriminator(opened: Opened, heads: Heads, nets: Nets) -> Discriminator:
    """Heads over the features of the teacher or the critic of ``nets``.

    Raises:
        ValueError: if a tap is no submodule, or its channels are not known from the family.
    """
    known = {tap.name: tap for tap in opened.family.taps(opened.denoiser.net)}
    names = heads.taps or tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"heads.taps: {unknown[0]!r} is none of the family's features: {', '.join(known)}")
    if heads.backbone == "critic" and "critic" not in nets:
        raise ValueError("heads.backbone: 'critic', but the objective has no critic; use 'teacher'")
    backbone = nets.critic if heads.backbone == "critic" else nets.teacher.denoiser
    return Discriminator(backbone, [known[name] for name in names], heads.width)


def computing_in(opened: Opened, dtype: str) -> Opened:
    """The same teacher under another arithmetic; weights are shared."""
    d = opened.denoiser
    return replace(opened, denoiser=Denoiser(d.net, d.schedule, d.kind, d.call, getattr(torch, dtype)))


@dataclass(frozen=True)
class Built:
    """A recipe's networks and its trainer."""

    opened: Opened
    trainer: Trainer


def build(
    recipe: Recipe,
    *,
    opened: Opened | None = None,
    start: Student | None = None,
    out: Path | None = None,
    cache: Path | None = None,
) -> Built:
    """Open the teacher, make everyone else, and a trainer over them.

    Args:
        recipe: what to build; its warm start is not run here.
        opened: the teacher, where it is open already (a live pipeline); None opens the recipe's.
        start: the student of a warm start; None starts from the teacher.
        out: run directory of the trainer.
        cache: folder for data that is costly to make.

    Raises:
        ValueError: if the teacher cannot be opened, or parts of the recipe do not fit it.
    """
    run, optim = recipe.run, recipe.players
    opened = computing_in(opened or open_teacher(recipe.teacher), run.dtype)
    torch.manual_seed(run.seed)  # for initial weights of heads and extras; everything later draws from Step
    nets = Nets()
    nets["teacher"] = Guided(opened.denoiser, recipe.teacher.guidance, opened.null, interval=recipe.teacher.interval)
    nets["student"] = new_student(opened, recipe.sampler)
    if start is not None:
        nets.student.net.load_state_dict(start.net.state_dict())
    if "critic" in optim or "critic" in recipe.objective.needs:
        nets["critic"] = new_critic(opened)
    if "disc" in optim:
        nets["disc"] = new_discriminator(opened, recipe.heads, nets)
    for name, module in recipe.objective.extras(nets.student).items():
        nets[name] = module
    nets.to(run.device)

    setting = Setting(opened, nets.teacher, recipe.sampler, run.batch, run.seed, run.device, cache)
    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in optim.items()}
    trainer = Trainer(nets, recipe.objective, optimizers, recipe.data.open(setting), run, specs=optim, out=out)
    return Built(opened, trainer)
