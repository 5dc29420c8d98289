"""A run from a recipe to its folder: what it leaves, where it starts, and what is not done twice."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image
from torch import Tensor, nn

from stepdistill import quickstart as quickstart_module
from stepdistill.build import new_student, open_teacher
from stepdistill.data import DigitsData, Labels, Prompts, TeacherPairs, image_shape
from stepdistill.distill import (
    PREVIEW_SEED,
    check,
    claim,
    distill,
    evaluate_and_report,
    preview,
    side_by_side,
    to_show,
)
from stepdistill.evaluation.features import to_uint8
from stepdistill.evaluation.records import load_records
from stepdistill.export import load_lines, load_student
from stepdistill.logging import Progress
from stepdistill.models.denoiser import Guided
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.objectives import DMD2, KD
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import OneStep
from stepdistill.quickstart import quickstart, reseeded
from stepdistill.recipe import Evaluation, Recipe, Teacher, Weights
from stepdistill.recipes import find
from stepdistill.sampling import Ddim, DpmPP2M, Sampler, sample, sample_rngs, trailing
from stepdistill.trainer import AdamW, Run, Trainer
from tests.tiny import sd, sd3, wan

SHORT = Run(steps=6, batch=8, log_every=2, preview_every=3, save_every=2, ema=0.5)
TINY = replace(
    find("digits_kd"),
    data=TeacherPairs(16, solver=Sampler(trailing(4), DpmPP2M())),
    optim={"student": AdamW(1e-3)},
    sampler=Sampler(trailing(1), Ddim()),
    run=SHORT,
    evaluation=Evaluation(64, (0,), (1, 2)),
)
CHAIN = replace(
    TINY,
    objective=DMD2(student_every=2),
    data=DigitsData(),
    optim={name: AdamW(1e-4) for name in ("student", "critic", "disc")},
    run=replace(SHORT, steps=4, preview_every=0),
    warm_start=TINY,
)


@pytest.fixture(scope="module")
def opened() -> Opened:
    """The bundled teacher."""
    return open_teacher(TINY.teacher)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages."""
    out = tmp_path_factory.mktemp("chain")
    distill(CHAIN, out)
    return out


def weights(net: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of writing of all files."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


# What a run leaves


def test_a_run_leaves_a_recipe_metrics_checkpoints_samples_a_pipeline_results_and_a_report(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    done = distill(TINY, out)
    records = evaluate_and_report([("student", TINY, done)], out, title="Tiny <run>")

    expected = ["cache", "checkpoints", "health.jsonl", "metrics.jsonl", "pipeline", "recipe.json"]
    expected += ["report", "results.json", "samples"]
    assert sorted(path.name for path in out.iterdir()) == expected
    assert Recipe.load(out / "recipe.json") == TINY
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line.keys() == {"step", "student/loss", "student/grad_norm"} for line in lines)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        "00000004.safetensors",
        "00000006.safetensors",
    ]
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["000003.png", "000006.png"]
    assert Image.open(out / "samples/000006.png").format == "PNG"
    assert load_records(out / "results.json") == records
    assert {(r.role, r.steps, r.n) for r in records} == {("teacher", 1, 64), ("teacher", 2, 64), ("student", 1, 64)}
    page = (out / "report/index.html").read_text()
    assert "Tiny &lt;run&gt;" in page and "from_pretrained" in page

    torch.testing.assert_close(weights(load_student(out / "pipeline")), weights(done.student), rtol=0, atol=0)
    names: dict[str, list] = {}
    exec(load_lines(done.pipeline), names)  # as a user would paste them
    assert len(names["images"]) == 2


def test_what_is_exported_is_the_average_and_not_the_last_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Trainer] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda trainer: (seen.append(trainer), fit(trainer))[1])
    distill(TINY, tmp_path)
    exported = weights(load_student(tmp_path / "pipeline"))
    assert torch.equal(exported, weights(seen[0].nets.ema))
    assert not torch.equal(exported, weights(seen[0].nets.student))


def test_previews_show_the_same_noise_every_time(tmp_path: Path, chain: Path, opened: Opened) -> None:
    student = load_student(chain / "pipeline")
    shown = to_show(opened, CHAIN.data, CHAIN.teacher)
    preview(student, opened, tmp_path / "a.png", shown)
    torch.manual_seed(1)
    preview(student, opened, tmp_path / "b.png", shown)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pictures_are_compared_at_equal_steps_and_noise(chain: Path, opened: Opened) -> None:
    student = load_student(chain / "pipeline")
    student.net.load_state_dict(opened.denoiser.net.state_dict())  # then it is the teacher in one step
    grids = side_by_side([("student", student)], opened, Guided(opened.denoiser))
    assert [(grid.title, grid.steps) for grid in grids] == [("teacher, 50 steps", None), ("teacher", 1), ("student", 1)]
    assert torch.equal(grids[1].images, grids[2].images)
    assert not torch.equal(grids[0].images, grids[1].images)


# Where it starts


def test_stages_keep_their_own_pipeline_recipe_and_metrics(chain: Path) -> None:
    stage = chain / "stages" / "1-kd"
    assert [path.name for path in (chain / "stages").iterdir()] == ["1-kd"]
    kept = {"checkpoints", "health.jsonl", "metrics.jsonl", "pipeline", "recipe.json", "samples"}
    assert kept == {p.name for p in stage.iterdir()}
    assert Recipe.load(stage / "recipe.json") == TINY
    assert Recipe.load(chain / "recipe.json") == CHAIN
    assert load_student(stage / "pipeline").sampler == TINY.sampler


def test_a_warm_started_student_starts_from_the_weights_of_its_stage(tmp_path: Path, opened: Opened) -> None:
    """With learning rates of zero it ends there too."""
    still = replace(CHAIN, optim={name: AdamW(0.0) for name in CHAIN.optim})
    done = distill(still, tmp_path)
    stage = weights(load_student(tmp_path / "stages/1-kd/pipeline"))
    assert not torch.equal(stage, weights(opened.denoiser))
    torch.testing.assert_close(weights(done.student), stage, rtol=0, atol=1e-7)  # an average of equals rounds


def test_without_a_warm_start_the_student_starts_from_the_teacher(tmp_path: Path, opened: Opened) -> None:
    done = distill(replace(TINY, optim={"student": AdamW(0.0)}, run=replace(SHORT, steps=1)), tmp_path)
    torch.testing.assert_close(weights(done.student), weights(opened.denoiser), rtol=0, atol=1e-7)


# What is not done twice


def test_a_resumed_chain_runs_no_finished_stage_and_ends_as_if_it_had_not_stopped(
    tmp_path: Path, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step
    started: list[str] = []

    def stopping(trainer: Trainer, index: int) -> dict[str, Tensor]:
        name = type(trainer.objective).__name__
        started.append(name)
        if started == ["KD"] * 6 + ["DMD2"] * 3:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, index)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        distill(CHAIN, tmp_path)
    stage = files(tmp_path / "stages")
    done = distill(CHAIN, tmp_path)
    assert started == ["KD"] * 6 + ["DMD2"] * 4
    assert files(tmp_path / "stages") == stage
    assert torch.equal(weights(done.student), weights(load_student(chain / "pipeline")))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (chain / "metrics.jsonl").read_bytes()


def test_a_finished_run_is_only_loaded_when_it_is_resumed(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", None)  # not to be called
    before = files(chain)
    done = distill(CHAIN, chain)
    assert torch.equal(weights(done.student), weights(load_student(chain / "pipeline")))
    assert files(chain) == before


def test_a_folder_with_nothing_but_a_cache_is_free(tmp_path: Path) -> None:
    """It is what a run leaves that is stopped while the teacher's trajectories are made."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "pairs-0.safetensors").write_bytes(b"")
    claim(tmp_path, TINY, resume=False)
    (tmp_path / ".recipe.json.part").write_text("{")  # killed a moment later
    claim(tmp_path, TINY, resume=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="there are other files already"):
        claim(tmp_path, TINY, resume=False)


# Prompts


@pytest.mark.parametrize(("pipeline", "form"), [(sd.pipeline, "full"), (sd.pipeline, "lora"), (sd3.pipeline, "full")])
def test_a_text_to_image_pipeline_is_distilled_from_prompts_and_resumed(
    pipeline: Callable[[], DiffusionPipeline], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression on trajectories, then data-free DMD2; the folder holds the whole stock pipeline."""
    pipeline().save_pretrained(tmp_path / "teacher")
    prompts = Prompts(prompts=("a red ring", "rain", "sun"))
    pairs = Recipe(
        teacher=Teacher(str(tmp_path / "teacher"), guidance=2.0, negative="blurry"),
        objective=KD(),
        data=TeacherPairs(4, solver=Sampler(trailing(2)), prompts=prompts),
        optim={"student": AdamW(1e-3)},
        sampler=Sampler(trailing(1)),
        run=Run(steps=2, batch=2),
        student=Weights(form=form, rank=2),
    )
    recipe = replace(
        pairs,
        objective=DMD2(OneStep(), gan=Gan(weight=0.0)),
        data=prompts,
        optim={"student": AdamW(1e-3), "critic": AdamW(1e-3)},
        run=Run(steps=2, batch=2, save_every=1),
        warm_start=pairs,
    )
    step = Trainer.step

    def stopping(trainer: Trainer, index: int) -> dict[str, Tensor]:
        if isinstance(trainer.objective, DMD2) and index == 0:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, index)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "step", stopping)
        distill(recipe, tmp_path / "run")
    resumed = distill(recipe, tmp_path / "run", resume=True)
    whole = distill(recipe, tmp_path / "whole")
    assert torch.equal(weights(load_student(resumed.pipeline)), weights(load_student(whole.pipeline)))
    assert (tmp_path / "run/samples/000002.png").read_bytes() == (tmp_path / "whole/samples/000002.png").read_bytes()
    assert {"text_encoder", "vae"} < {path.name for path in whole.pipeline.iterdir()}
    width, height = Image.open(tmp_path / "whole/samples/000002.png").size
    assert 3 * 32 <= width < 3 * 40 and height > width  # a column for each prompt, four rows


def test_pictures_of_prompts_are_decoded_and_named() -> None:
    opened = open_pipeline(sd.pipeline())
    shown = to_show(opened, Prompts(prompts=("a", "b")), Teacher("x"))
    assert (shown.rows, shown.columns, shown.captions) == (4, 2, ("a", "b"))
    student = new_student(opened, Sampler(trailing(1)))
    grids = side_by_side([("student", student)], opened, Guided(opened.denoiser), shown)
    assert grids[0].images.shape == (8, 3, 16, 16) and all(grid.captions == ("a", "b") for grid in grids)
    assert torch.equal(grids[1].images, grids[2].images)  # it is the teacher in one step
    latents = sample(student, (8, 4, 8, 8), opened.encode(["a", "b"] * 4), student.sampler, seed=PREVIEW_SEED)
    torch.testing.assert_close(grids[2].images, to_uint8(opened.decode(latents)), rtol=0, atol=1)


def test_of_a_video_three_frames_are_shown() -> None:
    opened = open_pipeline(wan.pipeline(), size=(5, 16, 16))
    shown = to_show(opened, Prompts(prompts=("a",)), Teacher("x"))
    student = new_student(opened, Sampler(trailing(1)))
    (_, _, grid) = side_by_side([("student", student)], opened, Guided(opened.denoiser), shown)
    frames, height, width = image_shape(opened)[1:]
    assert frames > 1 and grid.images.shape[1:] == (3, height, 3 * width)


def test_students_of_a_range_of_guidance_are_looked_at_in_its_middle() -> None:
    opened, teacher = open_pipeline(sd.pipeline()), Teacher("x", guidance_range=(2.0, 4.0))
    shown = to_show(opened, Prompts(prompts=("a",)), teacher)
    assert shown.cond["guidance"].tolist() == [3.0] * 4
    student = new_student(opened, Sampler(trailing(1)), Weights(told_guidance=True))
    assert len(side_by_side([("student", student)], opened, Guided(opened.denoiser, 1.0, opened.null), shown)) == 3


def test_text_pipelines_need_prompts_and_classes_labels(opened: Opened) -> None:
    text = open_pipeline(sd.pipeline())
    with pytest.raises(ValueError, match="data DigitsData gives no prompts, and StableDiffusionPipeline takes"):
        check(replace(CHAIN, evaluation=None), text)
    with pytest.raises(ValueError, match="takes no prompts"):
        check(replace(TINY, data=replace(TINY.data, prompts=Prompts(prompts=("a",)))), opened)
    with pytest.raises(ValueError, match=r"evaluation judges digits .* StableDiffusionPipeline, makes samples of"):
        check(replace(TINY, data=replace(TINY.data, prompts=Prompts(prompts=("a",)))), text)


# What cannot be done


def test_an_evaluation_of_anything_but_digits_is_refused_before_training(opened: Opened) -> None:
    check(TINY, opened)
    large = replace(opened, sample_shape=(1, 16, 16))
    with pytest.raises(ValueError, match=r"evaluation judges digits of shape .*, makes samples of \(1, 16, 16\)"):
        check(TINY, large)
    check(replace(TINY, evaluation=None), large)


def test_guidance_without_a_null_label_is_refused_before_training(opened: Opened) -> None:
    guided = replace(TINY, teacher=Teacher(TINY.teacher.source, guidance=2.0))
    check(guided, opened)
    with pytest.raises(ValueError, match=r"guidance 2.0 needs a null condition"):
        check(guided, replace(opened, null=None))


def test_a_stage_to_come_is_checked_before_the_first_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "fit", None)  # not to be called
    bad = replace(CHAIN, heads=replace(CHAIN.heads, taps=("nothing",)))
    with pytest.raises(ValueError, match=r"heads.taps: 'nothing'"):
        distill(bad, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Quickstart


def test_quickstart_distils_in_one_and_four_steps_stops_at_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes: interrupted while both are at work, each keeps what it has done."""
    four = replace(
        TINY, sampler=Sampler(trailing(4)), run=Run(steps=250, batch=2, log_every=1, save_every=0, threads=1)
    )
    recipes = {
        quickstart_module.ONE_STEP: replace(CHAIN, run=replace(CHAIN.run, threads=1)),
        quickstart_module.FOUR_STEPS: four,
    }
    monkeypatch.setattr(quickstart_module, "find", recipes.__getitem__)
    out, step, deadline = tmp_path / "out", Trainer.step, time.monotonic() + 120

    def waiting(trainer: Trainer, index: int) -> dict[str, Tensor]:
        while not (out / "four_step/metrics.jsonl").is_file():
            assert time.monotonic() < deadline, "the other process has not begun"
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)
        return step(trainer, index)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "step", waiting)
        quickstart(out, seed=3)
    (checkpoint,) = (out / "four_step/checkpoints").iterdir()
    assert 0 < int(checkpoint.stem) < 250  # the other process has not been waited for
    assert (out / "stages/1-kd/checkpoints/00000001.safetensors").is_file()
    assert capsys.readouterr().out == ""

    records = quickstart(out, seed=3, resume=True)
    assert load_records(out / "results.json") == records
    assert {r.steps for r in records if r.role == "student"} == {1, 4}
    assert (out / "report/index.html").is_file()
    for folder, steps in (("pipeline", 1), ("four_step/pipeline", 4)):
        assert load_student(out / folder).sampler.steps == steps
    assert Recipe.load(out / "recipe.json") == reseeded(recipes[quickstart_module.ONE_STEP], 3)
    logged = [json.loads(line)["step"] for line in (out / "four_step/metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 251))
    printed = capsys.readouterr().out
    assert "DiffusionPipeline.from_pretrained(" in printed and "report: " in printed and "| student, 1 step" in printed


def test_another_seed_reaches_every_stage() -> None:
    assert [stage.run.seed for stage in reseeded(CHAIN, 5).stages()] == [5, 5]
    assert reseeded(CHAIN, 0) == CHAIN


# Progress


def test_progress_is_a_plain_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("title", 0, 3) as progress:
        progress.advance()
        progress.show({"student/loss": 0.125, "student/grad_norm": 9.0})
    assert capsys.readouterr().err == "title  1/3  0 s left  student/loss 0.125\n"
    with Progress("done", 3, 3):
        pass
    assert capsys.readouterr().err == "done  3/3\n"


def test_an_unconditional_teacher_of_ones_own_is_distilled_without_data(tmp_path: Path) -> None:
    """A stock DDPM-like folder in, a stock DDIM pipeline out: regression on pairs, then data-free DMD2."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    DDIMPipeline(net, scheduler).save_pretrained(tmp_path / "teacher")
    pairs = Recipe(
        teacher=Teacher(str(tmp_path / "teacher")),
        objective=KD(),
        data=TeacherPairs(count=16, classes=0, solver=Sampler(trailing(4))),
        optim={"student": AdamW(1e-3)},
        sampler=Sampler(trailing(1)),
        run=Run(steps=2, batch=4),
    )
    recipe = replace(
        pairs,
        objective=DMD2(gan=Gan(weight=0.0)),
        data=Labels(classes=0),
        optim={"student": AdamW(1e-3), "critic": AdamW(1e-3)},
        warm_start=pairs,
    )
    done = distill(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "000002.png").is_file()
    stock = DDIMPipeline.from_pretrained(done.pipeline)
    stock.set_progress_bar_config(disable=True)
    rngs = sample_rngs(3, range(2))
    images = stock(2, rngs, num_inference_steps=1, output_type="np").images
    ours = (done.student.sample((2, 3, 8, 8), {}, seed=3) / 2 + 0.5).clamp(0, 1)
    assert abs(images - ours.permute(0, 2, 3, 1).numpy()).max() < 1e-5
