"""Students as diffusers pipeline folders: written whole or not at all, sampled anywhere without this library.

The scheduler's config alone yields the trained timesteps, so a folder samples the way its student was trained.
Class-conditional folders carry their pipeline's code; unconditional ones are a stock ``DDIMPipeline``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMPipeline, DDIMScheduler, LCMScheduler, SchedulerMixin, TCDScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from stepdistill.models.families.base import FAMILIES, Opened, family_for
from stepdistill.paths import project_dir
from stepdistill.sampling import Ddim, Renoise, Sampler, Tcd, trailing
from stepdistill.stock import even_timesteps, same_table, stock_scheduler
from stepdistill.student import Student

WEIGHTS = "diffusion_pytorch_model.safetensors"

_NET_CLASS = "UNet2DModel"
_PIPELINE_FILE = "class_conditional.py"  # in pipelines/; the folder's copy is pipeline.py, where diffusers looks for it
_SCHEDULERS = {s.__name__: s for s in (DDIMScheduler, LCMScheduler, TCDScheduler)}
_AS_SAMPLED = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}  # ``Sampler`` clips nothing


def check_exportable(student: Student, opened: Opened) -> None:
    """Make sure, before training it, that diffusers will be able to sample a student as it is trained.

    Args:
        student: its network's class, its sampler, schedule and kind count; its weights do not.
        opened: the teacher.

    Raises:
        ValueError: if its network cannot be exported, or no stock scheduler goes its way; names the cure.
    """
    net = student.net
    if type(net).__name__ != _NET_CLASS:
        raise ValueError(f"the student's network is a {type(net).__name__}; export writes {_NET_CLASS} only")
    stock_scheduler(student, opened)


def save_pipeline(
    student: Student, opened: Opened, path: str | Path, *, teacher: str | None = None, method: str | None = None
) -> Path:
    """Write a student as a diffusers pipeline folder.

    The folder is written beside ``path``, flushed to disk and renamed, so that ``path`` holds the old pipeline or the
    whole new one. (Folders cannot be exchanged in one call: a crash between the two renames leaves the old one beside
    it, as ``.NAME.PID.old``.) Weights keep their dtype; autocast of the student is not exported.

    Args:
        student: the network to write, and the sampler that it was trained for.
        opened: the teacher: its noise table and its null condition.
        path: the folder; an exported student that is already there is replaced, nothing else is.
        teacher: the teacher's name for the model card; None takes what it was loaded from. Of a folder, only its
            name is written.
        method: the method's name for the model card.

    Returns:
        The folder.

    Raises:
        ValueError: if no stock scheduler samples as the student does, a weight is not finite, or ``path`` holds
            something else than an exported student. Nothing is written then.
        FileNotFoundError: if the repository's pipelines/ is not there to copy from.
        OSError: if it cannot be written, as on a full disk; what was at ``path`` is untouched.
    """
    path = Path(os.path.realpath(path))  # through links, so that the folder is replaced and not the link
    net = student.net
    check_exportable(student, opened)
    for name, value in net.state_dict().items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"weight {name} of the student is not finite; export an earlier checkpoint")
    conditional = net.config.num_class_embeds is not None
    scheduler = stock_scheduler(student, opened)
    code = project_dir("pipelines") / _PIPELINE_FILE
    index = _index(student, opened, scheduler, conditional)
    lines = _sampling_lines(path.name, conditional, student.sampler.steps)
    card = _card(student, scheduler, lines, _public_name(teacher, opened), method)
    if not _replaceable(path):
        raise ValueError(f"{path} is there and holds no exported student, so it is not replaced; choose another path")

    with _replacing(path) as folder:
        net.save_pretrained(folder / "unet", safe_serialization=True, max_shard_size="1000GB")  # one file
        config_file = folder / "unet" / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where the teacher lay on this machine
        _write_json(config_file, config)
        (folder / "unet" / WEIGHTS).chmod(config_file.stat().st_mode)  # safetensors leaves it to its owner alone
        scheduler.save_pretrained(folder / "scheduler")
        _write_json(folder / "model_index.json", index)
        if conditional:
            shutil.copyfile(code, folder / "pipeline.py")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return path


def load_lines(path: str | Path) -> str:
    """The lines of Python that load and sample an exported student, without this library.

    Args:
        path: the folder, as it shall stand in them.

    Raises:
        FileNotFoundError: if there is no pipeline folder.
        ValueError: if it is not an exported student.
    """
    index, scheduler = _open_configs(Path(path))
    return _sampling_lines(str(path), "trained_steps" in index, _trained_steps(Path(path), index, scheduler))


def load_student(path: str | Path, *, opened: Opened | None = None) -> Student:
    """Read an exported folder back; safetensors only, and none of the folder's code is run.

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
    index, scheduler = _open_configs(path)
    steps = _trained_steps(path, index, scheduler)
    net_class = index["unet"][1]
    if net_class not in FAMILIES:
        raise ValueError(
            f"{path / 'model_index.json'}: no family for {net_class}; known: {', '.join(sorted(FAMILIES))}"
        )
    net = _load_net(path / "unet", net_class)
    family = family_for(net, scheduler)
    schedule = family.schedule(scheduler)
    sampler = Sampler(trailing(steps), _rule(scheduler, index))
    student = Student(sampler, net.eval(), schedule, family.kind(scheduler), family.call(scheduler))
    if opened is not None:
        theirs, teacher = family.sample_shape(stand_in(net, scheduler), None), opened.denoiser
        if theirs != opened.sample_shape:
            raise ValueError(f"{path}: samples of shape {theirs}, but the teacher's are {opened.sample_shape}")
        if net.config.num_class_embeds != teacher.net.config.num_class_embeds:
            raise ValueError(f"{path}: class labels differ from the teacher's; it was distilled from another one")
        if not same_table(schedule, teacher.schedule):
            raise ValueError(f"{path}: noise table differs from the teacher's; it was distilled from another one")
    return student


# Rules and schedulers


def _rule(scheduler: SchedulerMixin, index: dict[str, Any]) -> Ddim | Renoise | Tcd:
    if isinstance(scheduler, DDIMScheduler):
        return Ddim()
    if isinstance(scheduler, LCMScheduler):
        return Renoise()
    gamma = index.get("gamma")
    return Tcd(0.3 if gamma is None else gamma, scheduler.config.num_train_timesteps)  # 0.3: TCDScheduler.step's own


# What stands in the folder


def _index(student: Student, opened: Opened, scheduler: SchedulerMixin, conditional: bool) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", _NET_CLASS],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    if conditional:
        rule = student.sampler.rule
        index |= {
            "_class_name": ["pipeline", "ClassConditionalPipeline"],
            "null_label": None if opened.null is None else int(opened.null["class_labels"]),
            "trained_steps": [student.sampler.steps],
            "gamma": rule.gamma if isinstance(rule, Tcd) else None,
        }
    return index


def _sampling_lines(where: str, conditional: bool, steps: int) -> str:
    place = json.dumps(where, ensure_ascii=False)
    if conditional:
        load = "path, custom_pipeline=path, trust_remote_code=True, use_safetensors=True"
        call = "class_labels=[0, 1]"
        note = f"  # {steps} step{'s' * (steps > 1)}"
    else:
        load, call, note = "path, use_safetensors=True", f"batch_size=2, num_inference_steps={steps}", ""
    return (
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        "\n"
        f"path = {place}\n"
        f"pipe = DiffusionPipeline.from_pretrained({load})\n"
        f"images = pipe({call}, generator=torch.Generator().manual_seed(0)).images{note}\n"
    )


def _card(student: Student, scheduler: SchedulerMixin, lines: str, teacher: str, method: str | None) -> str:
    k, rule = student.sampler.steps, student.sampler.rule
    conditional = student.net.config.num_class_embeds is not None
    timesteps = ", ".join(str(t) for t in even_timesteps(k, scheduler.config.num_train_timesteps))
    steps = f"{k} step{'s' * (k > 1)}"
    if conditional:
        note = (
            "`pipeline.py` in this folder is the pipeline's code; diffusers runs it only with "
            "`trust_remote_code=True`, from a local folder too. It refuses any other number of steps."
        )
    else:
        note = f"A stock `DDIMPipeline`: always pass `num_inference_steps={k}`, its own default is 50."
    return (
        "---\n"
        "library_name: diffusers\n"
        "tags:\n"
        "- stepdistill\n"
        "- step-distillation\n"
        "---\n"
        "\n"
        f"# {teacher}, in {steps}\n"
        "\n"
        f"A student distilled from `{teacher}` that samples in {steps}.\n"
        "\n"
        "| | |\n"
        "|---|---|\n"
        f"| teacher | {teacher} |\n"
        f"| method | {method or 'not recorded'} |\n"
        f"| steps | {k} |\n"
        f"| timesteps | {timesteps} |\n"
        f"| step rule | {rule} as {type(scheduler).__name__} |\n"
        f"| prediction | {scheduler.config.prediction_type} |\n"
        "| guidance | built in: leave it at 1 |\n"
        "| licence | as the teacher |\n"
        "\n"
        f"```python\n{lines}```\n"
        "\n"
        f"{note}\n"
    )


def _public_name(source: str | None, opened: Opened) -> str:
    """A hub id or name as it is; of a folder its last part only, since cards are published and paths are private."""
    source = source or opened.pipeline.name_or_path or type(opened.pipeline).__name__  # the last for live pipelines
    return Path(source).resolve().name if Path(source).exists() or Path(source).is_absolute() else source


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Writing whole or not at all


def _replaceable(path: Path) -> bool:
    """Nothing, an empty folder or an exported student; never a teacher or anybody's files."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return True
    if not (path / "model_index.json").is_file():
        return False
    if _read_json(path / "model_index.json").get("trained_steps"):
        return True
    config = path / "scheduler" / "scheduler_config.json"
    return config.is_file() and bool(_read_json(config).get("_trained_steps"))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place when the block ends well."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a killed process that had this id
        aside.mkdir()
        yield aside
        for root, _, files in os.walk(aside):
            for name in (*files, "."):
                _fsync(Path(root, name))
        _swap(aside, path)
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and has its own exception for a full disk
        number = error.errno if isinstance(error, OSError) else None
        number = number or (errno.ENOSPC if "os error 28" in str(error) else errno.EIO)
        reason = str(error).strip().splitlines()[0]
        raise OSError(number, f"could not write {path}: {reason}; nothing already there was lost") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    replaces = path.exists()
    if replaces:
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if replaces:
            os.replace(old, path)
        raise
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # the new one is in place; a leftover is not worth failing for


def _fsync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give the folder of an exported student, or export it again")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text or of its encoding
        raise ValueError(f"{file} is damaged ({error}); export the student again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged (not a JSON object); export the student again")
    return value


def _open_configs(path: Path) -> tuple[dict[str, Any], SchedulerMixin]:
    """The pipeline's config and its scheduler, both checked."""
    file = path / "model_index.json"
    index = _read_json(file)
    match index:
        case {"unet": [_, str()], "scheduler": [_, str(name)]}:
            pass
        case _:
            raise ValueError(f"{file}: no unet and scheduler in it; give the folder of an exported student")
    if name not in _SCHEDULERS:
        raise ValueError(f"{file}: {name} is no student's scheduler; students have {', '.join(_SCHEDULERS)}")
    file = path / "scheduler" / "scheduler_config.json"
    config = _read_json(file)
    try:
        scheduler = _SCHEDULERS[name].from_config(config)
    except Exception as error:  # whatever a constructor makes of damaged values
        raise ValueError(f"{file}: {name} cannot be made of it ({error}); export the student again") from error
    return index, scheduler


def _trained_steps(path: Path, index: dict[str, Any], scheduler: SchedulerMixin) -> int:
    """The trained step count, which the scheduler must turn into the trained timesteps."""
    trained = index.get("trained_steps", scheduler.config.get("_trained_steps"))  # only students have either
    match trained:
        case [int(steps)] if steps > 0:
            pass
        case _:
            raise ValueError(f"{path}: trained_steps {trained}, so this is no few-step student; open it as a teacher")
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


def _load_net(folder: Path, net_class: str) -> nn.Module:
    config, file = _read_json(folder / "config.json"), folder / WEIGHTS
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
