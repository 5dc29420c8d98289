"""Students as diffusers pipeline folders: written whole or not at all, sampled anywhere without this library.

The scheduler's config alone yields the trained timesteps, so a folder samples the way its student was trained. The
pipeline's class is the teacher's; class-conditional ``UNet2DModel`` students, which diffusers has no class for, carry
their pipeline's code, and unconditional ones are a stock ``DDIMPipeline``.
"""

from __future__ import annotations

import copy
import inspect
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from stepdistill.build import plain_network
from stepdistill.checkpoint import write_atomically
from stepdistill.editing import Inverter
from stepdistill.evaluation.records import Record
from stepdistill.exported import WEIGHTS, load_lines, load_net, load_student, stand_in
from stepdistill.folders import empty, make_public, read_json, replacing, write_json
from stepdistill.model_card import GRID, Card, licence_of, loading_code, public_name, with_figures
from stepdistill.models.families.base import Opened
from stepdistill.models.families.loading import component_class
from stepdistill.models.lora import network_of
from stepdistill.models.surgery import unadapted
from stepdistill.models.two_time import TwoTime
from stepdistill.paths import project_dir
from stepdistill.sampling import Tcd
from stepdistill.stock import has_own_pipeline, stock_scheduler, stock_times
from stepdistill.student import Student

__all__ = [
    "WEIGHTS",
    "add_figures",
    "check_exportable",
    "load_inverter",
    "load_lines",
    "load_student",
    "save_pipeline",
    "stand_in",
]

Variant = Literal["fp16", "bf16"]
"""Weights in half precision, beside those in float32."""

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_INVERTER = "inverter"  # folder of its network, and in there the name of its settings
_EDITING = (
    "`inverter/` holds the network that leads real images back to their noise: see `load_inverter` of "
    "`stepdistill.export`, and `invert` and `edit` of `stepdistill.editing`."
)
_PIPELINE_FILE = "class_conditional.py"  # in pipelines/; the folder's copy is pipeline.py, where diffusers looks for it


def check_exportable(student: Student, opened: Opened) -> None:
    """Make sure, before training it, that diffusers will be able to sample a student as it is trained.

    Args:
        student: its network's class, its sampler, schedule and kind count; its weights do not.
        opened: the teacher.

    Raises:
        ValueError: if its network cannot be exported, or no stock scheduler goes its way; names the cure.
    """
    net, wanted = network_of(student.net), opened.family.net_class
    if type(net).__name__ != wanted:
        raise ValueError(f"the student's network is a {type(net).__name__}; export writes the teacher's {wanted} only")
    stock_scheduler(student, opened)


def save_pipeline(
    student: Student,
    opened: Opened,
    path: str | Path,
    *,
    teacher: str | None = None,
    method: str | None = None,
    guidance: float | None = None,
    variant: Variant | None = None,
    records: Sequence[Record] = (),
    grid: str | Path | None = None,
    inverter: Inverter | None = None,
) -> Path:
    """Write a student as a diffusers pipeline folder; the live pipeline is left as it is.

    Weights keep their dtype; autocast of the student is not exported. A LoRA student's updates are added to the
    teacher's weights, and the second time of a student of two times becomes part of its embedding of the first, which
    is then right at the trained timesteps and nowhere else.

    Args:
        student: the network to write, and the sampler that it was trained for.
        opened: the teacher: its pipeline's other parts, its noise table and its null condition.
        path: the folder; an exported student that is already there is replaced, nothing else is. It holds the old
            folder or the whole new one, whatever happens.
        teacher: the teacher's name for the model card; None takes what it was loaded from. Of a folder, only its
            name is written.
        method: the method's name for the model card.
        guidance: the scale that calls shall pass, for students that are told it or can be guided; None is the
            family's, which is none, or the pipeline's default where the network is told it.
        variant: also write all weights in half precision, under diffusers' names for such variants.
        records: figures for the model card.
        grid: a PNG of samples for the model card.
        inverter: the network that leads back to the noise, written beside the student in float32; pipelines pass it by.

    Returns:
        The folder.

    Raises:
        ValueError: if no stock scheduler samples as the student does, a weight is not finite, or ``path`` holds
            something else than an exported student. Nothing is written then.
        FileNotFoundError: if the repository's pipelines/ is not there to copy from.
        OSError: if it cannot be written, as on a full disk; what was at ``path`` is untouched.
    """
    path = Path(os.path.realpath(path))  # through links, so that the folder is replaced and not the link
    check_exportable(student, opened)
    net = _finite(plain_network(student, opened), "student")
    back = None if inverter is None else _finite(unadapted(inverter.net), "inverter")
    scheduler = stock_scheduler(student, opened, guidance)
    code = project_dir("pipelines") / _PIPELINE_FILE if has_own_pipeline(opened) else None
    if not _replaceable(path):
        raise ValueError(f"{path} is there and holds no exported student, so it is not replaced; choose another path")

    with replacing(path) as folder:
        if code is not None:
            net.save_pretrained(folder / "unet", safe_serialization=True, max_shard_size="1000GB")  # one file
            scheduler.save_pretrained(folder / "scheduler")
            write_json(folder / "model_index.json", _own_index(student, opened, scheduler))
            shutil.copyfile(code, folder / "pipeline.py")
        else:
            pipeline = _exported(opened, net, scheduler)
            pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size="1000GB")
            _drop_foreign_keys(folder / "model_index.json", type(pipeline))
        if variant is not None:
            _add_variant(folder, variant)
        if inverter is not None:
            back.save_pretrained(folder / _INVERTER, safe_serialization=True, max_shard_size="1000GB")
            settings = {"edges": list(inverter.edges), "start": inverter.start}
            write_json(folder / _INVERTER / f"{_INVERTER}.json", settings)
        make_public(folder)
        card = _card(student, opened, folder, path.name, scheduler, public_name(teacher, opened.pipeline), method)
        notes = card.notes if inverter is None else f"{card.notes} {_EDITING}"
        (folder / "README.md").write_text(replace(card, variant=variant, notes=notes).text(), encoding="utf-8")
        if records or grid is not None:
            add_figures(folder, records, grid)
    return path


def load_inverter(path: str | Path, student: Student) -> Inverter:
    """Read the network that leads back to the noise, which ``save_pipeline`` wrote beside a student.

    Args:
        path: the exported folder.
        student: what ``load_student`` made of it.

    Returns:
        The inverter, in eval mode, on the CPU, in float32.

    Raises:
        FileNotFoundError: if there is none, or one of its files is missing.
        ValueError: if a file is damaged.
    """
    folder = Path(path) / _INVERTER
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: this student was trained without an inverter; ICD trains one")
    settings = read_json(folder / f"{_INVERTER}.json")
    match settings:
        case {"edges": [*edges], "start": float(start)} if all(isinstance(edge, float) for edge in edges):
            pass
        case _:
            raise ValueError(f"{folder / _INVERTER}.json: no edges and start in it; export the student again")
    net = load_net(folder, type(student.net).__name__)
    return Inverter(tuple(edges), start, net, student.schedule, student.kind, student.call).eval()


def add_figures(path: str | Path, records: Sequence[Record] = (), grid: str | Path | None = None) -> None:
    """Put results and a picture into an exported student's model card, in place of those it had.

    Args:
        path: the folder.
        records: of this student and what it stands beside; all in one table.
        grid: a PNG of samples, copied.

    Raises:
        FileNotFoundError: if there is no card or no picture.
        ValueError: if the card has no place for them, or the records do not belong into one table.
    """
    folder = Path(path)
    card = with_figures((folder / "README.md").read_text(encoding="utf-8"), records, grid is not None)
    if grid is not None:
        picture = Path(grid).read_bytes()
        write_atomically(folder / GRID, lambda aside: aside.write_bytes(picture))
    write_atomically(folder / "README.md", lambda aside: aside.write_text(card, encoding="utf-8"))


# What stands in the folder


def _finite(net: nn.Module, who: str) -> nn.Module:
    for name, value in net.state_dict().items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"weight {name} of the {who} is not finite; export an earlier checkpoint")
    return net


def _exported(opened: Opened, net: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
    """The teacher's pipeline with another network and scheduler; all other parts are shared with it."""
    if opened.family.name == "unet2d":
        return stand_in(net, scheduler)
    pipeline = copy.copy(opened.pipeline)
    pipeline.register_modules(**{opened.family.module: net, "scheduler": scheduler})
    return pipeline


def _drop_foreign_keys(file: Path, cls: type[DiffusionPipeline]) -> None:
    """Settings that the class does not know, such as a recorded max_sequence_length, would be warned about."""
    known = inspect.signature(cls.__init__).parameters
    index = read_json(file)
    write_json(file, {key: value for key, value in index.items() if key.startswith("_") or key in known})


def _add_variant(folder: Path, variant: Variant) -> None:
    """Half-precision copies of all weights in the folder; configs keep saying float32."""
    for name, part in read_json(folder / "model_index.json").items():
        config = folder / name / "config.json"
        if not (isinstance(part, list) and config.is_file()):
            continue
        text = config.read_bytes()
        cls = component_class(part)
        half = cls.from_pretrained(folder / name, dtype=_DTYPES[variant], use_safetensors=True)
        half.save_pretrained(folder / name, safe_serialization=True, variant=variant, max_shard_size="1000GB")
        config.write_bytes(text)


def _own_index(student: Student, opened: Opened, scheduler: SchedulerMixin) -> dict[str, Any]:
    rule = student.sampler.rule
    return {
        "_class_name": ["pipeline", "ClassConditionalPipeline"],
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", opened.family.net_class],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "null_label": None if opened.null is None else int(opened.null["class_labels"]),
        "trained_steps": [student.sampler.steps],
        "gamma": rule.gamma if isinstance(rule, Tcd) else None,
    }


def _card(
    student: Student,
    opened: Opened,
    folder: Path,
    name: str,
    scheduler: SchedulerMixin,
    teacher: str,
    method: str | None,
) -> Card:
    k, record = student.sampler.steps, scheduler.config.get("_student")
    if record is None:
        notes = (
            "`pipeline.py` in this folder is the pipeline's code; diffusers runs it only with "
            "`trust_remote_code=True`, from a local folder too. It refuses any other number of steps."
        )
    else:
        notes = (
            f"A stock `{read_json(folder / 'model_index.json')['_class_name']}`: always pass the arguments above, its "
            f"own defaults are for the teacher. The scheduler's config gives the trained timesteps for "
            f"`num_inference_steps={k}` alone."
        )
    if isinstance(student.net, TwoTime):
        notes += (
            " The network knew the time it heads for, too; that is folded into its embedding of time for the timesteps "
            "above, so its weights are of no use at others."
        )
    if opened.family.guidance_input(network_of(student.net)):
        guidance = "an input of the network, `guidance_scale`"
    elif record is not None and record["call"].get("guidance_scale", 1.0) != 1.0:
        guidance = "at inference, `guidance_scale` as above, negative prompts too"
    else:
        guidance = "built in: leave it at 1"
    stock_times(scheduler, student.schedule, k, opened.family.passes_sigmas)  # sets its timesteps
    return Card(
        teacher=teacher,
        method=method,
        steps=k,
        timesteps=scheduler.timesteps.tolist(),
        rule=f"{student.sampler.rule} as {type(scheduler).__name__}",
        prediction=scheduler.config.get("prediction_type", student.kind),
        guidance=guidance,
        code=loading_code(name, read_json(folder / "model_index.json"), record, k),
        notes=notes,
        tag="text-to-image" if opened.family.encode is not None and len(opened.sample_shape) == 3 else None,
        licence=licence_of(opened.pipeline),
    )


def _replaceable(path: Path) -> bool:
    """Nothing, an empty folder or an exported student; never a teacher or anybody's files."""
    if empty(path):
        return True
    if not (path / "model_index.json").is_file():
        return False
    if read_json(path / "model_index.json").get("trained_steps"):
        return True
    config = path / "scheduler" / "scheduler_config.json"
    return config.is_file() and bool(read_json(config).get("_trained_steps"))
