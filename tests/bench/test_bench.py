"""A suite from end to end: rows, records, files, what is kept, what bad input gets."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file, save_file

from stepdistill.bench import Subject, Suite, measure
from stepdistill.bench.cache import Cache
from stepdistill.bench.command import Bench, bench
from stepdistill.bench.measure import asked_of, measure_row
from stepdistill.bench.opening import open_row
from stepdistill.bench.rows import rows_of
from stepdistill.build import new_student, open_teacher
from stepdistill.evaluation.benchmark import bench_student, evaluator_for
from stepdistill.evaluation.intervals import wilson_interval
from stepdistill.evaluation.records import load_records
from stepdistill.export import load_student, save_pipeline
from stepdistill.lora_files import save_lora
from stepdistill.models.families import open_pipeline
from stepdistill.recipe import Teacher, Weights
from stepdistill.sampling import Ddim, DpmPP2M, Heun, Renoise, Sampler, sample_rngs, trailing
from tests.tiny import sd

DIGITS = Teacher("bundled:digits")
JUDGE = '''
class Brightness:
    """Looks at the mean."""

    def __init__(self, n):
        self.n = n

    def cond(self, opened):
        return opened.encode(self.asked()[: self.n - MISSING])

    def asked(self):
        return ["a cat", "a dog", "rain", "snow", "sun", "a cup"][: self.n]

    def scores(self, images):
        return {"frechet": float(images.float().mean())}

    def right(self, images):
        return images.float().mean((1, 2, 3)) > 127

    def ceiling(self):
        return {}

    def protocol(self, metric):
        return {"n": self.n, "extractor_sha256": "a" * 64, "reference_sha256": "b" * 64, "resize": "none"}

MISSING = 0

def judge(opened, n):
    return Brightness(n)
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students of the digits, not trained: one of two steps, and a run whose student serves one and four."""
    folder, opened = tmp_path_factory.mktemp("runs"), open_teacher(DIGITS)
    for name, steps in (("two", 2), ("run/pipeline", 4), ("run/pipeline-1step", 1)):
        student = new_student(opened, Sampler(trailing(steps)))
        save_pipeline(student, opened, folder / name)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here."""
    return tmp_path_factory.mktemp("cache")


Ask = Callable[..., list]


@pytest.fixture
def ask(tmp_path: Path, cache: Path) -> Ask:
    """Bench a suite into a folder."""

    def command(suite: Suite, out: Path | None = None, **options):
        (tmp_path / "suite.json").write_text(suite.to_json())
        options = {"cache": cache} | options
        return bench(Bench((str(tmp_path / "suite.json"),), out=out or tmp_path / "out", **options))

    return command


@pytest.fixture
def suite(runs: Path) -> Suite:
    """The digits in small."""
    students = Subject(str(runs / "two"), "two"), Subject(str(runs / "run"), "run")
    return Suite(
        DIGITS, students, (1, 2, 4), solvers=(Ddim(), Heun()), teacher_steps=(2,), long_run=3, seeds=(0, 1), n=20
    )


def test_a_suite_gives_records_files_and_a_note_of_what_was_left_out(
    ask: Ask, suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = ask(suite)
    out = tmp_path / "out"
    assert load_records(out / "results.json") == records
    fd = {(r.subject, r.role, r.sampler, r.steps, r.nfe): r.value for r in records if r.metric == "fd"}
    assert set(fd) == {
        *(("teacher", "teacher", "ddim", k, k) for k in (2, 3)),
        ("teacher", "teacher", "heun", 2, 3),
        ("two", "student", "ddim", 2, 2),
        *(("run", "student", "ddim", k, k) for k in (1, 4)),
    }
    # untrained students are their teacher
    assert fd["two", "student", "ddim", 2, 2] == fd["teacher", "teacher", "ddim", 2, 2]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [r.value for r in records]
    assert [json.loads(row["seeds"]) for row in rows] == [r.seeds for r in records]
    long_run = {r.metric: r for r in records if (r.role, r.steps) == ("teacher", 3)}
    for row, r in zip(rows, records, strict=True):
        if r.role == "teacher" or r.metric == "seconds_per_image":
            assert row["minus_teacher"] == row["minus_teacher_ci95"] == ""
        else:
            gap = torch.tensor(r.values, dtype=torch.float64) - torch.tensor(long_run[r.metric].values).double()
            assert float(row["minus_teacher"]) == pytest.approx(float(gap.mean()), abs=1e-5)
            assert float(row["minus_teacher_ci95"]) >= 12.7 * float(gap.std()) / 2**0.5 - 1e-3
    (accuracy,) = (r for r in records if (r.subject, r.metric) == ("two", "accuracy"))
    found = wilson_interval(round(accuracy.value / 100 * 40), 40)  # two seeds of twenty
    assert (accuracy.items, accuracy.dtype, accuracy.ci95) == (20, "float32", pytest.approx(100 * found.half_width))
    table, page = (out / "table.md").read_text(), (out / "report" / "index.html").read_text()
    said = capsys.readouterr().out
    for text in (
        "Students minus teacher (3 steps, ddim)",
        "two: left out at 1, 4 steps; it serves 2 steps",
        "run: left out at 2 steps; it serves 1, 4 steps",
    ):
        assert text in table and text in page and text in said
    plots = {path.stem for path in (out / "plots").glob("*.svg")}
    assert plots >= {
        "fd-against-steps", "fd-against-network-evaluations", "fd-against-time", "fd-against-recall",
    }  # fmt: skip


def test_numbers_are_those_of_the_plain_benchmark(ask: Ask, suite: Suite, runs: Path, tmp_path: Path) -> None:
    opened = open_teacher(DIGITS)
    student, evaluator = load_student(runs / "two", opened=opened), evaluator_for(opened, 20)
    plain = bench_student(student, opened, evaluator, (0, 1), subject="two", method="distilled")
    mine = [r for r in ask(suite, tmp_path / "r.json") if r.subject == "two"]
    keep = ("metric", "n", "seeds", "extractor_sha256", "reference_sha256", "resize", "nfe", "method", "sampler")
    assert [[getattr(r, k) for k in keep] for r in mine] == [[getattr(r, k) for k in keep] for r in plain]
    for a, b in zip(mine, plain, strict=True):
        assert a.metric == "seconds_per_image" or (a.value, a.ci95) == (b.value, b.ci95)


def test_asking_again_measures_nothing_and_writes_nothing(
    ask: Ask, suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(suite)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    monkeypatch.setattr(measure, "open_row", None)  # nobody is opened
    assert ask(suite) == first
    assert "0 outcomes measured" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert ask(suite, tmp_path / "other.json") == first
    (tmp_path / "out" / "table.md").write_text("spoilt")
    ask(suite)
    assert "spoilt" not in (tmp_path / "out" / "table.md").read_text()


def test_a_bench_that_was_stopped_goes_on(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopping(of, one, *rest):
        if one.row.name == "run":
            raise KeyboardInterrupt
        return measure_row(of, one, *rest)

    folder = tmp_path / "fresh"
    monkeypatch.setattr(measure, "measure_row", stopping)
    with pytest.raises(KeyboardInterrupt):
        ask(suite, cache=folder)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    kept = len(list(folder.glob("??/*.json")))
    assert kept == 4 * 3  # three rows of the teacher and a student: two seeds and a look each
    ask(suite, tmp_path / "r.json", cache=folder)
    # two rows of the other: two seeds and a look; and six times
    assert "12 outcomes measured" in capsys.readouterr().out and len(list(folder.glob("??/*.json"))) == 6 * 4


def test_what_changes_is_measured_and_what_is_renamed_is_not(
    suite: Suite, runs: Path, tmp_path: Path, cache: Path
) -> None:
    def keys(of: Suite) -> set[str]:
        rows, _ = rows_of(of, Cache(cache))
        asked = asked_of(of, rows, Cache(cache))
        return {measure.key_of(facts) for one in asked for facts in one.scores.values()}

    first = keys(suite)
    assert len(first) == 12
    shutil.copytree(runs / "two", tmp_path / "two")
    moved = dataclasses.replace(suite, students=(Subject(str(tmp_path / "two"), "new name"), suite.students[1]))
    assert keys(moved) == first
    weights = tmp_path / "two/unet/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state[next(iter(state))] += 1e-3
    save_file(state, weights)
    assert len(keys(moved) & first) == 10
    guided = dataclasses.replace(suite, teacher=dataclasses.replace(DIGITS, guidance=2.0))
    assert len(keys(guided) & first) == 6  # students do not depend on it
    assert not keys(dataclasses.replace(suite, n=21)) & first
    assert len(keys(dataclasses.replace(suite, seeds=(1, 2))) & first) == 6


def test_a_damaged_entry_is_measured_again_and_said(ask: Ask, suite: Suite, tmp_path: Path, cache: Path) -> None:
    first = ask(suite, tmp_path / "first.json")
    folder = tmp_path / "copy"
    shutil.copytree(cache, folder)
    for path in folder.glob("??/*.json"):
        path.write_text(path.read_text()[:100])
        break
    with pytest.warns(UserWarning, match=r"cache entry .* is damaged .* it is measured again"):
        again = ask(suite, tmp_path / "again.json", cache=folder)
    values = [[(r.subject, r.metric, r.value) for r in rs if r.metric != "seconds_per_image"] for rs in (first, again)]
    assert values[0] == values[1]


def test_processes_give_the_same_records(
    ask: Ask, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(suite, solvers=(Ddim(),), teacher_steps=(2,), long_run=0, students=suite.students[:1])
    alone = ask(few, tmp_path / "alone.json")
    monkeypatch.setattr(measure, "START", "fork")  # a new interpreter takes its time
    together = ask(few, tmp_path / "together.json", cache=tmp_path / "fresh", jobs=2)
    for a, b in zip(alone, together, strict=True):
        assert a.metric == "seconds_per_image" or a.value == pytest.approx(b.value, rel=1e-5)


def test_the_command_line_overrides_a_suite(ask: Ask, suite: Suite, tmp_path: Path) -> None:
    records = ask(suite, tmp_path / "r.json", n=21, seeds=(5,), steps=(4,), teacher_steps=(1,))
    assert {(r.n, *r.seeds) for r in records} == {(21, 5)}
    assert {(r.subject, r.steps) for r in records} == {("teacher", 1), ("run", 4)}
    records = ask(suite, tmp_path / "alone" / "results.json")
    assert [p.name for p in (tmp_path / "alone").iterdir()] == ["results.json"] and len(records) > 10


# Students from elsewhere: a tiny Stable Diffusion and a judge of our own


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, an LCM-like pipeline, one of other images, a LoRA, and a judge."""
    folder = tmp_path_factory.mktemp("elsewhere")
    live = sd.pipeline()
    live.save_pretrained(folder / "teacher")
    live.scheduler = LCMScheduler.from_config(live.scheduler.config)
    live.save_pretrained(folder / "lcm")
    sd.pipeline(sample_size=16).save_pretrained(folder / "large")
    opened = open_pipeline(str(folder / "teacher"))
    student = new_student(opened, Sampler(trailing(2)), Weights("lora", rank=2))
    torch.manual_seed(0)
    for p in student.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    save_lora(student, opened, folder / "lora")
    full = new_student(opened, Sampler(trailing(2)), Weights("lora", rank=2))
    full.load_state_dict(student.state_dict())
    save_pipeline(full, opened, folder / "fused", guidance=1.0)
    (folder / "judge.py").write_text(JUDGE)
    return folder


def of(elsewhere: Path, *students: Subject, **changes) -> Suite:
    """A suite on the tiny teacher."""
    teacher = Teacher(str(elsewhere / "teacher"), guidance=2.0)
    judge = f"{elsewhere / 'judge.py'}:judge"
    return Suite(teacher, students, (2,), (Ddim(), DpmPP2M()), (2,), 0, (0, 1), 6, judge, **changes)


def test_stock_pipelines_loras_and_hub_ids_are_students(
    ask: Ask, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"  # as it looks when owner/lcm was used before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    shutil.copytree(elsewhere / "lcm", hub / "models--owner--lcm" / "snapshots" / ("a" * 40))
    (hub / "models--owner--lcm" / "refs").mkdir()
    (hub / "models--owner--lcm" / "refs" / "main").write_text("a" * 40)
    students = (
        Subject(str(elsewhere / "lcm"), "lcm", guidance=1.0),
        Subject("owner/lcm", "from the hub"),
        Subject(lora=str(elsewhere / "lora"), name="lora"),
        Subject(str(elsewhere / "fused"), "fused"),
        Subject(str(elsewhere / "teacher"), "renoised", rule=Renoise(), steps=(1, 3), guidance=2.0),
    )
    records = ask(of(elsewhere, *students))
    value = {(r.subject, r.sampler, r.steps, r.nfe): r.value for r in records if r.metric == "frechet"}
    assert set(value) == {
        ("teacher", "ddim", 2, 4), ("teacher", "dpmpp2m", 2, 4), ("lcm", "renoise", 2, 2),
        ("from the hub", "renoise", 2, 2), ("lora", "ddim", 2, 2), ("fused", "ddim", 2, 2),
        ("renoised", "renoise", 1, 2), ("renoised", "renoise", 3, 6),
    }  # fmt: skip
    assert value["lcm", "renoise", 2, 2] == value["from the hub", "renoise", 2, 2]
    assert value["lora", "ddim", 2, 2] == pytest.approx(value["fused", "ddim", 2, 2], abs=0.05)
    assert value["lora", "ddim", 2, 2] != pytest.approx(value["lcm", "renoise", 2, 2], abs=0.05)
    assert {r.method for r in records if r.subject == "lora"} == {"LoRA"}
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "a cat" in page and "Where students fail" in page


def test_an_lcm_pipeline_is_sampled_as_diffusers_samples_it(elsewhere: Path, cache: Path) -> None:
    suite = of(elsewhere, Subject(str(elsewhere / "lcm"), "lcm", steps=(2,)))
    row = rows_of(suite, Cache(cache))[0][-1]
    sampled = open_row(row, suite)
    prompts = ["a cat", "a dog"]
    rngs = sample_rngs(7, range(2))
    noise = torch.cat([torch.randn(1, *sampled.opened.sample_shape, generator=g) for g in sample_rngs(7, range(2))])
    with torch.no_grad():
        latents = sampled.sampler.run(
            sampled.predict, noise, sampled.opened.encode(prompts), rngs_after_noise(7, noise)
        )
    pipeline = sampled.opened.pipeline
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    rngs = rngs_after_noise(7, noise)
    stock = pipeline(prompts, latents=noise.clone(), generator=rngs, **call).images
    torch.testing.assert_close(latents, stock, rtol=1e-3, atol=2e-3)


def rngs_after_noise(seed: int, noise: torch.Tensor) -> list[torch.Generator]:
    """Generators that have drawn the first noise."""
    rngs = sample_rngs(seed, range(len(noise)))
    for rng in rngs:
        torch.randn(1, *noise.shape[1:], generator=rng)
    return rngs


# What bad input gets


def test_students_that_cannot_be_measured_are_named(
    ask: Ask, suite: Suite, elsewhere: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model_index.json").write_text("{")
    shutil.copytree(elsewhere / "teacher", tmp_path / "pndm")
    config = json.loads((tmp_path / "pndm/scheduler/scheduler_config.json").read_text())
    index = json.loads((tmp_path / "pndm/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (tmp_path / "pndm/model_index.json").write_text(json.dumps(index))
    (tmp_path / "pndm/scheduler/scheduler_config.json").write_text(
        json.dumps(config | {"_class_name": "PNDMScheduler", "skip_prk_steps": True})
    )
    tiny = of(elsewhere)
    for base, subject, message in (
        (suite, Subject(str(tmp_path / "nowhere")), "nowhere: neither a run .* nor a pipeline folder .* nor a hub id"),
        (suite, Subject(str(tmp_path / "stopped")), "stopped: neither a run .*; its training has not ended"),
        (suite, Subject("owner/unknown"), "owner/unknown: no such folder, and as a hub id it is neither in the local"),
        (suite, Subject(str(tmp_path / "damaged")), "model_index.json is damaged"),
        (suite, Subject(lora=str(tmp_path / "none.safetensors")), "LoRA .*none.safetensors: no such file"),
        (suite, Subject(str(elsewhere / "fused"), "s"), "fused: a student of the family sd, but the teacher is of"),
        (tiny, Subject(str(elsewhere / "large"), "s"), r"student 's': makes images of shape \(3, 32, 32\), and the"),
        (tiny, Subject(str(runs / "two"), "s"), "two: a student of the family unet2d, but the teacher is of sd"),
        (tiny, Subject(str(tmp_path / "pndm"), "s"), r"student 's': PNDMScheduler is no student's .*rule=Renoise\(\)"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as error:
            ask(dataclasses.replace(base, students=(subject,)), teacher_steps=(1,), seeds=(0,))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_teacher_is_refused(ask: Ask, suite: Suite, runs: Path, tmp_path: Path) -> None:
    from stepdistill.recipes import find

    shutil.copytree(runs / "run", tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text(find("shapes_sd_dmd2").to_json())
    with pytest.raises(ValueError, match="its teacher is bundled:shapes-sd, and the suite's bundled:digits"):
        ask(dataclasses.replace(suite, students=(Subject(str(tmp_path / "run")),)))


def test_judges_that_do_not_fit_are_named(ask: Ask, elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(JUDGE.replace("MISSING = 0", "MISSING = 1"))
    (tmp_path / "other.py").write_text(JUDGE.replace("return Brightness(n)", "return Brightness(3)"))
    (tmp_path / "broken.py").write_text(JUDGE.replace("return Brightness(n)", "return 1 / 0"))
    base = of(elsewhere)
    for judge, message in (
        ("short.py:judge", "judges n = 6 images and gives 5 conditions"),
        ("other.py:judge", "judges n = 3 images, and is asked for n = 6"),
        ("broken.py:judge", "ZeroDivisionError"),
        ("short.py:jugde", "no function jugde in"),
        ("none.py:judge", "no file .*none.py"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ask(dataclasses.replace(base, judge=str(tmp_path / judge)))
    with pytest.raises(FileNotFoundError, match=r"no file gone\.npz"):
        ask(dataclasses.replace(base, judge_files=("gone.npz",)))
    with pytest.raises(ValueError, match="evaluation judges digits"):
        ask(dataclasses.replace(base, judge=""))


def test_places_that_cannot_be_written_are_found_before_anything_is_measured(
    ask: Ask, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    monkeypatch.setattr(measure, "open_row", None)
    for out, message in (
        (tmp_path / "file", "is a file; name a folder"),
        (tmp_path / "file" / "out", "file is no folder that can be written to"),
        (tmp_path / "run", "is a run, whose own results would be lost"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(suite, out)
    with pytest.raises(ValueError, match="--jobs must be at least 1"):
        ask(suite, jobs=0)
    with pytest.raises(ValueError, match="device 'cuda:99'"):
        ask(suite, device="cuda:99")


def test_different_protocols_are_refused(ask: Ask, elsewhere: Path, tmp_path: Path) -> None:
    """A judge that looks at some rows in another way than at others."""
    text = (
        JUDGE.replace('"resize": "none"', '"resize": "none" if STATE.pop() else "bicubic"') + "STATE = [0, 0, 1, 1]\n"
    )
    (tmp_path / "fickle.py").write_text(text)
    base = dataclasses.replace(of(elsewhere), judge=f"{tmp_path / 'fickle.py'}:judge", seeds=(0,))
    with pytest.raises(ValueError, match=r"frechet of 'teacher' and 'teacher' .* resize differs"):
        ask(base)
    assert not (tmp_path / "out" / "results.json").exists()
