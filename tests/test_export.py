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
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import stepdistill.paths
from stepdistill import export
from stepdistill.export import WEIGHTS, check_exportable, load_lines, load_student, save_pipeline
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.paths import project_dir
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Renoise, Sampler, StepRule, Tcd, sample, sample_rngs, trailing
from stepdistill.schedule import RectifiedFlow
from stepdistill.student import Student

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


def test_a_table_that_cannot_be_rebuilt_is_refused(tmp_path: Path) -> None:
    """A scheduler changed by hand after its construction: its config would give the student another noise table."""
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    opened = open_pipeline(conditional_pipeline(scheduler))
    with pytest.raises(ValueError, match=r"DDIMScheduler: its noise table cannot be rebuilt from its config"):
        save_pipeline(student_of(opened), opened, tmp_path / "student")


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
        (lambda p: (p / "model_index.json").write_text("{}"), ValueError, r"no unet and scheduler in it"),
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
            r"yields timesteps \[750, 500, 250, 0\], not the trained \[999, 749, 499, 249\]",
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
