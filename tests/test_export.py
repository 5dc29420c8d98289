"""Exported students: sampled by diffusers alone, read back, and never half written."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import stepdistill
import stepdistill.paths
from stepdistill import export
from stepdistill.evaluation.records import Record, records_from_scores
from stepdistill.export import WEIGHTS, add_figures, check_exportable, load_lines, load_student, save_pipeline
from stepdistill.exported import load_exported
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.lora import Adapted
from stepdistill.models.surgery import told_guidance
from stepdistill.paths import project_dir
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Renoise, Sampler, StepRule, Tcd, sample, sample_rngs, trailing
from stepdistill.schedule import RectifiedFlow
from stepdistill.student import Student
from tests.tiny import dit, sd, sd3, unet2d

LABELS = torch.tensor([0, 3, 9, 10])
SHAPE = (4, 1, 8, 8)
SEED = 3
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
RULES: dict[str, StepRule] = {"ddim": Ddim(), "renoise": Renoise(), "tcd": Tcd(0.3)}
TIMESTEPS = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}


def tiny_net(classes: int | None = 11, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=classes,
    ).eval()


def conditional_pipeline(scheduler):
    spec = importlib.util.spec_from_file_location(
        "class_conditional", project_dir("pipelines") / "class_conditional.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClassConditionalPipeline(tiny_net(), scheduler, null_label=10)


def teacher(kind: str = "v", classes: int | None = 11, **config) -> Opened:
    """beta_end = 0.001 by default: x0 from an untrained eps-network stays within a few units, not 1/alpha_T = 157."""
    scheduler = DDIMScheduler(prediction_type=PREDICTIONS[kind], **{"beta_end": 0.001, "clip_sample": False, **config})
    return open_pipeline(
        DDIMPipeline(tiny_net(None), scheduler) if classes is None else conditional_pipeline(scheduler)
    )


def student_of(opened: Opened, steps: int = 4, rule: StepRule | None = None, seed: int = 1) -> Student:
    d = opened.denoiser
    net = tiny_net(d.net.config.num_class_embeds, seed)
    return Student(Sampler(trailing(steps), rule or Ddim()), net, d.schedule, d.kind, d.call)


def samples(student: Student) -> Tensor:
    cond = {} if student.net.config.num_class_embeds is None else {"class_labels": LABELS}
    return sample(student, SHAPE, cond, student.sampler, seed=SEED)


# Loaded by diffusers alone

ALONE = """
import json, sys
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
images, said = {}, {}
for name, job in json.load(open("jobs.json")).items():
    space = {}
    exec(job["lines"], space)
    pipe, steps = space["pipe"], job["steps"]
    pipe.set_progress_bar_config(disable=True)
    rngs = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
    said[name] = {"timesteps": pipe.scheduler.timesteps.tolist(), "images": len(space["images"])}
    if job["labels"] is None:
        images[name] = pipe(4, rngs, num_inference_steps=steps, output_type="pt").images
        continue
    images[name] = pipe(job["labels"], generator=rngs, output_type="latent").images
    try:
        pipe(0, num_inference_steps=steps + 1)
    except ValueError as error:
        said[name]["refused"] = str(error)
said["modules"] = [m for m in sys.modules if m.split(".")[0] == "stepdistill"]
save_file(images, "images.safetensors")
json.dump(said, open("said.json", "w"))
"""


@dataclass
class Exported:
    students: dict[str, Student]
    images: dict[str, Tensor]
    said: dict[str, dict]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """27 class-conditional and 6 unconditional students, all sampled by one process that knows diffusers only."""
    folder = tmp_path_factory.mktemp("exported")
    students: dict[str, Student] = {}
    for kind in PREDICTIONS:
        opened, plain = teacher(kind), teacher(kind, None)
        for steps in TIMESTEPS:
            for rule in RULES:
                students[f"{kind}-{rule}-{steps}"] = student_of(opened, steps, RULES[rule])
        students[f"{kind}-plain-4"] = student_of(plain, 4)
        students[f"{kind}-plain-1"] = student_of(plain, 1, Renoise())
        for name, student in students.items():
            if name.startswith(f"{kind}-"):
                save_pipeline(student, plain if "plain" in name else opened, folder / name)
    jobs = {
        name: {
            "lines": load_lines(folder / name),
            "steps": student.sampler.steps,
            "seeds": [rng.initial_seed() for rng in sample_rngs(SEED, range(4))],
            "labels": None if "plain" in name else LABELS.tolist(),
        }
        for name, student in students.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Exported(students, load_file(folder / "images.safetensors"), json.loads((folder / "said.json").read_text()))


CONDITIONAL = [f"{kind}-{rule}-{steps}" for kind in PREDICTIONS for rule in RULES for steps in TIMESTEPS]
PLAIN = [f"{kind}-plain-{steps}" for kind in PREDICTIONS for steps in (1, 4)]


def test_sampling_an_exported_student_does_not_import_this_library(exported: Exported) -> None:
    assert exported.said["modules"] == []


@pytest.mark.parametrize("name", CONDITIONAL)
def test_diffusers_samples_a_class_conditional_student_as_the_library_does(exported: Exported, name: str) -> None:
    """1e-5: coefficients are rounded from float64 here and computed in float32 by diffusers; measured 2e-6 at most."""
    torch.testing.assert_close(exported.images[name], samples(exported.students[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_the_stock_ddim_pipeline_samples_an_unconditional_student_as_the_library_does(
    exported: Exported, name: str
) -> None:
    want = samples(exported.students[name]) / 2 + 0.5
    assert ((want > 0) & (want < 1)).float().mean() > 0.3  # or clamping would hide a difference
    torch.testing.assert_close(exported.images[name], want.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*CONDITIONAL, *PLAIN])
def test_the_load_lines_sample_two_images_on_the_trained_timesteps(exported: Exported, name: str) -> None:
    assert exported.said[name]["timesteps"] == TIMESTEPS[int(name[-1])]
    assert exported.said[name]["images"] == 2


@pytest.mark.parametrize("steps", TIMESTEPS)
def test_an_exported_student_refuses_other_steps_and_names_its_grid(exported: Exported, steps: int) -> None:
    grid = ", ".join(str(t) for t in TIMESTEPS[steps])
    for rule in RULES:
        said = exported.said[f"v-{rule}-{steps}"]["refused"]
        assert f"num_inference_steps {steps + 1}: this student was trained for {steps} (timesteps {grid})" in said


def test_one_step_sampling_draws_nothing_but_its_start(exported: Exported) -> None:
    """All rules end in the clean estimate, so in one step they are one."""
    for rule in ("renoise", "tcd"):
        torch.testing.assert_close(exported.images[f"x0-{rule}-1"], exported.images["x0-ddim-1"], rtol=0, atol=1e-6)


# Read back


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize(
    ("kind", "rule"),
    [("v", Ddim()), ("v", Renoise()), ("v", Tcd(0.3)), ("v", Tcd(0.0)), ("eps", Tcd(1.0)), ("x0", Renoise())],
    ids=repr,
)
def test_a_student_comes_back_as_it_was(tmp_path: Path, kind: str, rule: StepRule, steps: int) -> None:
    opened = teacher(kind, beta_end=0.02)
    student = student_of(opened, steps, rule)
    back = load_student(save_pipeline(student, opened, tmp_path / "student"), opened=opened)
    assert (back.sampler, back.kind, back.dtype) == (student.sampler, student.kind, torch.float32)
    assert back.net.state_dict().keys() == student.net.state_dict().keys()
    t = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    assert torch.equal(back.schedule(t).alpha, student.schedule(t).alpha)
    if steps <= 4:
        assert torch.equal(samples(back), samples(student))


def test_an_unconditional_student_comes_back_and_remembers_its_steps(tmp_path: Path) -> None:
    """Even after the stock pipeline, which has no setting for it, saved it again."""
    opened = teacher(classes=None)
    student = student_of(opened, 4)
    save_pipeline(student, opened, tmp_path / "student")
    save_pipeline(student, opened, tmp_path / "student")  # over itself
    DDIMPipeline.from_pretrained(tmp_path / "student", use_safetensors=True).save_pretrained(tmp_path / "again")
    for name in ("student", "again"):
        back = load_student(tmp_path / name, opened=opened)
        assert back.sampler == student.sampler
        assert torch.equal(samples(back), samples(student))


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": torch.linspace(1e-4, 0.02, 100).tolist(), "num_train_timesteps": 100},
    ],
    ids=lambda c: next(iter(c)),
)
@pytest.mark.parametrize("rule", [Ddim(), Renoise(), Tcd(0.3)], ids=["ddim", "renoise", "tcd"])
def test_the_noise_table_is_the_teachers(tmp_path: Path, rule: StepRule, config: dict) -> None:
    opened = teacher(**config)
    rule = Tcd(0.3, config.get("num_train_timesteps", 1000)) if isinstance(rule, Tcd) else rule
    student = student_of(opened, 4, rule)
    back = load_student(save_pipeline(student, opened, tmp_path / "student"), opened=opened)
    assert torch.equal(samples(back), samples(student))


def test_a_table_that_ddim_has_no_name_for_is_written_out(tmp_path: Path) -> None:
    opened = open_pipeline(conditional_pipeline(DDPMScheduler(beta_schedule="sigmoid", prediction_type="v_prediction")))
    student = student_of(opened, 4, Renoise())
    back = load_student(save_pipeline(student, opened, tmp_path / "student"), opened=opened)
    assert torch.equal(samples(back), samples(student))


# The folder


@pytest.mark.parametrize("source", [lambda p: None, lambda p: str(p / "my-teacher")], ids=["loaded", "named"])
def test_no_file_names_this_machine(tmp_path: Path, source: Callable[[Path], str | None]) -> None:
    """Loading writes where a network came from into its config (_name_or_path), and diffusers would save that."""
    live = teacher()
    live.pipeline.save_pretrained(tmp_path / "my-teacher")
    code = str(project_dir("pipelines") / "class_conditional.py")
    opened = open_pipeline(tmp_path / "my-teacher", custom_pipeline=code)
    d = opened.denoiser
    assert "_name_or_path" in d.net.config
    student = Student(Sampler(trailing(4), Tcd(0.3)), d.net, d.schedule, d.kind, d.call)
    folder = save_pipeline(student, opened, tmp_path / "student", teacher=source(tmp_path), method="tscd")
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert sorted(files) == [
        "README.md",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
    ]
    for name, content in files.items():
        assert b"_name_or_path" not in content, name
        assert str(tmp_path).encode() not in content, name
        assert str(Path.home()).encode() not in content, name
    card = files["README.md"].decode()
    for fact in ("my-teacher, in 4 steps", "tscd", "999, 749, 499, 249", "as the teacher", 'path = "student"'):
        assert fact in card
    assert files["pipeline.py"] == Path(code).read_bytes()
    modes = {f.stat().st_mode for f in folder.rglob("*") if f.is_file()}
    assert len(modes) == 1  # safetensors alone would leave the weights unreadable for others


def test_weights_in_any_memory_format_are_exported(tmp_path: Path) -> None:
    opened = teacher()
    student = student_of(opened)
    student.net.to(memory_format=torch.channels_last)
    back = load_student(save_pipeline(student, opened, tmp_path / "student"))
    for name, value in student.net.state_dict().items():
        assert torch.equal(back.net.state_dict()[name], value)


# Refused, with nothing written


def flow_student(opened: Opened) -> Student:
    d = opened.denoiser
    return Student(Sampler(trailing(4), Ddim()), d.net, RectifiedFlow(), "velocity", d.call)


def broken_student(opened: Opened) -> Student:
    student = student_of(opened)
    student.net.conv_out.bias.data[0] = float("nan")
    return student


def on_grid(*times: float) -> Callable[[Opened], Student]:
    def make(opened: Opened) -> Student:
        d = opened.denoiser
        return Student(Sampler(times, Ddim()), d.net, d.schedule, d.kind, d.call)

    return make


@pytest.mark.parametrize(
    ("make", "classes", "says"),
    [
        (on_grid(1.0, 0.5, 0.25), 11, r"even steps from pure noise.*train on trailing\(K\) with K such as 1, 2, 4, 5"),
        (on_grid(0.4), 11, r"even steps from pure noise"),
        (lambda o: student_of(o, 3), 11, r"as divide their 1000 timesteps"),
        (lambda o: student_of(o, 4, Heun()), 11, r"rule Heun\(\) in 4 steps: no stock scheduler does that; use Ddim"),
        (lambda o: student_of(o, 4, DpmPP2M()), 11, r"rule DpmPP2M\(\) in 4 steps: no stock scheduler"),
        (lambda o: student_of(o, 1000, Renoise()), 11, r"rule Renoise\(\) in 1000 steps: no stock scheduler"),
        (lambda o: student_of(o, 4, Tcd(0.3, table=0)), 11, r"TCDScheduler rounds to its 1000 timesteps"),
        (lambda o: student_of(o, 4, Renoise()), None, r"no stock pipeline samples without classes so; use Ddim\(\)"),
        (lambda o: student_of(o, 1, Heun()), None, r"rule Heun\(\) in 1 steps: no stock scheduler"),
        (broken_student, 11, r"weight conv_out.bias of the student is not finite"),
        (flow_student, 11, r"schedule is RectifiedFlow"),
    ],
)
def test_what_no_stock_scheduler_samples_is_refused_before_anything_is_written(
    tmp_path: Path, make: Callable[[Opened], Student], classes: int | None, says: str
) -> None:
    opened = teacher(classes=classes)
    student = make(opened)
    with pytest.raises(ValueError, match=says) as caught:
        save_pipeline(student, opened, tmp_path / "student")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    if make is not broken_student:  # weights are not looked at before training
        with pytest.raises(ValueError, match=says):
            check_exportable(student, opened)


def test_a_table_that_is_not_its_configs_is_written_out(tmp_path: Path) -> None:
    """A scheduler changed by hand after its construction, as CogVideoX's changes itself."""
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    opened = open_pipeline(conditional_pipeline(scheduler))
    student = student_of(opened)
    back = load_student(save_pipeline(student, opened, tmp_path / "student"), opened=opened)
    torch.testing.assert_close(samples(back), samples(student), rtol=0, atol=1e-5)


def test_nothing_but_an_exported_student_is_ever_replaced(tmp_path: Path) -> None:
    """Not a folder of files, not a file, and not the teacher, which is a pipeline folder too."""
    opened = teacher()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("three years of work")
    opened.pipeline.save_pretrained(tmp_path / "teacher")
    before = contents(tmp_path)
    for path in (tmp_path / "work", tmp_path / "work" / "thesis.txt", tmp_path / "teacher"):
        with pytest.raises(ValueError, match=r"holds no exported student, so it is not replaced"):
            save_pipeline(student_of(opened), opened, path)
    assert contents(tmp_path) == before


# Whole or not at all


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def earlier(tmp_path: Path) -> Iterator[tuple[Opened, Path]]:
    opened = teacher()
    yield opened, save_pipeline(student_of(opened, seed=1), opened, tmp_path / "student")


def test_a_pipeline_is_replaced_whole(earlier: tuple[Opened, Path]) -> None:
    opened, path = earlier
    (path / "unet" / "stale.txt").write_text("of the earlier one")
    link = path.with_name("link")
    link.symlink_to(path)
    newer = student_of(opened, 2, seed=2)
    save_pipeline(newer, opened, link)
    assert torch.equal(samples(load_student(path)), samples(newer))
    assert not (path / "unet" / "stale.txt").exists()
    assert sorted(f.name for f in path.parent.iterdir()) == ["link", "student"]
    assert link.is_symlink()


def full_disk(*given, **options) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_safetensors(*given, **options) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("owner", "name", "fails"),
    [
        (os, "replace", full_disk),
        (os, "fsync", full_disk),
        (shutil, "copyfile", full_disk),
        (UNet2DModel, "save_pretrained", full_disk),
        (UNet2DModel, "save_pretrained", full_disk_in_safetensors),
    ],
    ids=["rename", "flush", "copy", "weights", "safetensors"],
)
def test_a_full_disk_leaves_the_earlier_pipeline_whole(
    earlier: tuple[Opened, Path], monkeypatch: pytest.MonkeyPatch, owner: object, name: str, fails: Callable
) -> None:
    opened, path = earlier
    before = contents(path.parent)
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(OSError, match=r"could not write .*student: .*No space left.*nothing already there") as caught:
        save_pipeline(student_of(opened, seed=2), opened, path)
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert contents(path.parent) == before


def test_a_failed_second_rename_puts_the_earlier_pipeline_back(
    earlier: tuple[Opened, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, path = earlier
    before, rename = contents(path.parent), os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).suffix == ".part":
            full_disk()
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=r"No space left"):
        save_pipeline(student_of(opened, seed=2), opened, path)
    assert contents(path.parent) == before


def test_a_full_disk_at_first_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = teacher()
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=r"could not write"):
        save_pipeline(student_of(opened), opened, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


# Damaged folders


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def truncate(path: Path) -> None:
    content = (path / "unet" / WEIGHTS).read_bytes()
    (path / "unet" / WEIGHTS).write_bytes(content[: len(content) // 2])


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(path / "unet" / WEIGHTS)
    edit(state)
    save_file(state, path / "unet" / WEIGHTS)


def edit_json(path: Path, file: str, **values) -> None:
    config = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("harm", "error", "says"),
    [
        (lambda p: shutil.rmtree(p), FileNotFoundError, r"model_index.json is missing; give the folder of an exported"),
        (lambda p: (p / "unet" / WEIGHTS).unlink(), FileNotFoundError, rf"{WEIGHTS} is missing; export"),
        (lambda p: (p / "unet" / "config.json").unlink(), FileNotFoundError, r"config.json is missing"),
        (truncate, ValueError, rf"{WEIGHTS} is damaged \(.*\); export the student again"),
        (lambda p: (p / "unet" / WEIGHTS).write_bytes(b""), ValueError, rf"{WEIGHTS} is damaged"),
        (lambda p: (p / "unet" / WEIGHTS).write_bytes(pickle.dumps([0] * 99)), ValueError, rf"{WEIGHTS} is damaged"),
        (
            lambda p: edit_weights(p, lambda s: s.update({"conv_in.bias": torch.zeros(3)})),
            ValueError,
            r"weight conv_in.bias is \(3,\), config.json says \(8,\)",
        ),
        (lambda p: edit_weights(p, lambda s: s.pop("conv_in.bias")), ValueError, r"weight conv_in.bias is missing"),
        (
            lambda p: edit_weights(p, lambda s: s.update({"extra": torch.zeros(1)})),
            ValueError,
            r"weight extra is not of this network",
        ),
        (lambda p: (p / "model_index.json").write_text('{"unet":'), ValueError, r"model_index.json is damaged"),
        (lambda p: (p / "model_index.json").write_bytes(b"\xff\xfe\x00"), ValueError, r"model_index.json is damaged"),
        (lambda p: (p / "model_index.json").write_text("[]"), ValueError, r"not a JSON object"),
        (lambda p: (p / "model_index.json").write_text("{}"), ValueError, r"no transformer or unet in it"),
        (
            lambda p: edit_json(p, "unet/config.json", block_out_channels=[8, 16, 32]),
            ValueError,
            r"config.json: no UNet2DModel can be made of it",
        ),
        (
            lambda p: edit_json(p, "scheduler/scheduler_config.json", beta_schedule="none"),
            ValueError,
            r"scheduler_config.json: DDIMScheduler cannot be made of it",
        ),
        (
            lambda p: edit_json(p, "scheduler/scheduler_config.json", timestep_spacing="leading"),
            ValueError,
            r"yields timesteps \[751, 501, 251, 1\], not the trained \[999, 749, 499, 249\]",
        ),
        (
            lambda p: edit_json(p, "scheduler/scheduler_config.json", clip_sample=True),
            ValueError,
            r"clip_sample must be False",
        ),
        (
            lambda p: edit_json(p, "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"]),
            ValueError,
            r"HeunDiscreteScheduler is no student's scheduler",
        ),
        (
            lambda p: edit_json(p, "model_index.json", unet=["diffusers", "UNet1DModel"]),
            ValueError,
            r"no family for UNet1DModel",
        ),
        (
            lambda p: edit_json(p, "model_index.json", trained_steps=None),
            ValueError,
            r"trained_steps None, so this is no few-step student; open it as a teacher",
        ),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    earlier: tuple[Opened, Path], harm: Callable[[Path], object], error: type[Exception], says: str
) -> None:
    _, path = earlier
    harm(path)
    with pytest.raises(error, match=says) as caught:
        load_student(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(earlier: tuple[Opened, Path], tmp_path: Path) -> None:
    _, path = earlier
    sprung = tmp_path / "sprung"
    (path / "unet" / WEIGHTS).unlink()
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model.bin, a pickle, which is never opened"):
        load_student(path)
    assert not sprung.exists()


def test_the_folders_own_code_is_not_run_to_read_it_back(earlier: tuple[Opened, Path], tmp_path: Path) -> None:
    _, path = earlier
    (path / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_student(path)
    assert not (tmp_path / "ran").exists()


def test_the_bundled_teacher_is_not_taken_for_a_student() -> None:
    with pytest.raises(ValueError, match=r"trained_steps None, so this is no few-step student"):
        load_student(project_dir("assets") / "digits" / "teacher")


def test_another_teachers_student_is_refused(earlier: tuple[Opened, Path]) -> None:
    _, path = earlier
    with pytest.raises(ValueError, match=r"noise table differs from the teacher's"):
        load_student(path, opened=teacher(beta_end=0.02))
    with pytest.raises(ValueError, match=r"class labels differ from the teacher's"):
        load_student(path, opened=teacher(classes=None))


def test_a_missing_repository_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepdistill.paths, "__file__", str(tmp_path / "site-packages" / "stepdistill" / "paths.py"))
    with pytest.raises(FileNotFoundError, match=r"folder pipelines/ is not at .*clone it and run `pip install -e .`"):
        export.project_dir("pipelines")


# Pipelines with text


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Opened, Student, Path]:
    """A Stable Diffusion teacher from a folder with a licence, a LoRA student of it, and where that was exported."""
    sd.pipeline("v_prediction").save_pretrained(tmp_path / "my-teacher")
    head = "---\nlicense: other\nlicense_name: my-licence\nlicense_link: LICENSE.md\ntags:\n- x\n---\n# Teacher\n"
    (tmp_path / "my-teacher" / "README.md").write_text(head)
    opened = open_pipeline(tmp_path / "my-teacher")
    d = opened.denoiser
    net = Adapted(d.net, 2, 2.0, ("to_q", "to_v"))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    Adapted(d.net, 2, 2.0, ("to_q",))  # a critic's, which nobody shall export
    student = Student(Sampler(trailing(2), Tcd(0.5)), net, d.schedule, d.kind, d.call)
    return opened, student, save_pipeline(student, opened, tmp_path / "student", method="dmd2")


def test_a_text_pipeline_is_whole_and_names_nothing_of_this_machine(
    texts: tuple[Opened, Student, Path], tmp_path: Path
) -> None:
    _, _, folder = texts
    names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert {"model_index.json", "README.md", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"} < names
    for name in names:
        content = (folder / name).read_bytes()
        assert b"_name_or_path" not in content, name
        assert str(tmp_path).encode() not in content, name
    state = load_file(folder / "unet" / WEIGHTS)
    assert not [key for key in state if "lora" in key or "base_layer" in key or "role" in key]
    assert len({f.stat().st_mode for f in folder.rglob("*") if f.is_file()}) == 1
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["_student"]["call"] == {"num_inference_steps": 2, "guidance_scale": 1.0, "eta": 0.5}


def test_the_card_says_what_a_user_must_know(texts: tuple[Opened, Student, Path]) -> None:
    _, _, folder = texts
    card = (folder / "README.md").read_text()
    for fact in (
        "license: other\nlicense_name: my-licence\nlicense_link: LICENSE.md\n",
        "pipeline_tag: text-to-image\n",
        "# my-teacher, in 2 steps",
        "| method | dmd2 |",
        "| timesteps | 999, 499 |",
        "| licence | my-licence, the teacher's (LICENSE.md) |",
        "    num_inference_steps=2,\n    guidance_scale=1.0,\n    eta=0.5,\n",
        "A stock `StableDiffusionPipeline`",
    ):
        assert fact in card, fact


def record(value: float) -> Record:
    made = {"subject": "student", "role": "student", "method": "dmd2", "sampler": "Tcd", "steps": 2, "nfe": 2}
    fields = {"scores_per_seed": [{"fd": value}], "seeds": [0], "n": 64, "resize": "none", "device": "cpu"}
    (one,) = records_from_scores(**made, **fields, extractor_sha256=None, reference_sha256=None)
    return one


def test_figures_and_a_picture_go_into_the_card_and_are_replaced(
    texts: tuple[Opened, Student, Path], tmp_path: Path
) -> None:
    opened, student, folder = texts
    plain = (folder / "README.md").read_text()
    (tmp_path / "grid.png").write_bytes(b"a picture")
    add_figures(folder, [record(25.0)], tmp_path / "grid.png")
    card = (folder / "README.md").read_text()
    assert "| student | student | dmd2 | Tcd | 2 | 2 | **25** |" in card
    assert "64 images per seed, seeds [0]; cpu;" in card
    assert "![samples](samples.png)" in card
    assert (folder / "samples.png").read_bytes() == b"a picture"
    add_figures(folder, [record(75.0)])
    again = (folder / "README.md").read_text()
    assert "**75**" in again
    assert "**25**" not in again
    assert again.partition("<!-- figures")[0] == plain.partition("<!-- figures")[0]
    save_pipeline(student, opened, folder, records=[record(35.0)], grid=tmp_path / "grid.png")
    assert "**35**" in (folder / "README.md").read_text()


def test_half_precision_stands_beside_full(texts: tuple[Opened, Student, Path], tmp_path: Path) -> None:
    """Without asking one gets float32, in all parts; transformers would take what a config says."""
    opened, student, _ = texts
    folder = save_pipeline(student, opened, tmp_path / "half", variant="bf16")
    for options, dtype in (({}, torch.float32), ({"variant": "bf16", "dtype": torch.bfloat16}, torch.bfloat16)):
        pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, **options)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            assert {p.dtype for p in part.parameters()} == {dtype}
    assert 'from_pretrained(path, variant="bf16", dtype=torch.bfloat16)' in (folder / "README.md").read_text()


def test_sd3_without_t5_loads_by_the_code_in_its_card(tmp_path: Path) -> None:
    """A bare from_pretrained asks for the T5 that the index says is not there."""
    pipeline = sd3.pipeline()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.register_to_config(_max_sequence_length=0)
    opened = open_pipeline(pipeline)
    d = opened.denoiser
    student = Student(Sampler(trailing(2), Ddim()), d.net, d.schedule, d.kind, d.call)
    folder = save_pipeline(student, opened, tmp_path / "student")
    lines = load_lines(folder)
    assert "text_encoder_3=None, tokenizer_3=None" in lines
    assert "max_sequence_length=0" in lines
    space: dict[str, object] = {}
    exec(lines, space)
    assert len(space["images"]) == 1
    ours = opened.decode(student.sample((1, *opened.sample_shape), opened.encode(["a"]), seed=0)) / 2 + 0.5
    torch.testing.assert_close(stepdistill.sample(folder, "a", output="float"), ours.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_weight_of_another_name_is_refused_in_every_part(texts: tuple[Opened, Student, Path], part: str) -> None:
    """Diffusers and transformers make it up, with a warning."""
    _, _, folder = texts
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    key = next(key for key in state if key.endswith("bias"))
    state["renamed.bias"] = state.pop(key)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{part}: weight .* is (missing|unexpected)"):
        stepdistill.sample(folder, "a")
    if part == "unet":
        with pytest.raises(ValueError, match=r"weight .* (missing|not of this network)"):
            load_student(folder)


def test_the_guidance_that_calls_shall_pass_is_recorded(tmp_path: Path) -> None:
    opened = open_pipeline(sd.pipeline("v_prediction"))
    d = opened.denoiser
    student = Student(Sampler(trailing(2), Ddim()), told_guidance(d.net), d.schedule, d.kind, d.call)
    with torch.no_grad():
        student.net.time_embedding.cond_proj.weight.normal_()
    folder = save_pipeline(student, opened, tmp_path / "student", guidance=4.0)
    assert "guidance_scale=4.0" in (folder / "README.md").read_text()
    assert "| guidance | an input of the network" in (folder / "README.md").read_text()
    cond = opened.encode(["a"])
    for given, scale in ((None, 4.0), (6.0, 6.0)):
        ours = student.sample((1, *opened.sample_shape), {**cond, "guidance": torch.tensor([scale])}, seed=0)
        theirs = stepdistill.sample(folder, "a", guidance=given, output="float")
        torch.testing.assert_close(theirs, (opened.decode(ours) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    plain = open_pipeline(unet2d.pipeline())
    d = plain.denoiser
    student = Student(Sampler(trailing(2), Ddim()), d.net, d.schedule, d.kind, d.call)
    with pytest.raises(ValueError, match=r"guidance 2.0: DDIMPipeline takes none; leave it out"):
        save_pipeline(student, plain, tmp_path / "plain", guidance=2.0)


def test_a_gamma_that_a_pipeline_cannot_pass_is_refused() -> None:
    opened = open_pipeline(dit.pipeline())
    d = opened.denoiser
    for gamma in (0.3, 0.5):
        student = Student(Sampler(trailing(2), Tcd(gamma)), d.net, d.schedule, d.kind, d.call)
        if gamma == 0.3:
            check_exportable(student, opened)
            continue
        with pytest.raises(ValueError, match=r"DiTPipeline passes no eta, so its scheduler takes 0.3; use Tcd\(0.3\)"):
            check_exportable(student, opened)


def test_a_student_of_another_family_is_refused(texts: tuple[Opened, Student, Path]) -> None:
    _, _, folder = texts
    with pytest.raises(ValueError, match=r"a student of the family sd, but the teacher is of unet2d"):
        load_student(folder, opened=open_pipeline(unet2d.pipeline()))


# Sampled by their own pipeline


def test_samples_do_not_depend_on_their_batch(texts: tuple[Opened, Student, Path]) -> None:
    _, _, folder = texts
    prompts = ["a", "b", "c"]
    together = stepdistill.sample(folder, prompts, seed=4, output="float")
    apart = stepdistill.sample(folder, prompts[1:], seed=4, first=1, batch=1, output="float")
    torch.testing.assert_close(together[1:], apart, rtol=0, atol=1e-5)
    levels = stepdistill.sample(folder, prompts, seed=4, output="uint8")
    assert levels.dtype == torch.uint8
    assert levels.shape == (3, 3, 16, 16)
    pictures = stepdistill.sample(folder, prompts, seed=4)
    assert [p.size for p in pictures] == [(16, 16)] * 3
    assert pictures[1].getpixel((3, 5)) == tuple(levels[1, :, 5, 3].tolist())


@pytest.mark.parametrize(
    ("wanted", "options", "says"),
    [
        (
            ["a"],
            {"steps": 4},
            r"steps 4: this student was trained for 2 \(timesteps 999, 499\); use steps 2, or distil",
        ),
        ([1, 2], {}, r"this student takes prompts; got \[1, 2\]"),
        (3, {}, r"this student takes prompts; got 3"),
        ([], {}, r"nothing to sample"),
        (["a"], {"colour": "red"}, r"colour: StableDiffusionPipeline takes no such argument"),
    ],
)
def test_what_a_student_does_not_take_is_one_clear_line(
    texts: tuple[Opened, Student, Path], wanted: object, options: dict, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        stepdistill.sample(texts[2], wanted, **options)


def test_classes_and_numbers_are_sampled_too(tmp_path: Path) -> None:
    """Of a class-conditional folder no code is run; a run's directory stands for its pipeline."""
    opened = teacher()
    student = student_of(opened, 4, Tcd(0.3))
    save_pipeline(student, opened, tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "pipeline" / "pipeline.py").write_text("raise SystemExit")
    images = stepdistill.sample(tmp_path / "run", LABELS, seed=SEED, output="float")
    torch.testing.assert_close(images, (samples(student) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"steps 1: this student was trained for 4"):
        stepdistill.sample(tmp_path / "run", [1], steps=1)
    with pytest.raises(ValueError, match=r"this student takes class labels; got 2"):
        stepdistill.sample(tmp_path / "run", 2)
    with pytest.raises(FileNotFoundError, match=r"neither a run with a pipeline/ nor a pipeline folder"):
        stepdistill.sample(tmp_path, 2)
    with pytest.raises(ValueError, match=r"brings its pipeline's own code, which is not run unasked"):
        load_exported(tmp_path / "run" / "pipeline")
    with pytest.raises(ValueError, match=r"this StableDiffusionPipeline is no exported student"):
        stepdistill.sample(sd.pipeline(), "a")
