"""A recipe: everything a run depends on, in one typed value that prints, saves and reads back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import stepdistill.objectives  # noqa: F401 (a recipe.json may name any of them)
from stepdistill.data import Data
from stepdistill.objective import Objective, with_networks
from stepdistill.placement import Placement
from stepdistill.sampling import Sampler
from stepdistill.trainer import AdamW, Run

NEIGHBOURS = 5
"""Of precision and recall; an evaluation needs more images than that."""


@dataclass(frozen=True)
class Teacher:
    """The pretrained pipeline to distil."""

    source: str
    """A local folder, a hub id, or ``bundled:NAME`` for a teacher under assets/."""
    guidance: float = 1.0
    """Guidance that the student takes over, as pipelines' ``guidance_scale``; 1 is none. Networks that are told it as
    an input, such as FLUX.1 dev, are told this; give them the value they are used with, 3.5 say."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance acts, as fractions."""
    custom_pipeline: str | None = None
    """File with the pipeline's class, where diffusers has none."""
    guidance_range: tuple[float, float] | None = None
    """A scale for each sample, uniform between these two, in place of ``guidance``."""
    negative: str = ""
    """The prompt that guidance leads away from."""
    size: tuple[int, ...] = ()
    """Pixels of samples: height and width, or frames, height and width; empty takes the pipeline's default."""
    lora: str | None = None
    """A LoRA of your own, file or folder, that belongs to the teacher: it is added to the pipeline's weights."""
    lora_scale: float = 1.0
    """Its strength."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.guidance_range is not None and not 0 <= self.guidance_range[0] <= self.guidance_range[1] < math.inf:
            raise ValueError(
                f"teacher.guidance_range must be two scales that do not fall, from 0; got {list(self.guidance_range)}"
            )
        if any(side < 1 for side in self.size):
            raise ValueError(f"teacher.size must be pixels; got {list(self.size)}")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"teacher.interval must be two rising fractions in [0, 1]; got {list(self.interval)}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"teacher.guidance must be at least 0, and 1 is none; got {self.guidance}")


@dataclass(frozen=True)
class Weights:
    """How a network of the run is made out of the teacher's."""

    form: Literal["full", "lora"] = "full"
    """A copy with all weights free, or LoRA adapters on the teacher's own frozen network. All who are adapters share
    that network: with both student and critic so, a run holds one network instead of three."""
    rank: int = 16
    """Of LoRA updates."""
    alpha: float = 0.0
    """Scale of LoRA updates is alpha / rank; 0 takes the rank."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that LoRA adapts; empty takes the family's."""
    own_base: bool = False
    """Put LoRA adapters on a copy of the teacher's network: the same training for one network more in memory, to
    compare with."""
    layers: int = 0
    """Blocks of a transformer, or layers in each block of a UNet, kept of the teacher's, evenly spaced; 0 keeps all."""
    told_guidance: bool = False
    """Give a UNet the guidance scale as an input (LCM's omega): one student for all of ``teacher.guidance_range``."""
    freeze: tuple[str, ...] = ()
    """Ends of the names of the layers whose weights stay as they start. In a UNet ("conv1", "conv2", "conv") are the
    convolutions inside its blocks and between them, without shortcuts and the first and last (GDD-I)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1; got {self.rank}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0, or 0 for the rank's own value; got {self.alpha}")
        if self.layers < 0:
            raise ValueError(f"layers must be at least 1, or 0 for all; got {self.layers}")
        if self.form == "lora" and (self.layers or self.told_guidance):
            raise ValueError("a LoRA changes no network: layers and told_guidance need form 'full'")
        if self.form == "full" and self.own_base:
            raise ValueError("own_base is for adapters: it needs form 'lora'")
        if self.form == "lora" and self.freeze:
            raise ValueError(f"a LoRA freezes the whole network: freeze {list(self.freeze)} needs form 'full'")


@dataclass(frozen=True)
class Heads:
    """The discriminator, for methods that have one."""

    backbone: Literal["teacher", "critic", "judge", "vgg16_bn"] = "teacher"
    """Whose features are read: the frozen teacher's (LADD), the critic's, which moves along (DMD2), or those of a
    frozen network on the images that samples decode to (GDD): "judge", the bundled benchmark's own classifier, or
    torchvision's VGG16-BN, whose weights torchvision downloads. A Frechet distance flatters a student whose
    discriminator reads the features that it is measured in: after "judge" the benchmark's own says little, and after
    "vgg16_bn" those of other ImageNet networks, FID among them, say less than they seem to."""
    taps: tuple[str, ...] = ()
    """Submodules to read; empty takes the family's."""
    width: int = 64
    """Channels inside each head."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.width < 1:
            raise ValueError(f"heads.width must be at least 1; got {self.width}")


@dataclass(frozen=True)
class Evaluation:
    """What is measured at the end of a run, teacher and student on the same noise, and at intervals on the way."""

    n: int = 5000
    """Images; Frechet distances of different n never compare."""
    seeds: tuple[int, ...] = (0,)
    """Sampling seeds; two or more give error bars."""
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Step counts at which the teacher is shown beside the student."""
    every: int = 0
    """Training steps between evaluations of the averaged student, on noise of their own; 0 only at the end."""
    keep_best: str = ""
    """The metric by which the best of these evaluations becomes the run's student, fd say; empty takes the last."""
    patience: int = 0
    """Evaluations without a better ``keep_best`` after which training stops; 0 trains to the end."""
    judge: str = ""
    """For a teacher of your own: ``file.py:function``, a function that takes the opened teacher and ``n`` and returns
    an ``Evaluator``; empty takes the bundled benchmark that fits the teacher. It is called before training, to find
    what is missing, and again where it judges."""

    def __post_init__(self) -> None:
        """Check ranges here: it is used only when all training is done."""
        for name in ("every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name} must be at least 0; got {getattr(self, name)}")
        if self.keep_best and not self.every:
            raise ValueError(f"evaluation.keep_best {self.keep_best!r} needs evaluation.every, the steps in between")
        if self.patience and not self.keep_best:
            raise ValueError(f"evaluation.patience {self.patience} needs evaluation.keep_best, the metric to improve")
        if self.n <= NEIGHBOURS:
            raise ValueError(f"evaluation.n must be larger than {NEIGHBOURS}, the neighbours looked at; got {self.n}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**31 for s in self.seeds):
            raise ValueError(f"evaluation.seeds must be different numbers from 0 to 2^31 - 1; got {list(self.seeds)}")
        if not self.teacher_steps or min(self.teacher_steps) < 1:
            raise ValueError(f"evaluation.teacher_steps must be step counts from 1; got {list(self.teacher_steps)}")
        check_judge("evaluation.judge", self.judge)


def check_judge(field: str, judge: str) -> None:
    """A judge is named as ``file.py:function``, or not at all.

    Raises:
        ValueError: naming the field.
    """
    if judge and not re.fullmatch(r".+\.py:\w+", judge):
        raise ValueError(f"{field} must be file.py:function, or empty for the bundled benchmarks; got {judge!r}")


@dataclass(frozen=True)
class Recipe:
    """A teacher, a method, data and a schedule."""

    teacher: Teacher
    objective: Objective
    data: Data
    optim: dict[str, AdamW]
    """One per network that the objective moves."""
    sampler: Sampler = field(default_factory=Sampler)
    """The few-step sampler that the student is trained for and exported with."""
    run: Run = field(default_factory=Run)
    placement: Placement = field(default_factory=Placement)
    student: Weights = field(default_factory=Weights)
    critic: Weights = field(default_factory=Weights)
    null_rate: float = 0.0
    """Share of conditions replaced by the null condition: a student that has learned it too can be guided, and takes
    negative prompts, as its teacher. Goes with ``teacher.guidance`` 1."""
    heads: Heads = field(default_factory=Heads)
    evaluation: Evaluation | None = None
    """None measures nothing; on the command line any option of it switches it on."""
    warm_start: Recipe | None = None
    """A recipe to run first; its student is where this one starts. Chains make stages, each kept."""

    def __post_init__(self) -> None:
        """Check what needs no network."""
        missing = sorted(self.objective.data - self.data.provides)
        if missing:
            raise ValueError(
                f"objective {type(self.objective).__name__} needs data with {missing}, and data "
                f"{type(self.data).__name__} gives {sorted(self.data.provides) or 'conditions only'}"
            )
        movers = {name for turn in self.objective.turns() for name in turn.moves}
        if not movers <= set(self.optim) <= movers | self.objective.optional:
            raise ValueError(
                f"optim must have one entry for each network that {type(self.objective).__name__} moves: "
                f"{sorted(movers)}; got {sorted(self.optim)}"
            )
        with_networks(self.objective, lambda lpips: lpips)  # refuses those that stand in the wrong place
        self.objective.check(self.sampler)
        self.objective.check_start(self.sampler, self.warm_start.sampler if self.warm_start else None)
        if "disc" in self.players and self.heads.backbone == "critic" and "critic" not in self.objective.needs:
            method = type(self.objective).__name__
            raise ValueError(f"heads.backbone is 'critic', and {method} has no critic; use 'teacher'")
        self.data.check(self.sampler)
        if not 0 <= self.null_rate < 1:
            raise ValueError(f"null_rate must lie in [0, 1); got {self.null_rate}")
        guided = self.teacher.guidance != 1 or self.teacher.guidance_range is not None
        if guided and not self.objective.guides:
            raise ValueError(
                f"teacher.guidance would be lost: {type(self.objective).__name__} never asks the guided teacher; use "
                "guidance 1, or another objective"
            )
        self.objective.check_guidance(
            guided=guided, varies=self.teacher.guidance_range is not None, told=self.student.told_guidance
        )
        if self.null_rate and guided:
            raise ValueError("null_rate keeps guidance for inference, so teacher.guidance must be 1, without a range")
        if self.null_rate and "path" in self.objective.data:
            raise ValueError(
                f"null_rate would part the trajectories of {type(self.data).__name__} from their conditions; put empty "
                "prompts among the data's own instead"
            )
        if self.teacher.guidance_range is not None and "path" in self.objective.data:
            raise ValueError(
                f"teacher.guidance_range: the trajectories of {type(self.data).__name__} are made under one scale; use "
                "teacher.guidance, or another objective"
            )
        if self.student.told_guidance and self.teacher.guidance_range is None:
            raise ValueError("student.told_guidance needs teacher.guidance_range, the scales it shall learn")
        moved = sorted(movers & set(self.placement.offload))
        if moved:
            raise ValueError(f"placement.offload {moved[0]!r}: an optimizer moves it, so it stays on the device")
        if self.warm_start is not None and self.warm_start.student.form == "full" and self.student.form == "lora":
            raise ValueError("student.form is 'lora', and its warm start's is 'full'; let both be the same")
        if self.warm_start is not None and self.warm_start.teacher.source != self.teacher.source:
            raise ValueError(
                f"warm_start.teacher.source must be this recipe's own, {self.teacher.source!r}; "
                f"got {self.warm_start.teacher.source!r}"
            )

    @property
    def players(self) -> dict[str, AdamW]:
        """The entries of ``optim`` that the objective moves; a switched-off term's is left aside."""
        movers = {name for turn in self.objective.turns() for name in turn.moves}
        return {name: spec for name, spec in self.optim.items() if name in movers}

    def stages(self) -> list[Recipe]:
        """This recipe behind its warm starts, in the order they run."""
        return [*(self.warm_start.stages() if self.warm_start else []), self]

    def to_json(self) -> str:
        """Everything, readable by ``from_json``."""
        return json.dumps(encode(self), indent=2)

    @classmethod
    def from_json(cls, text: str, source: str = "recipe") -> Recipe:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: naming the field, the value and what was expected.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets without end
            raise ValueError(f"{source}: not JSON ({error})") from error
        try:
            return decode(value, cls, "recipe")
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a ``recipe.json``."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not text ({error})") from error
        return cls.from_json(text, str(path))


def encode(value: Any) -> Any:
    """A dataclass tree as JSON values; every dataclass names its type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {
            f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    return value


def decode(value: Any, expected: Any, where: str) -> Any:
    """The inverse of ``encode`` for a declared type; ``where`` names the field in errors.

    Raises:
        ValueError: on an unknown type or field, a missing field, or a wrong type.
    """
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (only,) = [a for a in args if a is not type(None)]
        return decode(value, only, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: {value!r} is none of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        kinds = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ValueError(f"{where}: expected {len(kinds)} values, got {len(value)}")
        return tuple(decode(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        return {k: decode(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if expected is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{where}: expected a number below 1e308, got one of {len(str(value))} digits") from error
    if expected in (bool, int, float, str):
        if type(value) is not expected:
            raise ValueError(f"{where}: expected {expected.__name__}, got {value!r}")
        return value
    return _decode_dataclass(value, expected, where)


def _subclasses(base: type) -> dict[str, type]:
    """What may stand in a field declared by a base class, such as ``Times``, or by a class of its own."""
    found = {} if getattr(base, "__abstractmethods__", None) else {base.__name__: base}
    for sub in base.__subclasses__():
        found |= _subclasses(sub)
    return found


def _decode_dataclass(value: Any, expected: type, where: str) -> Any:
    known = _subclasses(expected)
    if isinstance(value, dict) and not isinstance(value.get("type", ""), str):
        raise ValueError(f"{where}.type: expected a name, got {value['type']!r}")
    if not isinstance(value, dict) or value.get("type", expected.__name__) not in known:
        name = value.get("type") if isinstance(value, dict) else value
        hint = "; a method of your own is known once its file is: name file.py instead" if expected is Objective else ""
        raise ValueError(f"{where}: {name!r} is no {expected.__name__}{suggest(str(name), known)}{hint}")
    cls = known[value.get("type", expected.__name__)]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [k for k in value if k != "type" and k not in fields]
    if unknown:
        raise ValueError(f"{where}.{unknown[0]}: no such field of {cls.__name__}{suggest(unknown[0], fields)}")
    given = {k: decode(v, hints[k], f"{where}.{k}") for k, v in value.items() if k != "type"}
    needed = [
        name
        for name, f in fields.items()
        if name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise ValueError(f"{where}.{needed[0]}: missing field of {cls.__name__}")
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """``; did you mean X?`` or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
