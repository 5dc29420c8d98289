"""The README.md of an exported student: what it is, how good, under which licence, and the code that samples it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from stepdistill.evaluation.records import Record
from stepdistill.evaluation.tables import markdown_table, metrics_of

PROMPT = "a lighthouse on a cliff"
GRID = "samples.png"
_GENERATOR = "generator=torch.Generator().manual_seed(0)"
_START, _END = "<!-- figures -->", "<!-- end of figures -->"


def loading_code(where: str, index: Mapping[str, Any], record: Mapping[str, Any] | None, steps: int) -> str:
    """The lines of Python that load and sample an exported student, without this library.

    Args:
        where: the folder, as it shall stand in them.
        index: its model_index.json.
        record: what its scheduler remembers (``stock.call_record``); None where its pipeline's own code does.
        steps: the trained number of steps.
    """
    options = ["path", *(f"{name}=None" for name in absent_parts(index)), "use_safetensors=True"]
    sampling = (
        sampling_code(record)
        if record
        else (f"images = pipe(class_labels=[0, 1], {_GENERATOR}).images  # {steps} step{'s' * (steps > 1)}\n")
    )
    if record is None:
        options[1:1] = ["custom_pipeline=path", "trust_remote_code=True"]
    return (
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        "\n"
        f"path = {json.dumps(where, ensure_ascii=False)}\n"
        f"pipe = DiffusionPipeline.from_pretrained({', '.join(options)})\n"
        f"{sampling}"
    )


def lora_code(pipeline: DiffusionPipeline, module: str, scheduler: SchedulerMixin, where: str, teacher: str) -> str:
    """The lines of Python that load a LoRA folder and its teacher and sample them, without this library.

    Args:
        pipeline: the teacher.
        module: the part of it that the LoRA is for.
        scheduler: an exported student's.
        where: the folder, as it shall stand in them.
        teacher: its name, likewise.
    """
    absent = [n for n, part in pipeline.components.items() if part is None and n not in pipeline._optional_components]
    options = ["teacher", *(f"{name}=None" for name in absent), "use_safetensors=True"]
    own = hasattr(pipeline, "load_lora_weights")
    load = (
        'pipe.load_lora_weights(path, weight_name="pytorch_lora_weights.safetensors")'
        if own
        else f"pipe.{module} = PeftModel.from_pretrained(pipe.{module}, path).merge_and_unload()"
    )
    name = type(scheduler).__name__
    return (
        "import torch\n"
        f"from diffusers import DiffusionPipeline, {name}\n"
        f"{'' if own else 'from peft import PeftModel' + chr(10)}"
        "\n"
        f"teacher, path = {json.dumps(teacher, ensure_ascii=False)}, {json.dumps(where, ensure_ascii=False)}\n"
        f"pipe = DiffusionPipeline.from_pretrained({', '.join(options)})\n"
        f"{load}\n"
        f'pipe.scheduler = {name}.from_pretrained(path, subfolder="scheduler")\n'
        f"{sampling_code(scheduler.config['_student'])}"
    )


def sampling_code(record: Mapping[str, Any]) -> str:
    """The call of a loaded pipeline, ``pipe``, that a scheduler remembers (``stock.call_record``)."""
    conditions = {"prompt": json.dumps(PROMPT), "class_labels": "[0, 1]", "batch_size": "2"}[record["takes"]]
    arguments = [
        f"{record['takes']}={conditions}",
        *(f"{name}={value!r}" for name, value in record["call"].items()),
        _GENERATOR,
    ]
    made = "frames" if "num_frames" in record["call"] else "images"
    line = f"{made} = pipe({', '.join(arguments)}).{made}"
    if len(line) > 110:
        line = f"{made} = pipe(\n" + "".join(f"    {argument},\n" for argument in arguments) + f").{made}"
    seeding = "" if record["seeded"] else "torch.manual_seed(0)  # the noise between steps is drawn from here\n"
    return f"{seeding}{line}\n"


def absent_parts(index: Mapping[str, Any]) -> list[str]:
    """Parts that a pipeline goes without and that its class asks for all the same, such as the T5 of SD3."""
    cls = index["_class_name"]
    optional = [] if isinstance(cls, list) else getattr(diffusers, cls)._optional_components
    return [name for name, part in index.items() if part == [None, None] and name not in optional]


def public_name(source: str | None, pipeline: DiffusionPipeline) -> str:
    """A hub id or name as it is; of a folder its last part only, since cards are published and paths are private."""
    source = source or pipeline.name_or_path or type(pipeline).__name__  # the last for live pipelines
    return Path(source).resolve().name if Path(source).exists() or Path(source).is_absolute() else source


@dataclass(frozen=True)
class Card:
    """What a card says."""

    teacher: str
    method: str | None
    steps: int
    timesteps: Sequence[float]
    """At which the network is called."""
    rule: str
    prediction: str
    guidance: str
    code: str
    notes: str
    tag: str | None = None
    """The hub's name for the task."""
    licence: Mapping[str, str] = field(default_factory=dict)
    """The teacher's, as the head of its own card has it."""
    variant: str | None = None

    def text(self) -> str:
        """Markdown."""
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        head = {"library_name": "diffusers"} | dict(self.licence)
        if self.teacher.count("/") == 1:
            head["base_model"] = self.teacher
        if self.tag is not None:
            head["pipeline_tag"] = self.tag
        rows = {
            "teacher": self.teacher,
            "method": self.method or "not recorded",
            "steps": str(self.steps),
            "timesteps": ", ".join(f"{t:.6g}" for t in self.timesteps),
            "step rule": self.rule,
            "prediction": self.prediction,
            "guidance": self.guidance,
            "licence": self._licence(),
        }
        if self.variant is not None:
            dtype = {"fp16": "float16", "bf16": "bfloat16"}[self.variant]
            rows["half precision"] = (
                f'beside the float32 weights: `from_pretrained(path, variant="{self.variant}", dtype=torch.{dtype})`'
            )
        return (
            "---\n"
            + "".join(f"{key}: {value}\n" for key, value in head.items())
            + "tags:\n- stepdistill\n- step-distillation\n---\n\n"
            f"# {self.teacher}, in {steps}\n\n"
            f"A student distilled from `{self.teacher}` that samples in {steps}.\n\n"
            "| | |\n|---|---|\n"
            + "".join(f"| {key} | {value} |\n" for key, value in rows.items())
            + f"\n```python\n{self.code}```\n\n{self.notes}\n\n{_START}\n{_END}\n"
        )

    def _licence(self) -> str:
        if not self.licence:
            return "as the teacher"
        name = self.licence.get("license_name", self.licence.get("license", ""))
        link = self.licence.get("license_link", "")
        return f"{name}, the teacher's" + (f" ({link})" if link else "")


def with_figures(card: str, records: Sequence[Record], grid: bool) -> str:
    """A card with a table of results and the grid picture in place of those it had.

    Raises:
        ValueError: if it has no place for them, or records do not belong into one table.
    """
    head, start, rest = card.partition(_START)
    _, end, tail = rest.partition(_END)
    if not start or not end:
        raise ValueError(f"the card has no {_START} ... {_END}, where figures go; export the student again")
    parts = []
    if records:
        parts.append("## Results\n\n" + markdown_table(records, metrics_of(records)))
        first = records[0]
        versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
        parts.append(f"{first.n} images per seed, seeds {first.seeds}; {first.device}; {first.date}; {versions}.\n")
    if grid:
        parts.append(f"## Samples\n\n![samples]({GRID})\n")
    return f"{head}{_START}\n{chr(10).join(parts)}{_END}{tail}"


def licence_of(pipeline: DiffusionPipeline) -> dict[str, str]:
    """The licence lines at the head of the README.md of the folder that a pipeline is from; {} where there are none."""
    card = Path(pipeline.name_or_path or "") / "README.md"
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    head = text[4:].partition("\n---")[0] if text.startswith("---\n") else ""
    pairs = (line.partition(":") for line in head.splitlines())
    return {key: value.strip() for key, _, value in pairs if key in ("license", "license_name", "license_link")}
