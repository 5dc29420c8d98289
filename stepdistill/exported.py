"""Exported students read back: the network for this library, or the whole pipeline with stock classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from stepdistill.folders import read_json
from stepdistill.model_card import absent_parts, loading_code
from stepdistill.models.families.base import FAMILIES, Family, Opened, family_for, family_of
from stepdistill.models.families.loading import load_networks
from stepdistill.sampling import Ddim, Renoise, Sampler, StepRule, Tcd, trailing
from stepdistill.schedule import DiscreteVP
from stepdistill.stock import even_timesteps, same_table, stock_times, vp_table
from stepdistill.student import Student

WEIGHTS = "diffusion_pytorch_model.safetensors"

VP_SCHEDULERS = (DDIMScheduler, LCMScheduler, TCDScheduler)
_SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    s.__name__: s
    for s in (*VP_SCHEDULERS, FlowMatchEulerDiscreteScheduler, EDMEulerScheduler, CMStochasticIterativeScheduler)
}
_AS_SAMPLED = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}  # ``Sampler`` clips nothing


def load_lines(path: str | Path) -> str:
    """The lines of Python that load and sample an exported student, without this library.

    Args:
        path: the folder, as it shall stand in them.

    Raises:
        FileNotFoundError: if there is no pipeline folder.
        ValueError: if it is not an exported student.
    """
    index, scheduler = read_configs(Path(path))
    return loading_code(str(path), index, scheduler.config.get("_student"), trained_steps(Path(path), index, scheduler))


def load_student(path: str | Path, *, opened: Opened | None = None) -> Student:
    """Read an exported folder's network back; safetensors only, and none of the folder's code is run.

    Args:
        path: the folder.
        opened: the teacher, to make sure that the student is one of its own.

    Returns:
        The student with its sampler, in eval mode, on the CPU, in float32.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if a file is damaged, the folder is not an exported student's, or not a student of ``opened``.
    """
    path = Path(path)
    index, scheduler = read_configs(path)
    steps = trained_steps(path, index, scheduler)
    module = network_part(path, index)
    net_class = index[module][1]
    if net_class not in FAMILIES:
        raise ValueError(
            f"{path / 'model_index.json'}: no family for {net_class}; known: {', '.join(sorted(FAMILIES))}"
        )
    net = load_net(path / module, net_class)
    family = family_for(net, scheduler)
    if family is None:
        raise ValueError(f"{path}: no family for this {net_class} under {type(scheduler).__name__}")
    record = scheduler.config.get("_student")
    student = _student(net.eval(), family, scheduler, record or {"times": trailing(steps), **index}, str(path))
    if opened is not None:
        shape = family.sample_shape(stand_in(net, scheduler), None) if record is None else tuple(record["shape"])
        _check_teacher(path, student, family, shape, opened)
    return student


def live_student(pipeline: DiffusionPipeline) -> Student:
    """The student in a live pipeline, around the pipeline's own network.

    Raises:
        ValueError: if the pipeline is no exported student, or was given another scheduler since.
    """
    theirs = pipeline.scheduler
    record, name = theirs.config.get("_student"), type(theirs).__name__
    if record is None or name not in _SCHEDULERS:
        raise ValueError(f"this {type(pipeline).__name__} is no exported student; export one with save_pipeline")
    family = family_of(pipeline)
    scheduler = _SCHEDULERS[name].from_config(theirs.config)  # its table is changed, and its timesteps are set
    return _student(pipeline.components[family.module], family, scheduler, record, "this pipeline")


def _student(net: nn.Module, family: Family, scheduler: SchedulerMixin, record: dict[str, Any], where: str) -> Student:
    """A network under the sampler that its scheduler stands for; ``record`` has the trained times, and TCD's gamma."""
    if isinstance(scheduler, TCDScheduler):
        scheduler.alphas_cumprod = vp_table(scheduler)
    schedule, times = family.schedule(scheduler), tuple(record["times"])
    found = stock_times(scheduler, schedule, len(times), family.passes_sigmas)
    if not np.allclose(found, times, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{where}: its scheduler yields the times {found}, not the trained {list(times)}; export again"
        )
    sampler = Sampler(times, rule_of(scheduler, record))
    return Student(sampler, net, schedule, family.kind(scheduler), family.call(scheduler))


def _check_teacher(path: Path, student: Student, family: Family, shape: tuple[int, ...], opened: Opened) -> None:
    teacher = opened.denoiser
    if family.name != opened.family.name:
        raise ValueError(f"{path}: a student of the family {family.name}, but the teacher is of {opened.family.name}")
    if shape != opened.sample_shape:
        raise ValueError(f"{path}: samples of shape {shape}, but the teacher's are {opened.sample_shape}")
    classes = "num_class_embeds"
    if student.net.config.get(classes) != teacher.net.config.get(classes):
        raise ValueError(f"{path}: class labels differ from the teacher's; it was distilled from another one")
    if isinstance(student.schedule, DiscreteVP) and not same_table(student.schedule, teacher.schedule):
        raise ValueError(f"{path}: noise table differs from the teacher's; it was distilled from another one")


def load_exported(
    path: str | Path, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> DiffusionPipeline:
    """Load an exported student with stock classes, as ``DiffusionPipeline.from_pretrained`` does.

    Stock loading warns of weights that a file lacks, and makes them up; here that is an error. So are pickles.

    Args:
        path: the folder, of a student whose pipeline is diffusers' own.
        dtype: of all weights.
        variant: which weights, where there are several: None is float32, or "fp16", "bf16".

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if a file is damaged, or the folder is no exported student's.
    """
    path = Path(path)
    index, scheduler = read_configs(path)
    trained_steps(path, index, scheduler)
    if isinstance(index["_class_name"], list):
        raise ValueError(f"{path}: brings its pipeline's own code, which is not run unasked; use load_student")
    parts = {name: None for name in absent_parts(index)} | load_networks(path, index, dtype, variant)
    return DiffusionPipeline.from_pretrained(path, use_safetensors=True, dtype=dtype, **parts)


def network_part(path: Path, index: dict[str, Any]) -> str:
    """The name of the denoising network's folder."""
    modules = sorted({family.module for rows in FAMILIES.values() for family in rows})
    found = [m for m in modules if isinstance(index.get(m), list)]
    if not found:
        raise ValueError(f"{path / 'model_index.json'}: no {' or '.join(modules)} in it; this is no exported student")
    return found[0]


def rule_of(scheduler: SchedulerMixin, record: dict[str, Any]) -> StepRule:
    """How a student's scheduler makes a step; ``record`` may hold TCD's gamma.

    Raises:
        ValueError: for a scheduler that no student has.
    """
    if isinstance(scheduler, LCMScheduler | CMStochasticIterativeScheduler):
        return Renoise()
    if isinstance(scheduler, TCDScheduler):
        gamma = record.get("gamma")
        return Tcd(0.3 if gamma is None else gamma, scheduler.config.num_train_timesteps)  # 0.3: TCDScheduler.step's
    if not isinstance(scheduler, tuple(_SCHEDULERS.values())):
        raise ValueError(
            f"{type(scheduler).__name__} is no student's scheduler; students have {', '.join(_SCHEDULERS)}"
        )
    return Renoise() if scheduler.config.get("stochastic_sampling") else Ddim()


def read_configs(path: Path) -> tuple[dict[str, Any], SchedulerMixin]:
    """The pipeline's config and its scheduler, both checked.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if one is damaged or no student's.
    """
    file = path / "model_index.json"
    index = read_json(file)
    network_part(path, index)
    match index:
        case {"scheduler": [_, str(name)]}:
            pass
        case _:
            raise ValueError(f"{file}: no scheduler in it; give the folder of an exported student")
    if name not in _SCHEDULERS:
        raise ValueError(f"{file}: {name} is no student's scheduler; students have {', '.join(_SCHEDULERS)}")
    file = path / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    try:
        scheduler = _SCHEDULERS[name].from_config(config)
    except Exception as error:  # whatever a constructor makes of damaged values
        raise ValueError(f"{file}: {name} cannot be made of it ({error}); export the student again") from error
    return index, scheduler


def trained_steps(path: Path, index: dict[str, Any], scheduler: SchedulerMixin) -> int:
    """The trained step count, which a VP scheduler must turn into the trained timesteps.

    Raises:
        ValueError: if there is none, or the scheduler goes another way.
    """
    trained = index.get("trained_steps", scheduler.config.get("_trained_steps"))  # only students have either
    match trained:
        case [int(steps)] if steps > 0:
            pass
        case _:
            raise ValueError(f"{path}: trained_steps {trained}, so this is no few-step student; open it as a teacher")
    if not isinstance(scheduler, VP_SCHEDULERS):
        return steps
    file, n = path / "scheduler" / "scheduler_config.json", scheduler.config.num_train_timesteps
    for key, wanted in _AS_SAMPLED.items():
        if scheduler.config[key] != wanted:
            raise ValueError(f"{file}: {key} must be {wanted}, as the student was trained; export it again")
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; export the student again") from error
    found, wanted = scheduler.timesteps.tolist(), even_timesteps(steps, n)
    if found != wanted:
        raise ValueError(f"{file}: yields timesteps {found}, not the trained {wanted}; export the student again")
    return steps


def stand_in(net: nn.Module, scheduler: SchedulerMixin) -> DDIMPipeline:
    """A pipeline object around a network whose own pipeline's code is not run."""
    return DDIMPipeline(net, scheduler)


def load_net(folder: Path, net_class: str) -> nn.Module:
    """A denoising network of diffusers, every weight of which comes from the folder's one file of weights.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged, or the two do not belong together.
    """
    config, file = read_json(folder / "config.json"), folder / WEIGHTS
    if not file.is_file():
        pickles = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f" (there is {pickles[0].name}, a pickle, which is never opened)" if pickles else ""
        raise FileNotFoundError(f"{file} is missing{found}; export the student again")
    try:
        net = getattr(diffusers, net_class).from_config(config)
    except Exception as error:  # whatever a constructor makes of damaged values
        raise ValueError(f"{folder / 'config.json'}: no {net_class} can be made of it ({error})") from error
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); export the student again") from error
    expected = net.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            raise ValueError(
                f"{file}: weight {name} is {'missing' if name in expected else 'not of this network'}; "
                "config.json and the weights are of two models, export the student again"
            )
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{file}: weight {name} is {tuple(state[name].shape)}, config.json says "
                f"{tuple(expected[name].shape)}; export the student again"
            )
    net.load_state_dict(state)
    return net
