"""From a recipe to networks: the only place that instantiates them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from unittest.mock import patch

import torch
from torch import nn

from stepdistill import distributed
from stepdistill.checkpoint import Checkpoints
from stepdistill.data import Report, Setting
from stepdistill.data.base import companions
from stepdistill.functional.distances import LPIPS
from stepdistill.known_teachers import PREFIX
from stepdistill.lora_files import fuse_lora_file
from stepdistill.models.denoiser import Denoiser, Guided, with_null
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.families import Opened, load_pipeline, open_pipeline
from stepdistill.models.lora import Adapted, merged_state
from stepdistill.models.nets import Nets, add_averages, freeze
from stepdistill.models.surgery import bare_copy, told_guidance, unadapted, with_layers
from stepdistill.models.taps import Tap
from stepdistill.models.two_time import TwoTime, fold
from stepdistill.models.vision import Images, Perceptual, Vision
from stepdistill.objective import Batch, Step, with_networks
from stepdistill.paths import project_dir
from stepdistill.placement import place, recompute, visiting
from stepdistill.recipe import Heads, Recipe, Teacher, Weights
from stepdistill.sampling import Sampler
from stepdistill.student import Student
from stepdistill.trainer import Source, Trainer


def open_teacher(teacher: Teacher, dtype: torch.dtype = torch.float32) -> Opened:
    """Open the pipeline that a recipe names; ``bundled:NAME`` stands for ``assets/NAME``."""
    source, code = teacher.source, teacher.custom_pipeline
    if source.startswith(PREFIX):
        raise ValueError(f"teacher.source {source!r} has no weights: it is there to be planned with")
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
        net = bare_copy(net) if weights.own_base else net
        return Adapted(net, weights.rank, weights.alpha or float(weights.rank), targets)
    if weights.layers:
        new = with_layers(net, weights.layers)
    elif weights.told_guidance and not family.guidance_input(net):
        new = told_guidance(net)
    else:
        new = bare_copy(net).requires_grad_(True)
    if weights.freeze:
        freeze(new, weights.freeze)
    return new


def new_student(
    opened: Opened,
    sampler: Sampler,
    weights: Weights = Weights(),  # noqa: B008 (frozen)
    serves: tuple[Sampler, ...] = (),
    *,
    two_time: bool = False,
) -> Student:
    """A student that starts from the teacher's network; ``serves`` as in ``Student``, ``two_time`` as objectives say.

    Raises:
        ValueError: if the network cannot be told a second time.
    """
    d, net = opened.denoiser, new_network(opened, weights)
    net = TwoTime(net) if two_time else net
    return Student(sampler, net, d.schedule, d.kind, d.call, d.dtype, serves=serves)


def new_critic(opened: Opened, weights: Weights = Weights()) -> Denoiser:  # noqa: B008 (frozen)
    """A critic that starts from the teacher's network."""
    d = opened.denoiser
    return Denoiser(new_network(opened, weights), d.schedule, d.kind, d.call, d.dtype)


@torch.no_grad()
def plain_network(student: Student, opened: Opened) -> nn.Module:
    """A student's network as one of the teacher's class: adapters added in, and a second time folded into the first.

    A copy, or the student's own network where it is plain already.

    Raises:
        ValueError: if its grid cannot be folded; see ``two_time.fold``.
    """
    if not isinstance(student.net, TwoTime):
        return unadapted(student.net)
    family, k = opened.family, student.sampler.steps
    bare = unadapted(student.net.net)
    bare = copy.deepcopy(bare) if bare is student.net.net else bare
    device = next(student.net.parameters()).device
    t = torch.tensor(student.sampler.times, dtype=torch.float64, device=device) * student.schedule.t_max
    given = opened.null  # of any conditions: none reaches the embedding of time
    if given is None:
        given = family.examples(opened.pipeline, 1) if family.encode is None else opened.encode([""])
    cond = {key: v.to(device).expand(k, *v.shape[1:]) for key, v in given.items()}
    if family.guidance_input(bare):
        cond["guidance"] = torch.ones(k, device=device)
    x_t = torch.zeros(k, *opened.sample_shape, device=device)
    gap = (t - student.next_time(t)) / student.schedule.t_max
    fold(student.net, bare, lambda net: student.call(net, x_t, t, cond), gap)
    return bare


def start_from(student: Student, start: Student, opened: Opened) -> None:
    """Give a new student the weights of a warm start's.

    A second time that only one of the two is told stays new, or is folded.

    Raises:
        ValueError: if they are not of one shape.
    """
    mine, theirs = student.net, start.net
    if isinstance(mine, TwoTime) and isinstance(theirs, TwoTime):
        mine.second.load_state_dict(theirs.second.state_dict())
        mine, theirs = mine.net, theirs.net
    elif isinstance(mine, TwoTime):
        mine = mine.net
    elif isinstance(theirs, TwoTime):
        theirs = plain_network(start, opened)
    merge = isinstance(theirs, Adapted) and not isinstance(mine, Adapted)
    try:
        mine.load_state_dict(merged_state(theirs) if merge else theirs.state_dict())
    except RuntimeError as error:
        raise ValueError(
            "warm_start: its student's network differs from this one's; "
            + str(error).splitlines()[1].split(",")[0].strip()
        ) from error


def to_images(opened: Opened, size: int = 0) -> Images:
    """From the teacher's samples to images of a side; 0 leaves them as they are."""
    return Images(partial(opened.family.decode, opened.pipeline), companions(opened).get("vae"), size)


def new_lpips(opened: Opened, asked: LPIPS) -> Perceptual:
    """A frozen network that compares the teacher's samples as images.

    Raises:
        ValueError: if its weights are not here and cannot be fetched.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    net = fetched("LPIPS", lambda: LearnedPerceptualImagePatchSimilarity(asked.net)).net
    return Perceptual(net, to_images(opened, asked.size))


def fetched(field: str, network: Callable[[], nn.Module]) -> nn.Module:
    """A network with torchvision's weights.

    Raises:
        ValueError: if they are not here and cannot be fetched.
    """
    try:
        with patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}):  # torchvision would run any pickle
            return network()
    except (OSError, RuntimeError, UnpicklingError) as error:  # no connection; a file that is cut short, or is code
        place = f"{torch.hub.get_dir()}/checkpoints"
        raise ValueError(f"{field}: torchvision's weights could not be fetched to {place}: {error}") from error


def new_vision(opened: Opened, name: str) -> tuple[Vision, tuple[Tap, ...]]:
    """A frozen network of images before the teacher's decoder, and what to read of it.

    Args:
        opened: the teacher.
        name: "judge", the classifier of the bundled benchmark that the teacher belongs to, or "vgg16_bn".

    Raises:
        ValueError: if there is no such benchmark.
    """
    if name == "vgg16_bn":
        from torchvision.models import VGG16_BN_Weights, vgg16_bn

        net = fetched("heads.backbone", lambda: vgg16_bn(weights=VGG16_BN_Weights.IMAGENET1K_V1)).features
        taps = Tap("12", 128), Tap("22", 256), Tap("32", 512), Tap("42", 512)  # where blocks 2 to 5 end, before pooling
        norm = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        return Vision(net, to_images(opened, 224), **norm), taps

    from stepdistill.evaluation import benchmark  # the judges' libraries take their time

    if benchmark.is_digits(opened):
        from stepdistill.evaluation.classifier import load_digit_classifier
        from stepdistill.evaluation.digits import DIGIT_CLASSIFIER

        taps = Tap("conv1", 16), Tap("norm2", 32), Tap("norm3", 32)
        return Vision(load_digit_classifier(DIGIT_CLASSIFIER), to_images(opened)), taps
    if benchmark.is_shapes(opened):
        from stepdistill.evaluation.shapes import load_shapes_classifier

        net = load_shapes_classifier(project_dir("assets") / "shapes-judges" / "classifier.safetensors")
        return Vision(net, to_images(opened)), (Tap("norms.1", 32), Tap("norms.2", 48), Tap("norms.4", 64))
    raise ValueError(
        f"heads.backbone: 'judge' is for the bundled digits and shapes; of {type(opened.pipeline).__name__}'s images "
        "use 'vgg16_bn', or 'teacher'"
    )


def new_discriminator(opened: Opened, heads: Heads, nets: Nets) -> Discriminator:
    """Heads over the features of the teacher or the critic of ``nets``, or of a frozen network of images.

    Raises:
        ValueError: if a tap is none of the backbone's features, or there is no such backbone here.
    """
    if heads.backbone == "critic" and "critic" not in nets:
        raise ValueError("heads.backbone: 'critic', but the objective has no critic; use 'teacher'")
    if heads.backbone in ("judge", "vgg16_bn"):
        backbone, taps = new_vision(opened, heads.backbone)
        whose = f"{heads.backbone}'s"
    else:
        backbone = nets.critic if heads.backbone == "critic" else nets.teacher.denoiser
        taps, whose = opened.family.taps(opened.denoiser.net), "the family's"
    known = {tap.name: tap for tap in taps}
    names = heads.taps or tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"heads.taps: {unknown[0]!r} is none of {whose} features: {', '.join(known)}")
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
    report: Report
    """What the data held and what of it was left out."""


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
        opened: the teacher, where it is open already (a live pipeline), on the CPU if networks are to be sharded or
            offloaded; None opens the recipe's.
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
    nets["student"] = new_student_of(recipe, opened)
    if start is not None:
        start_from(nets.student, start, opened)
    if "critic" in optim or "critic" in recipe.objective.needs:
        nets["critic"] = new_critic_of(recipe, opened)
    if "disc" in optim:
        nets["disc"] = new_discriminator(opened, recipe.heads, nets)
    for name, module in recipe.objective.extras(nets.student).items():
        nets[name] = module
    add_averages(nets, ("ema", *recipe.objective.averages()))
    lpips = nn.ModuleList()
    objective = with_networks(recipe.objective, lambda asked: lpips.append(new_lpips(opened, asked))[-1])
    if len(lpips):
        nets["lpips"] = lpips
    recompute(nets, recipe.placement.checkpointing)

    report = Report()
    setting = Setting(
        opened, nets.teacher, recipe.sampler, distributed.share(run.batch), run.seed, run.device, cache, report
    )
    with visiting(opened.denoiser, run.device), distributed.main_first():  # some sources ask the teacher
        data = with_guidance(recipe.data.open(setting), recipe, opened)
    placed = place(nets, recipe.placement, run.device)
    optimizers = {name: spec.build(nets[name].parameters()) for name, spec in optim.items()}
    trainer = Trainer(nets, objective, optimizers, data, run, specs=optim, placed=placed, out=out)
    return Built(opened, trainer, report)


def new_student_of(recipe: Recipe, opened: Opened) -> Student:
    """The student of a recipe, before it has learned anything."""
    serves = recipe.objective.serves(recipe.sampler)
    return new_student(opened, recipe.sampler, recipe.student, serves, two_time=recipe.objective.two_time)


def new_critic_of(recipe: Recipe, opened: Opened) -> Denoiser:
    """The critic of a recipe, before it has learned anything."""
    told = recipe.critic.told_guidance or recipe.student.told_guidance  # it judges what the student was told
    return new_critic(opened, replace(recipe.critic, told_guidance=told))


def trained(recipe: Recipe, opened: Opened, folder: Path) -> Nets:
    """What training in ``folder`` has left, out of its newest checkpoint: ``ema``, and the method's extras; whole.

    Args:
        recipe: what was trained there.
        opened: its teacher.
        folder: the run directory.

    Raises:
        ValueError: if there is no checkpoint.
    """
    student = new_student_of(recipe, opened)
    nets = Nets({"ema": student, **recipe.objective.extras(student)})
    kept = Checkpoints(folder / "checkpoints", recipe.run.keep_last).state()
    nets.load_state_dict({k: v for k, v in kept.items() if k.partition(".")[0] in nets})
    return nets.requires_grad_(False)


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
            cond = with_null(cond, null, dropped)
        if scales is not None:
            low, high = scales
            cond["guidance"] = (low + (high - low) * step.rand(n)).float().to(recipe.run.device)
        return replace(given, cond=cond)

    return batch
