"""LoRA files: a student's adapters written for diffusers, ComfyUI and kohya; a user's own fused into a teacher."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepdistill.folders import empty, make_public, read_json, replacing
from stepdistill.model_card import licence_of, lora_code, public_name
from stepdistill.models.families.base import Opened, family_of
from stepdistill.models.lora import Adapted
from stepdistill.stock import stock_scheduler
from stepdistill.student import Student

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
KOHYA_FILE = "kohya_comfyui.safetensors"

_METADATA = "lora_adapter_metadata"  # key of the header under which diffusers keeps ranks and alphas
_PEFT_PREFIX = "base_model.model."

Layers = Mapping[str, tuple[Tensor, Tensor]]
"""LoRA weights (down, up) by the name of their layer."""


# Writing


def save_lora(
    student: Student, opened: Opened, folder: str | Path, *, teacher: str | None = None, guidance: float | None = None
) -> Path:
    """Write a LoRA student's adapters, without the network they belong to, for those who have it.

    The folder gets ``pytorch_lora_weights.safetensors`` with its alpha (for ``pipeline.load_lora_weights``), or, where
    the pipeline's class has no loader, a PEFT adapter (for ``PeftModel.from_pretrained``); the same for kohya's
    scripts and ComfyUI, if these know the family; the scheduler; and a README.md that says how to load them.

    Args:
        student: trained as a LoRA.
        opened: its teacher.
        folder: is replaced if it holds such files, and nothing else is.
        teacher: its name for the README; None takes what it was loaded from.
        guidance: as ``export.save_pipeline``'s.

    Returns:
        The folder.

    Raises:
        ValueError: if the student is no LoRA, a weight is not finite, or the folder holds something else.
        OSError: if it cannot be written; what was there is untouched.
    """
    net, path = student.net, Path(os.path.realpath(folder))
    if not isinstance(net, Adapted):
        raise ValueError("only a student of form 'lora' has adapters to write; a full one is exported as a pipeline")
    layers = layers_of(net)
    for name, pair in layers.items():
        if not all(bool(part.isfinite().all()) for part in pair):
            raise ValueError(f"LoRA weight {name} is not finite; export an earlier checkpoint")
    if not (empty(path) or any((path / name).is_file() for name in (DIFFUSERS_FILE, PEFT_FILE))):
        raise ValueError(f"{path} is there and holds no LoRA, so it is not replaced; choose another path")
    scheduler = stock_scheduler(student, opened, guidance)
    cls, module = type(opened.pipeline), opened.family.module
    widths = {n: m.out_features for n, m in net.backbone.named_modules() if hasattr(m, "out_features")}
    try:
        kohya: dict[str, Tensor] | str = kohya_state(layers, net.alpha, opened.family.name, widths)
    except ValueError as error:
        kohya = str(error)
    config = LoraConfig(r=net.rank, lora_alpha=net.alpha, target_modules=sorted(layers))
    with replacing(path) as aside:
        scheduler.save_pretrained(aside / "scheduler")
        if has_loader(opened.pipeline):
            metadata = {"r": net.rank, "lora_alpha": net.alpha, "target_modules": sorted(layers)}
            cls.save_lora_weights(
                aside,
                **{f"{module}_lora_layers": _peft_keys(layers), f"{module}_lora_adapter_metadata": metadata},
            )
        else:
            config.save_pretrained(aside)
            save_file(_peft_keys(layers, _PEFT_PREFIX), aside / PEFT_FILE, metadata={"format": "pt"})
        if isinstance(kohya, dict):
            save_file(kohya, aside / KOHYA_FILE, {"format": "pt"})
        make_public(aside)
        card = _readme(student, opened, scheduler, path.name, public_name(teacher, opened.pipeline), kohya)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return path


def read_lora(net: Adapted, source: str | Path) -> None:
    """Put what ``save_lora`` wrote back into adapters of the same layers, rank and alpha.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or of other adapters; names what differs.
    """
    file = find_lora(Path(source))
    state, header = _read(file)
    found = {key.split(".", 2 if key.startswith(_PEFT_PREFIX) else 1)[-1]: key for key in state}
    own = {key.replace("/", "."): key for key in net.state_dict()}
    alphas = {value for key, value in header.items() if key.rpartition(".")[2] == "lora_alpha"}
    wrong = sorted(found.keys() ^ own.keys()) or [
        key for key in own if state[found[key]].shape != net.state_dict()[own[key]].shape
    ]
    if wrong or alphas != {net.alpha}:
        raise ValueError(f"LoRA {file}: {wrong[0] if wrong else 'alpha'} differs from the adapters it is read into")
    net.load_state_dict({own[key]: state[found[key]] for key in own})


def has_loader(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline's class reads LoRA files."""
    return hasattr(pipeline, "load_lora_weights")


def layers_of(net: Adapted) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters of a network, on the CPU."""
    state = {key: value.detach().cpu().contiguous() for key, value in net.lora_state().items()}
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names}


def _peft_keys(layers: Layers, prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.lora_{part}.weight": value
        for name, pair in layers.items()
        for part, value in zip("AB", pair, strict=True)
    }


def kohya_state(layers: Layers, alpha: float, family: str, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """LoRA weights under the names that kohya's scripts and ComfyUI give to a family's layers.

    Args:
        layers: by diffusers' names.
        alpha: updates count ``alpha / rank``.
        family: name of the family.
        widths: outputs of the network's linear layers, of those without LoRA too.

    Raises:
        ValueError: if neither knows the family, or the layer.
    """
    if family not in KOHYA:
        raise ValueError(
            f"kohya's scripts and ComfyUI have no LoRA names for the family {family}; they do for {', '.join(KOHYA)}"
        )
    state: dict[str, Tensor] = {}
    for name, (down, up, own_alpha) in KOHYA[family](layers, alpha, widths).items():
        state[f"{name}.lora_down.weight"] = down.contiguous()
        state[f"{name}.lora_up.weight"] = up.contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(own_alpha))
    return state


Named = dict[str, tuple[Tensor, Tensor, float]]


def _unet_names(layers: Layers, alpha: float, widths: Mapping[str, int]) -> Named:
    """Kohya's, with the blocks of diffusers: read by kohya's scripts, ComfyUI and diffusers."""
    return {"lora_unet_" + name.replace(".", "_"): (*pair, alpha) for name, pair in layers.items()}


def _transformer_names(layers: Layers, alpha: float, widths: Mapping[str, int]) -> Named:
    """ComfyUI's for transformers of diffusers."""
    return {f"transformer.{name}": (*pair, alpha) for name, pair in layers.items()}


_FLUX_DOUBLE = {
    "img_attn_proj": "attn.to_out.0",
    "img_mlp_0": "ff.net.0.proj",
    "img_mlp_2": "ff.net.2",
    "img_mod_lin": "norm1.linear",
    "txt_attn_proj": "attn.to_add_out",
    "txt_mlp_0": "ff_context.net.0.proj",
    "txt_mlp_2": "ff_context.net.2",
    "txt_mod_lin": "norm1_context.linear",
}
_FLUX_SINGLE = {"linear2": "proj_out", "modulation_lin": "norm.linear"}
_FLUX_DOUBLE_FUSED = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_FLUX_SINGLE_FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


_FLUX_OUTSIDE = {"final_layer_linear": "proj_out", "img_in": "x_embedder", "txt_in": "context_embedder"}


def _flux_names(layers: Layers, alpha: float, widths: Mapping[str, int]) -> Named:
    """Kohya's, with the blocks of the original code, where layers that see the same are one: also read by diffusers."""
    named, left = Named(), dict(layers)
    rank = len(next(iter(layers.values()))[0])
    for theirs, ours in _FLUX_OUTSIDE.items():
        if ours in left:
            down, up = left.pop(ours)
            named[f"lora_unet_{theirs}"] = (down * (alpha / rank), up, rank)  # diffusers reads no alpha here
    blocks = {tuple(name.split(".", 2)[:2]) for name in left if name.partition(".")[0].endswith("transformer_blocks")}
    for kind, index in sorted(blocks):
        single = kind == "single_transformer_blocks"
        prefix = f"lora_unet_{'single' if single else 'double'}_blocks_{index}_"
        for theirs, ours in (_FLUX_SINGLE if single else _FLUX_DOUBLE).items():
            if f"{kind}.{index}.{ours}" in left:
                named[prefix + theirs] = (*left.pop(f"{kind}.{index}.{ours}"), alpha)
        for theirs, parts in (_FLUX_SINGLE_FUSED if single else _FLUX_DOUBLE_FUSED).items():
            names = [f"{kind}.{index}.{part}" for part in parts]
            pairs = {name: left.pop(name) for name in names if name in left}
            if pairs:
                none = torch.zeros_like(next(iter(pairs.values()))[0])
                fused = [pairs.get(name, (none, none.new_zeros(widths[name], rank))) for name in names]
                named[prefix + theirs] = (*_fused(fused), alpha * len(fused))
    if left:
        raise ValueError(f"kohya's scripts have no name for the layer {next(iter(left))}")
    return named


def _fused(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Adapters of layers with the same input as one on their concatenation, of the sum of their ranks."""
    downs, ups = zip(*pairs, strict=True)
    return torch.cat(downs), torch.block_diag(*ups)


KOHYA: dict[str, Callable[[Layers, float, Mapping[str, int]], Named]] = {
    "sd": _unet_names,
    "sdxl": _unet_names,
    "flux": _flux_names,
    "sd3": _transformer_names,
    "pixart": _transformer_names,
    "qwen_image": _transformer_names,
    "z_image": _transformer_names,
}
"""By family: (layers, alpha, widths) -> weights under the names that kohya's scripts, ComfyUI or both read."""


def _readme(
    student: Student,
    opened: Opened,
    scheduler: SchedulerMixin,
    folder: str,
    teacher: str,
    kohya: dict[str, Tensor] | str,
) -> str:
    net, steps = student.net, student.sampler.steps
    own = has_loader(opened.pipeline)
    files = f"`{DIFFUSERS_FILE}`" if own else f"`{PEFT_FILE}` (PEFT's, since the pipeline's class reads no LoRA)"
    also = f"`{KOHYA_FILE}` is the same for ComfyUI and kohya's scripts." if isinstance(kohya, dict) else f"{kohya}."
    code = ""
    if "_student" in scheduler.config:
        code = f"```python\n{lora_code(opened.pipeline, opened.family.module, scheduler, folder, teacher)}```\n\n"
    head = "".join(f"{key}: {value}\n" for key, value in licence_of(opened.pipeline).items())
    return (
        f"---\nlibrary_name: diffusers\n{head}tags:\n- lora\n- stepdistill\n- step-distillation\n---\n\n"
        f"# LoRA: {teacher}, in {steps} step{'s' * (steps > 1)}\n\n"
        f"Rank {net.rank}, alpha {net.alpha:g}, for scale 1: {files}. {also} `scheduler/` yields the trained timesteps."
        f"\n\n{code}"
        "Everything but the adapters is the teacher's, and so is the licence.\n"
    )


# Fusing


@torch.no_grad()
def fuse_lora_file(pipeline: DiffusionPipeline, source: str | Path, scale: float = 1.0) -> None:
    """Add a LoRA to a pipeline's weights, in place; all of it or, with an error, none.

    Args:
        pipeline: all of its parts may be meant, text encoders too.
        source: a .safetensors file, or a folder with one, with keys as diffusers, PEFT, kohya or ComfyUI write them.
        scale: its strength.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a key is not used, or a weight does not fit its layer; names the key.
    """
    file = find_lora(Path(source))
    state, header = _read(file)
    module = family_of(pipeline).module
    state = {_under(key, module, pipeline): value.float() for key, value in state.items()}
    state = _with_alphas(file, state)
    updates: list[tuple[nn.Parameter, Tensor]] = []
    for part, weights in _by_part(file, pipeline, state).items():
        settings = {key.removeprefix(f"{part}."): value for key, value in header.items() if key.startswith(f"{part}.")}
        if not settings and part == module:
            settings = {key: value for key, value in header.items() if "." not in key}  # PEFT's own
        updates += _updates(file, part, pipeline.components[part], weights, settings)
    for weight, update in updates:
        weight += scale * update


def find_lora(source: Path) -> Path:
    """The one LoRA file that ``source``, a file or a folder, stands for.

    Raises:
        FileNotFoundError: if there is none, or several.
        ValueError: if it is no safetensors file.
    """
    if source.is_dir():
        files = sorted(source.glob("*.safetensors"))
        named = [f for f in files if f.name in (DIFFUSERS_FILE, PEFT_FILE)]
        if len(named or files) != 1:
            raise FileNotFoundError(
                f"LoRA {source}: {'several' if files else 'no'} .safetensors files there, none of them "
                f"{DIFFUSERS_FILE}; name the file"
            )
        return (named or files)[0]
    if not source.is_file():
        raise FileNotFoundError(f"LoRA {source}: no such file; give a .safetensors file, or a folder with one")
    if source.suffix != ".safetensors":
        raise ValueError(f"LoRA {source}: not a .safetensors file, and pickles are never opened; convert it")
    return source


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and settings by ``PART.NAME`` (diffusers) or ``NAME`` (PEFT)."""
    try:
        with safe_open(file, framework="pt") as content:
            state = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a dict)
            header = json.loads((content.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"LoRA {file}: damaged ({error})") from error
    beside = file.parent / "adapter_config.json"
    if file.name == PEFT_FILE and beside.is_file():
        header = read_json(beside)
    return state, header


def _under(key: str, module: str, pipeline: DiffusionPipeline) -> str:
    """A key with its part of the pipeline in front, where PEFT or ComfyUI name none."""
    if key.startswith(_PEFT_PREFIX):
        key = f"{module}.{key.removeprefix(_PEFT_PREFIX)}"
    if key.partition(".")[0] in pipeline.components:
        key = key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
    return key


def _with_alphas(file: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the updates' scales, which kohya and ComfyUI write beside them, multiplied in."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".alpha")]:
        stem = key.removesuffix(".alpha")
        down = next((stem + end for end in (".lora_down.weight", ".lora_A.weight") if stem + end in state), None)
        if down is None:
            raise ValueError(f"LoRA {file}: {key} belongs to no weight in the file; it is damaged")
        state[down] = state[down] * (state.pop(key).item() / len(state[down]))
    return state


def _by_part(file: Path, pipeline: DiffusionPipeline, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights by part of the pipeline and PEFT's names for them."""
    if any(key.partition(".")[0] not in pipeline.components for key in state):
        state = _converted(file, pipeline, state)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, _, name = key.partition(".")
        if not isinstance(pipeline.components.get(part), nn.Module):
            raise ValueError(f"LoRA {file}: key {key} belongs to no part of {type(pipeline).__name__}")
        parts.setdefault(part, {})[name] = value
    for part, weights in parts.items():
        if part.startswith("text_encoder"):
            weights = convert_state_dict_to_peft(convert_state_dict_to_diffusers(weights))
            if not hasattr(pipeline.components[part], "text_model"):  # transformers 5 has flattened some
                weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
            parts[part] = weights
        else:
            parts[part] = convert_unet_state_dict_to_peft(weights)
    return parts


def _converted(file: Path, pipeline: DiffusionPipeline, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under diffusers' names, by its own converters, none of them left behind.

    Converters drop what they do not know. So each weight is also sent through as its number, and the numbers counted.
    """
    if not has_loader(pipeline):
        key = next(key for key in state if key.partition(".")[0] not in pipeline.components)
        raise ValueError(f"LoRA {file}: key {key} names no part of {type(pipeline).__name__}, which reads PEFT's names")
    module = family_of(pipeline).module  # converters leave it out of some names, which loaders then drop
    options = {"unet_config": pipeline.unet.config} if "unet" in pipeline.components else {}

    def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = type(pipeline).lora_state_dict(weights, **options)
        found = found[0] if isinstance(found, tuple) else found
        bare = {key for key in found if hasattr(pipeline.components[module], key.partition(".")[0])}
        return {f"{module}.{key}" if key in bare else key: value for key, value in found.items()}

    numbered = {key: torch.full_like(value, i + 1) for i, (key, value) in enumerate(state.items())}
    try:
        seen = {int(n) for value in convert(numbered).values() for n in value.unique().tolist()}
        converted = convert(dict(state))
    except Exception as error:  # whatever a converter makes of names it does not know
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"LoRA {file}: its keys fit no {type(pipeline).__name__} ({reason})") from error
    for i, key in enumerate(state):
        if i + 1 not in seen:
            raise ValueError(f"LoRA {file}: key {key} would be dropped; {type(pipeline).__name__} has no place for it")
    return converted


def _updates(
    file: Path, name: str, part: nn.Module, weights: dict[str, Tensor], settings: Mapping[str, Any]
) -> list[tuple[nn.Parameter, Tensor]]:
    """(weight, what is added to it) of every layer that is named; all names must be of one."""
    kind, layers = type(part).__name__, dict(part.named_modules())
    ends = {".lora_A.weight": ".lora_B.weight", ".lora_B.weight": ".lora_A.weight"}
    updates = []
    for key, down in weights.items():
        end = next((end for end in ends if key.endswith(end)), None)
        if end is None or settings.get("use_dora"):
            raise ValueError(f"LoRA {file}: key {name}.{key} is no plain LoRA weight, the one kind that is supported")
        layer = key.removesuffix(end)
        if layer + ends[end] not in weights:
            raise ValueError(f"LoRA {file}: key {name}.{key} has no partner {layer}{ends[end]}; the file is damaged")
        weight = getattr(layers.get(layer), "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"LoRA {file}: key {name}.{key} names no layer of {kind}; it is for another base model")
        if end == ".lora_B.weight":
            continue
        up, rank = weights[f"{layer}.lora_B.weight"], len(down)
        if up.shape[1] != rank or up.numel() != len(weight) * rank or down[0].numel() != weight[0].numel():
            raise ValueError(
                f"LoRA {file}: {name}.{key} is {tuple(down.shape)} and its lora_B {tuple(up.shape)}, but the layer in "
                f"{kind} is {tuple(weight.shape)}; it is for another base model, or damaged"
            )
        update = (up.flatten(1) @ down.flatten(1)).view_as(weight).to(weight)
        updates.append((weight, _scaling(settings, layer, rank) * update))
    return updates


def _scaling(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """Alpha / rank, as PEFT's settings have it; 1 without any."""
    if "lora_alpha" not in settings:
        return 1.0
    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), settings["lora_alpha"])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
