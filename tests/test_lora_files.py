"""LoRA files: read by others as they were written, and others' read here with no key left out."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.lora_files import (
    DIFFUSERS_FILE,
    KOHYA,
    KOHYA_FILE,
    PEFT_FILE,
    fuse_lora_file,
    kohya_state,
    layers_of,
    read_lora,
    save_lora,
)
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.lora import Adapted, merged_state
from stepdistill.sampling import Ddim, Sampler, trailing
from stepdistill.student import Student
from tests.tiny import flux, pixart, qwen_image, sd, sd3, sdxl, unet2d, z_image

TINY: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": sd.pipeline,
    "sdxl": sdxl.pipeline,
    "sd3": sd3.pipeline,
    "pixart": pixart.pipeline,
    "qwen_image": qwen_image.pipeline,
    "z_image": z_image.pipeline,
    "flux": flux.pipeline,
    "unet2d": unet2d.pipeline,
}
RANK, ALPHA = 4, 6.0


def student_of(opened: Opened, targets: tuple[str, ...] = ()) -> Student:
    """A LoRA student whose updates are not small."""
    d = opened.denoiser
    net = Adapted(d.net, RANK, ALPHA, targets or opened.family.lora_targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn_like(p))
    return Student(Sampler(trailing(2), Ddim()), net, d.schedule, d.kind, d.call)


def written(family: str, folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The merged weights of a LoRA student, and where its files are."""
    opened = open_pipeline(TINY[family]())
    student = student_of(opened)
    return merged_state(student.net), save_lora(student, opened, folder / "lora", teacher="teacher")


def network(pipeline: DiffusionPipeline) -> nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def assert_equal(net: nn.Module, want: dict[str, Tensor], atol: float = 1e-6) -> None:
    state = net.state_dict()
    assert state.keys() == want.keys()
    for name, value in want.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=atol, msg=lambda text, name=name: name + text)


# Written here, read by others


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_diffusers_reads_a_lora_with_its_alpha(tmp_path: Path, family: str) -> None:
    want, folder = written(family, tmp_path)
    pipeline = TINY[family]()
    pipeline.load_lora_weights(folder)  # the folder's other file does not get in its way
    layers = [m for m in network(pipeline).modules() if hasattr(m, "lora_alpha")]
    assert layers
    assert {a for m in layers for a in m.lora_alpha.values()} == {ALPHA}
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert_equal(network(pipeline), want)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_diffusers_reads_the_kohya_file_of_a_unet_too(tmp_path: Path, family: str) -> None:
    """Its reader of kohya's names knows all of the layers that a student adapts by default."""
    want, folder = written(family, tmp_path)
    pipeline = TINY[family]()
    pipeline.load_lora_weights(folder, weight_name=KOHYA_FILE)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert_equal(network(pipeline), want)


@pytest.mark.parametrize("family", ["pixart", "unet2d"])
def test_peft_reads_the_lora_of_a_pipeline_without_a_loader(tmp_path: Path, family: str) -> None:
    want, folder = written(family, tmp_path)
    pipeline = TINY[family]()
    assert not hasattr(pipeline, "load_lora_weights")
    assert_equal(PeftModel.from_pretrained(network(pipeline), folder).merge_and_unload(), want)


def test_kohyas_flux_is_one_layer_for_all_that_see_the_same() -> None:
    """Diffusers takes it apart again; it does so at FLUX.1's own width alone, hence no network here."""
    torch.manual_seed(0)
    widths = {}
    for kind, ends in {
        "transformer_blocks.3": {
            "attn.to_q": (3072, 3072), "attn.to_k": (3072, 3072), "attn.to_v": (3072, 3072),
            "attn.add_q_proj": (3072, 3072), "attn.add_k_proj": (3072, 3072), "attn.add_v_proj": (3072, 3072),
            "attn.to_out.0": (3072, 3072), "attn.to_add_out": (3072, 3072), "ff.net.0.proj": (3072, 12288),
            "ff.net.2": (12288, 3072), "ff_context.net.0.proj": (3072, 12288), "ff_context.net.2": (12288, 3072),
            "norm1.linear": (3072, 18432), "norm1_context.linear": (3072, 18432),
        },
        "single_transformer_blocks.7": {
            "attn.to_q": (3072, 3072), "attn.to_k": (3072, 3072), "attn.to_v": (3072, 3072),
            "proj_mlp": (3072, 12288), "proj_out": (15360, 3072), "norm.linear": (3072, 9216),
        },
    }.items():  # fmt: skip
        widths |= {f"{kind}.{end}": shape for end, shape in ends.items()}
    layers = {n: (torch.randn(RANK, i), torch.randn(o, RANK)) for n, (i, o) in widths.items()}
    outs = {name: out for name, (_, out) in widths.items()}
    state = kohya_state(layers, ALPHA, "flux", outs)
    assert len(state) == 3 * (2 + 8 + 1 + 2)
    read = FluxPipeline.lora_state_dict(dict(state))
    assert len(read) == 2 * len(layers)
    for name, (down, up) in layers.items():
        a, b = (read[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close((b @ a)[:64], ALPHA / RANK * (up @ down)[:64], rtol=1e-5, atol=1e-4)

    some = {n: pair for n, pair in layers.items() if n.endswith(("to_q", "to_v"))}
    read = FluxPipeline.lora_state_dict(kohya_state(some, ALPHA, "flux", outs))
    for name in layers:
        key = f"transformer.{name}.lora_B.weight"
        if name in some:
            torch.testing.assert_close(read[key], some[name][1])
        else:
            assert key not in read or not read[key].any()


def test_kohyas_flux_comes_back_where_widths_do_not_matter(tmp_path: Path) -> None:
    """Its last layer too, which diffusers' loader drops in silence."""
    opened = open_pipeline(flux.pipeline())
    student = student_of(opened, ("transformer_blocks.0.attn.to_k", "transformer_blocks.1.ff.net.2", "proj_out"))
    assert "proj_out" in layers_of(student.net)
    folder = save_lora(student, opened, tmp_path / "lora")
    pipeline = flux.pipeline()
    fuse_lora_file(pipeline, folder / KOHYA_FILE)
    assert_equal(pipeline.transformer, merged_state(student.net))


def test_unknown_names_are_said(tmp_path: Path) -> None:
    layers = {"proj_in": (torch.zeros(1, 4), torch.zeros(4, 1))}
    with pytest.raises(ValueError, match=r"no LoRA names for the family wan; they do for sd, sdxl, flux"):
        kohya_state(layers, 1.0, "wan", {})
    with pytest.raises(ValueError, match=r"kohya's scripts have no name for the layer proj_in"):
        kohya_state(layers, 1.0, "flux", {})
    _, folder = written("unet2d", tmp_path)
    assert not (folder / KOHYA_FILE).exists()
    assert "no LoRA names for the family unet2d" in (folder / "README.md").read_text()


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    _, folder = written("sd", tmp_path)
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    assert names == ["README.md", KOHYA_FILE, DIFFUSERS_FILE, "scheduler/scheduler_config.json"]
    card = (folder / "README.md").read_text()
    for fact in ("teacher, in 2 steps", "Rank 4, alpha 6", "num_inference_steps=2", "DDIMScheduler.from_pretrained"):
        assert fact in card
    assert len({f.stat().st_mode for f in folder.rglob("*") if f.is_file()}) == 1


def test_only_a_lora_is_written_and_only_over_one(tmp_path: Path) -> None:
    opened = open_pipeline(sd.pipeline())
    d = opened.denoiser
    with pytest.raises(ValueError, match=r"only a student of form 'lora' has adapters"):
        save_lora(Student(Sampler(), d.net, d.schedule, d.kind, d.call), opened, tmp_path / "lora")
    student = student_of(opened)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("three years of work")
    with pytest.raises(ValueError, match=r"work is there and holds no LoRA, so it is not replaced"):
        save_lora(student, opened, tmp_path / "work")
    folder = save_lora(student, opened, tmp_path / "lora")
    before = load_file(folder / DIFFUSERS_FILE)
    after = load_file(save_lora(student, opened, folder) / DIFFUSERS_FILE)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with torch.no_grad():
        next(student.net.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"LoRA weight .* is not finite"):
        save_lora(student, opened, folder)


@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_adapters_are_read_back(tmp_path: Path, family: str) -> None:
    opened = open_pipeline(TINY[family]())
    student = student_of(opened)
    folder = save_lora(student, opened, tmp_path / "lora")
    fresh = Adapted(opened.denoiser.net, RANK, ALPHA, opened.family.lora_targets)
    read_lora(fresh, folder)
    assert all(torch.equal(fresh.lora_state()[key], value) for key, value in student.net.lora_state().items())
    for rank, alpha, targets, what in (
        (RANK, 1.0, opened.family.lora_targets, "alpha"),
        (2, ALPHA, opened.family.lora_targets, r"lora_A.weight"),
        (RANK, ALPHA, ("to_q",), r"lora_A.weight"),
    ):
        other = Adapted(opened.denoiser.net, rank, alpha, targets)
        with pytest.raises(ValueError, match=rf"{what} differs from the adapters it is read into"):
            read_lora(other, folder)


# Others' files, fused into a teacher


@pytest.mark.parametrize("family", TINY)
def test_every_file_that_is_written_is_read_back(tmp_path: Path, family: str) -> None:
    want, folder = written(family, tmp_path)
    files = [folder, *(folder / name for name in (DIFFUSERS_FILE, PEFT_FILE) if (folder / name).exists())]
    if family in KOHYA and family != "flux":  # which diffusers reads at FLUX.1's own width alone
        files.append(folder / KOHYA_FILE)
        assert files[-1].exists()
    for file in files:
        pipeline = TINY[family]()
        fuse_lora_file(pipeline, file)
        assert_equal(network(pipeline), want)


def test_the_scale_is_a_factor(tmp_path: Path) -> None:
    want, folder = written("sd", tmp_path)
    bare, pipeline = sd.pipeline().unet.state_dict(), sd.pipeline()
    fuse_lora_file(pipeline, folder, scale=0.25)
    assert_equal(pipeline.unet, {name: bare[name] + 0.25 * (want[name] - bare[name]) for name in bare})


def test_a_lora_of_the_text_encoder_does_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    torch.manual_seed(2)
    state = {}
    for layer, module in sd.pipeline().text_encoder.named_modules():
        if isinstance(module, nn.Linear) and "proj" in layer:
            name = "lora_te_text_model_" + layer.replace(".", "_")
            state[f"{name}.lora_down.weight"] = torch.randn(2, module.in_features)
            state[f"{name}.lora_up.weight"] = torch.randn(module.out_features, 2)
            state[f"{name}.alpha"] = torch.tensor(1.0)
    for layer in ("down_blocks.0.attentions.0.proj_in", "mid_block.resnets.0.conv1"):
        shape, name = sd.pipeline().unet.get_submodule(layer).weight.shape, "lora_unet_" + layer.replace(".", "_")
        state[f"{name}.lora_down.weight"] = torch.randn(2, *shape[1:])
        state[f"{name}.lora_up.weight"] = torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
        state[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "own.safetensors")
    theirs, ours = sd.pipeline(), sd.pipeline()
    theirs.load_lora_weights(tmp_path, weight_name="own.safetensors")
    theirs.fuse_lora(lora_scale=0.5)
    theirs.unload_lora_weights()
    fuse_lora_file(ours, tmp_path / "own.safetensors", 0.5)
    assert_equal(ours.unet, theirs.unet.state_dict())
    assert_equal(ours.text_encoder, theirs.text_encoder.state_dict())
    one, other = (pipeline.encode_prompt("a", "cpu", 1, False)[0] for pipeline in (ours, sd.pipeline()))
    assert not torch.equal(one, other)


SETTINGS = [{"alpha_pattern": {"conv1": 2.0}}, {"use_rslora": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: next(iter(s)))
def test_settings_of_single_layers_count(tmp_path: Path, settings: dict) -> None:
    _, folder = written("sd", tmp_path)
    with safe_open(folder / DIFFUSERS_FILE, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    header |= {f"unet.{key}": value for key, value in settings.items()}
    save_file(
        load_file(folder / DIFFUSERS_FILE), tmp_path / "own.safetensors",
        {"format": "pt", "lora_adapter_metadata": json.dumps(header)},
    )  # fmt: skip
    theirs, ours = sd.pipeline(), sd.pipeline()
    theirs.load_lora_weights(tmp_path, weight_name="own.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    fuse_lora_file(ours, tmp_path / "own.safetensors")
    assert_equal(ours.unet, theirs.unet.state_dict())


def edited(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    state = load_file(file)
    edit(state)
    save_file(state, file.with_name("edited.safetensors"))
    return file.with_name("edited.safetensors")


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    def edit(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if old in key]:
            state[key.replace(old, new)] = state.pop(key)

    return edit


ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_ATTN = "lora_unet_" + ATTN.replace(".", "_")


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        (DIFFUSERS_FILE, rename(f"{ATTN}.lora_A", f"{ATTN}s.lora_A"), rf"has no partner {ATTN}|{ATTN}s.lora_B"),
        (DIFFUSERS_FILE, rename(f"{ATTN}.", f"{ATTN}s."), rf"key unet.{ATTN}s.lora_A.weight names no layer of UNet2D"),
        (DIFFUSERS_FILE, rename(f"unet.{ATTN}.", f"vea.{ATTN}."), r"vea.*(names no|belongs to no|fit no|dropped)"),
        (DIFFUSERS_FILE, lambda s: s.pop(f"unet.{ATTN}.lora_B.weight"), rf"{ATTN}.lora_A.weight has no partner"),
        (
            DIFFUSERS_FILE,
            lambda s: s.update({f"unet.{ATTN}.lora_A.weight": torch.ones(4, 20)}),
            rf"{ATTN}.lora_A.weight is \(4, 20\) and its lora_B \(8, 4\), but the layer in UNet2DConditionModel is "
            r"\(8, 8\); it is for another base model",
        ),
        (
            DIFFUSERS_FILE,
            lambda s: s.update({f"unet.{ATTN}.lora_B.weight": torch.ones(8, 3)}),
            rf"{ATTN}.lora_A.weight is \(4, 8\) and its lora_B \(8, 3\)",
        ),
        (DIFFUSERS_FILE, lambda s: s.update({f"unet.{ATTN}.dora_scale": torch.ones(8)}), r"dora_scale is no plain"),
        (KOHYA_FILE, lambda s: s.update({f"{KOHYA_ATTN}.dora_scale": torch.ones(8)}), r"dora_scale would be dropped"),
        (KOHYA_FILE, lambda s: s.update({f"{KOHYA_ATTN}s.alpha": torch.ones(())}), r"s.alpha belongs to no weight"),
        (KOHYA_FILE, rename(KOHYA_ATTN, KOHYA_ATTN + "s"), r"key unet.down_blocks.* names no layer of UNet2D"),
        (KOHYA_FILE, rename(f"{KOHYA_ATTN}.lora_up", f"{KOHYA_ATTN}.lora_pu"), r"keys fit no StableDiffusionPipeline"),
        (
            KOHYA_FILE,
            lambda s: s.update({f"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{way}.weight": torch.ones(1, 1)
                                for way in ("down", "up")}),
            r"key text_encoder_2.* belongs to no part of StableDiffusionPipeline",
        ),
    ],
)  # fmt: skip
def test_a_key_that_is_not_used_is_an_error_and_nothing_is_changed(
    tmp_path: Path, name: str, edit: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    _, folder = written("sd", tmp_path)
    pipeline = sd.pipeline()
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    with pytest.raises(ValueError, match=says) as caught:
        fuse_lora_file(pipeline, edited(folder / name, edit))
    assert "\n" not in str(caught.value)
    assert "edited.safetensors" in str(caught.value)
    assert_equal(pipeline.unet, before, atol=0)


def test_a_lora_of_another_base_model_is_refused(tmp_path: Path) -> None:
    _, folder = written("sdxl", tmp_path)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*; it is for another base model"):
        fuse_lora_file(sd.pipeline(), folder)
    with pytest.raises(ValueError, match=r"key unet\..* of StableDiffusion3Pipeline|fit no StableDiffusion3Pipeline"):
        fuse_lora_file(sd3.pipeline(), folder)


def test_a_file_that_is_not_there_or_no_lora_is_one_line(tmp_path: Path) -> None:
    pipeline = sd.pipeline()
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file; give a .safetensors file"):
        fuse_lora_file(pipeline, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no .safetensors files there"):
        fuse_lora_file(pipeline, tmp_path)
    (tmp_path / "own.bin").write_bytes(pickle.dumps([0] * 99))
    with pytest.raises(ValueError, match=r"own.bin: not a .safetensors file, and pickles are never opened"):
        fuse_lora_file(pipeline, tmp_path / "own.bin")
    (tmp_path / "own.safetensors").write_bytes(b"\x00" * 99)
    with pytest.raises(ValueError, match=r"own.safetensors: damaged"):
        fuse_lora_file(pipeline, tmp_path / "own.safetensors")


def test_layers_are_told_apart_by_role() -> None:
    """A critic on the same network is nobody's business."""
    opened = open_pipeline(sd.pipeline())
    student = student_of(opened)
    Adapted(opened.denoiser.net, 2, 2.0, ("to_q",))
    layers = layers_of(student.net)
    assert all(len(down) == RANK for down, _ in layers.values())
    assert not any("base_layer" in name or "role" in name for name in layers)
