"""Every family, every form of export, every number of steps: loaded elsewhere, the images are the same.

One process that knows diffusers and PEFT but not this library runs the code that stands in each README.md.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import stepdistill
from stepdistill.build import new_network
from stepdistill.export import load_student, save_pipeline
from stepdistill.lora_files import save_lora
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.lora import Adapted, bare_state
from stepdistill.recipe import Weights
from stepdistill.sampling import Ddim, Renoise, Sampler, StepRule, Tcd, sample_rngs, trailing
from stepdistill.student import Student

RULES: dict[str, StepRule] = {
    "sd": Renoise(),
    "sdxl": Tcd(0.3),
    "sd3": Ddim(),
    "flux": Ddim(),
    "pixart": Ddim(),
    "unet2d": Ddim(),
}
STEPS = (1, 2, 4)
PROMPTS = ["a red star", "on white"]
CASES = [(family, steps) for family in RULES for steps in STEPS]
IMAGE, HALF = 1e-5, 1e-2
"""Largest differences of images in [0, 1]: between float32 ways to the same image (measured: 1.2e-6), and to half
precision (2.6e-3)."""

ELSEWHERE = """
import json, sys
import numpy as np
import torch
from diffusers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
images, said = {}, {}
for name, job in json.load(open("jobs.json")).items():
    rngs = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
    space = {"rngs": rngs}
    if job["noise"] is not None:
        for rng in rngs:
            torch.randn(job["shape"], generator=rng)  # as the noise was drawn
        space["latents"] = torch.from_numpy(np.load("noise.npz")[job["noise"]]).to(getattr(torch, job["dtype"]))
    exec(job["code"], space)
    images[name] = np.asarray(space["images"], dtype=np.float32)
    said[name] = space["pipe"].scheduler.timesteps.tolist()
said["modules"] = [m for m in sys.modules if m.split(".")[0] == "stepdistill"]
np.savez("images.npz", **images)
json.dump(said, open("said.json", "w"))
"""


def tiny(family: str) -> Opened:
    """A live teacher whose one-step images are not all black and white, as an untrained eps-network's are."""
    module = importlib.import_module(f"tests.tiny.{family}")
    pipeline = module.pipeline()
    if "beta_schedule" in pipeline.scheduler.config:
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        pipeline.register_modules(
            scheduler=DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
        )
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return open_pipeline(pipeline, size=None if family == "unet2d" else (16, 16))


def student_of(opened: Opened, form: str, steps: int, rule: StepRule, net: nn.Module | None = None) -> Student:
    d = opened.denoiser
    return Student(Sampler(trailing(steps), rule), net or moved(opened, form), d.schedule, d.kind, d.call)


@torch.no_grad()
def moved(opened: Opened, form: str) -> nn.Module:
    """A student's network that has gone some way from its teacher's."""
    torch.manual_seed(1)
    net = new_network(opened, Weights(form, rank=4, alpha=8.0)).eval()
    for p in net.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return net


def images_of(student: Student, opened: Opened) -> Tensor:
    """Its samples as this library makes them, in [0, 1]."""
    cond = {} if opened.family.encode is None else opened.encode(PROMPTS)
    return (opened.decode(student.sample((2, *opened.sample_shape), cond, seed=0)) / 2 + 0.5).clamp(0, 1)


def code_of(folder: Path) -> str:
    """The code in a card, for two samples from given noise."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = re.sub(r'prompt="[^"]*"', f"prompt={PROMPTS}", code)
    return code.replace("generator=torch.Generator().manual_seed(0)", 'generator=rngs, output_type="np"')


@dataclass
class Elsewhere:
    folder: Path
    images: dict[str, np.ndarray] = field(default_factory=dict)
    said: dict[str, list] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    """Images that were made before the export."""
    touched: list[str] = field(default_factory=list)
    """Weights of live teachers that exporting has changed."""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    made = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    jobs: dict[str, dict] = {}
    noises: dict[str, np.ndarray] = {}
    for family in RULES:
        export(family, made, jobs, noises)
    np.savez(made.folder / "noise.npz", **noises)
    (made.folder / "jobs.json").write_text(json.dumps(jobs))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=made.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made.images = dict(np.load(made.folder / "images.npz"))
    made.said = json.loads((made.folder / "said.json").read_text())
    yield made


def export(family: str, made: Elsewhere, jobs: dict[str, dict], noises: dict[str, np.ndarray]) -> None:
    opened, rule, folder = tiny(family), RULES[family], made.folder
    opened.pipeline.save_pretrained(folder / f"{family}-teacher")
    before = {name: value.clone() for name, value in bare_state(opened.denoiser.net).items()}
    full, lora = moved(opened, "full"), moved(opened, "lora")
    noise = randn_tensor((2, *opened.sample_shape), sample_rngs(0, range(2)), torch.device("cpu"), torch.float32)
    noises[family] = opened.family.pack(noise).numpy()

    def add(name: str, code: str, dtype: str = "float32") -> None:
        takes = family != "unet2d"  # DDIMPipeline draws the same noise itself
        jobs[name] = {
            "code": code.replace("generator=rngs", "generator=rngs, latents=latents") if takes else code,
            "seeds": [rng.initial_seed() for rng in sample_rngs(0, range(2))],
            "shape": (1, *opened.sample_shape),
            "noise": family if takes else None,
            "dtype": dtype,
        }

    rules = [(str(steps), steps, rule) for steps in STEPS]
    if family == "flux":
        rules.append(("renoise", 4, Renoise()))
    for label, steps, way in rules:
        name = f"{family}-{label}"
        student, adapted = (student_of(opened, "", steps, way, net) for net in (full, lora))
        save_pipeline(student, opened, folder / f"{name}-full", variant="fp16")
        save_pipeline(adapted, opened, folder / f"{name}-fused")
        save_lora(adapted, opened, folder / f"{name}-lora", teacher=f"{family}-teacher")
        for form in ("full", "fused", "lora"):
            add(f"{name}-{form}", code_of(folder / f"{name}-{form}"))
        half = 'use_safetensors=True, variant="fp16", dtype=torch.float16'
        add(f"{name}-fp16", code_of(folder / f"{name}-full").replace("use_safetensors=True", half), "float16")
        made.memory |= {f"{name}-full": images_of(student, opened), f"{name}-fused": images_of(adapted, opened)}
    made.memory[f"{family}-teacher"] = images_of(student_of(opened, "", 4, Ddim(), opened.denoiser.net), opened)
    after = bare_state(opened.denoiser.net)
    made.touched += [name for name, value in before.items() if not torch.equal(value, after[name])]


def sampled(elsewhere: Elsewhere, name: str) -> np.ndarray:
    wanted = 2 if name.startswith("unet2d") else PROMPTS
    return stepdistill.sample(elsewhere.folder / name, wanted, output="float").movedim(1, -1).numpy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def test_nobody_else_knows_this_library(elsewhere: Elsewhere) -> None:
    assert elsewhere.said["modules"] == []


def test_exporting_changes_nothing_in_a_live_teacher(elsewhere: Elsewhere) -> None:
    assert elsewhere.touched == []


@pytest.mark.parametrize("form", ["full", "fused"])
@pytest.mark.parametrize(("family", "steps"), CASES)
def test_a_pipeline_gives_the_same_images_elsewhere(elsewhere: Elsewhere, family: str, steps: int, form: str) -> None:
    """Bit for bit as ``stepdistill.sample``, and within rounding as the student did before it was exported."""
    name = f"{family}-{steps}-{form}"
    ours, theirs, memory = sampled(elsewhere, name), elsewhere.images[name], elsewhere.memory[name]
    assert np.array_equal(ours, theirs)
    assert difference(memory.movedim(1, -1).numpy(), theirs) < IMAGE
    assert ((theirs > 0) & (theirs < 1)).mean() > 0.3  # or clamping would hide a difference
    if steps == 4:
        assert (memory - elsewhere.memory[f"{family}-teacher"]).abs().max() > 0.02  # or it could be the teacher


@pytest.mark.parametrize(("family", "steps"), CASES)
def test_a_lora_gives_the_same_images_elsewhere(elsewhere: Elsewhere, family: str, steps: int) -> None:
    """On its teacher, by stock loaders; its alpha is not its rank."""
    name = f"{family}-{steps}"
    assert difference(elsewhere.images[f"{name}-lora"], elsewhere.images[f"{name}-fused"]) < IMAGE


@pytest.mark.parametrize(("family", "steps"), CASES)
def test_half_precision_gives_nearly_the_same_images_elsewhere(elsewhere: Elsewhere, family: str, steps: int) -> None:
    name = f"{family}-{steps}"
    apart = difference(elsewhere.images[f"{name}-fp16"], elsewhere.images[f"{name}-full"])
    assert 0 < apart < HALF


@pytest.mark.parametrize("form", ["full", "fused"])
def test_noise_that_a_flow_pipeline_draws_itself_is_the_same_elsewhere(elsewhere: Elsewhere, form: str) -> None:
    """It draws it in another order than this library, from torch's own generator, which the card sets."""
    name = f"flux-renoise-{form}"
    assert np.array_equal(sampled(elsewhere, name), elsewhere.images[name])
    assert difference(elsewhere.images[name], elsewhere.images[f"flux-4-{form}"]) > 0.01


@pytest.mark.parametrize(("family", "steps"), CASES)
def test_the_saved_scheduler_alone_yields_the_trained_times(elsewhere: Elsewhere, family: str, steps: int) -> None:
    table = [1000 * (1 - i / steps) for i in range(steps)]
    wanted = table if family in ("sd3", "flux") else [t - 1 for t in table]
    for form in ("full", "fused", "lora", "fp16"):
        assert np.allclose(elsewhere.said[f"{family}-{steps}-{form}"], wanted, atol=1e-2)


@pytest.mark.parametrize(("family", "steps"), CASES)
def test_a_student_comes_back(elsewhere: Elsewhere, family: str, steps: int) -> None:
    opened = tiny(family)
    back = load_student(elsewhere.folder / f"{family}-{steps}-fused", opened=opened)
    assert back.sampler == Sampler(trailing(steps), RULES[family])
    assert not isinstance(back.net, Adapted)
    assert (images_of(back, opened) - elsewhere.memory[f"{family}-{steps}-fused"]).abs().max() < IMAGE


# All other families, within this process


OTHERS = sorted({p.stem for p in (Path(__file__).parent / "tiny").glob("[a-z]*.py")} - RULES.keys())


@pytest.mark.parametrize("family", OTHERS)
def test_the_stock_pipeline_of_every_other_family_samples_its_students(tmp_path: Path, family: str) -> None:
    module = importlib.import_module(f"tests.tiny.{family}")
    pipeline = module.pipeline()
    default = (16, 16) if hasattr(pipeline, "default_sample_size") else None  # which no folder remembers
    opened = open_pipeline(pipeline, size=getattr(module, "SIZE", default))
    rule = Renoise() if family == "edm" else Ddim()
    student = student_of(opened, "full", 2, rule)
    folder = save_pipeline(student, opened, tmp_path / "student")
    assert load_student(folder, opened=opened).sampler == student.sampler
    if opened.family.encode is None:
        cond = opened.family.examples(opened.pipeline, 2)
        wanted = cond["class_labels"].tolist() if cond else 2
    else:
        cond, wanted = opened.encode(PROMPTS), PROMPTS
    ours = (opened.decode(student.sample((2, *opened.sample_shape), cond, seed=0)) / 2 + 0.5).clamp(0, 1)
    theirs = stepdistill.sample(folder, wanted, output="float")
    if theirs.ndim == 5:  # (B, T, C, H, W), and ours (B, C, T, H, W)
        theirs = theirs.transpose(1, 2)
    assert ((theirs > 0) & (theirs < 1)).float().mean() > 0.3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)
