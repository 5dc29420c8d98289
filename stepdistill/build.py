"""From a recipe to networks: the only place that instantiates them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from stepdistill.data import Setting
from stepdistill.lora_files import fuse_lora_file
from stepdistill.models.denoiser import Denoiser, Guided
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.families import Opened, load_pipeline, open_pipeline
from stepdistill.models.lora import Adapted, merged_state
from stepdistill.models.nets import Nets
from stepdistill.models.surgery import bare_copy, told_guidance, with_layers
from stepdistill.objective import Batch, Step
from stepdistill.paths import project_dir
from stepdistill.recipe import Heads, Recipe, Teacher, Weights
from stepdistill.sampling import Sampler
from stepdistill.student import Student
from stepdistill.trainer import Source, Trainer


def open_teacher(teacher: Teacher, dtype: torch.dtype = torch.float32) -> Opened:
    """Open the pipeline that a recipe names; ``bundled:NAME`` stands for ``assets/NAME``."""
    source, code = teacher.source, teacher.custom_pipeline
    if source.startswith("bundled:"):
        folder = project_dir("assets") / source.removeprefix("bundled:")
        if (folder / "teacher").is_dir():  # class-conditional, so it needs its pipeline's code
            folder, code = folder / "teacher", str(project_dir("pipelines") / "class_conditional.py")
        source = str(folder)
    pipeline = load_pipeline(source, custom_pipeline=code)
    if teacher.lora is not None:
        fuse_lora_file(pipeline, teacher.lora, teacher.lora_scale)
    return open_pipeline(pipeline, dtype=dtype, size=teacher.size or None, negative=teacher.negative)


def guided(opened: Opened, teacher: Teacher) -> Guided:
    """The teacher under its recipe's guidance."""
    told = opened.family.guidance_input(opened.denoiser.net)
    return Guided(opened.denoiser, teacher.guidance, opened.null, interval=teacher.interval, told=told)


def new_network(opened: Opened, weights: Weights) -> nn.Module:
    """A network made out of the teacher's, that predicts what the teacher does (of fewer layers: nearly).

    Raises:
        ValueError: if the family or the network cannot be made so.
    """
    net, family = opened.denoiser.net, opened.family
    if weights.form == "lora":
        targets = weights.targets or family.lora_targets
        return Adapted(net, weights.rank, weights.alpha or float(weights.rank), targets)
    if weights.layers:
        return with_layers(net, weights.layers)
    if weights.told_guidance and not family.guidance_input(net):
        return told_guidance(net)
    return bare_copy(net).requires_grad_(True)


def new_student(opened: Opened, sampler: Sampler, weights: Weights = Weights()) -> Student:  # noqa: B008 (frozen)
    """A student that starts from the teacher's network."""
    d = opened.denoiser
    return Student(sampler, new_network(opened, weights), d.schedule, d.kind, d.call, d.dtype)


def new_critic(opened: Opened, weights: Weights = Weights()) -> Denoiser:  # noqa: B008 (frozen)
    """A critic that starts from the teacher's network."""
    d = opened.denoiser
    return Denoiser(new_network(opened, weights), d.schedule, d.kind, d.call, d.dtype)


def start_from(student: Student, start: Student) -> None:
    """Give a new student the weights of a warm start's.

    Raises:
        ValueError: if they are not of one shape.
    """
    mine, theirs = student.net, start.net
    merge = isinstance(theirs, Adapted) and not isinstance(mine, Adapted)
    try:
        mine.load_state_dict(merged_state(theirs) if merge else theirs.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "warm_start: its student's network differs from this one's; "
            + str(error).splitlines()[1].split(",")[0].strip()
        ) from error


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
    nets["teacher"] = guided(opened, recipe.teacher)
    nets["student"] = new_student(opened, recipe.sampler, recipe.student)
    if start is not None:
        start_from(nets.student, start)
    if "critic" in optim or "critic" in recipe.objective.needs:
        told = recipe.critic.told_guidance or recipe.student.told_guidance  # it judges what the student was told
        nets["critic"] = new_critic(opened, replace(recipe.critic, told_guidance=told))
    if "disc" in optim:
        nets["disc"] = new_discriminator(opened, recipe.heads, nets)
    for name, module in recipe.objective.extras(nets.student).items():
        nets[name] = module
    nets.to(run.device)

    setting = Setting(opened, nets.teacher, recipe.sampler, run.batch, run.seed, run.device, cache)
    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in optim.items()}
    data = with_guidance(recipe.data.open(setting), recipe, opened)
    trainer = Trainer(nets, recipe.objective, optimizers, data, run, specs=optim, out=out)
    return Built(opened, trainer)


def with_guidance(source: Source, recipe: Recipe, opened: Opened) -> Source:
    """A source whose conditions carry a guidance scale for each sample, or are the null condition now and then.

    Raises:
        ValueError: if the teacher has no null condition to put in.
    """
    scales, rate, null = recipe.teacher.guidance_range, recipe.null_rate, opened.null
    if rate and null is None:
        raise ValueError(f"null_rate {rate}: this teacher has no null condition; leave it 0")
    if scales is None and not rate:
        return source

    def batch(step: Step) -> Batch:
        given = source(step)
        cond, n = dict(given.cond), len(given)
        if rate:
            dropped = (step.rand(n) < rate).to(recipe.run.device)
            cond = {k: torch.where(dropped.view(-1, *[1] * (v.ndim - 1)), null[k].to(v), v) for k, v in cond.items()}
        if scales is not None:
            low, high = scales
            cond["guidance"] = (low + (high - low) * step.rand(n)).float().to(recipe.run.device)
        return replace(given, cond=cond)

    return batch
