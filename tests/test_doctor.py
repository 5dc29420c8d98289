"""Every check of the doctor: silent on a sound run, and the one to speak on a run broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.build import new_student, new_student_of, open_teacher
from stepdistill.checkpoint import checksum, read_checkpoint
from stepdistill.cli import main
from stepdistill.data import DigitsData, Prompts
from stepdistill.distill import distill
from stepdistill.doctor import CHECKS, QUICK, Examined, diagnose
from stepdistill.export import WEIGHTS, save_pipeline
from stepdistill.objectives import DMD2
from stepdistill.parts.gan import Gan
from stepdistill.parts.rollout import BackwardSim, FromData
from stepdistill.recipe import Evaluation, Recipe, Teacher, Weights
from stepdistill.sampling import Ddim, Renoise, Sampler, trailing
from stepdistill.trainer import AdamW, Run

SOUND = Recipe(
    teacher=Teacher("bundled:digits"),
    objective=DMD2(student_every=2, gan=Gan(weight=0.0)),
    data=DigitsData(),
    optim={name: AdamW(1e-4) for name in ("student", "critic")},
    sampler=Sampler(trailing(4), Ddim()),
    run=Run(steps=20, batch=8, ema=0.7, log_every=2, save_every=10, health_every=10),
)
NEWEST = "checkpoints/00000020.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with nothing wrong."""
    out = tmp_path_factory.mktemp("sound") / "run"
    distill(SOUND, out)
    return out


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def found(folder: Path) -> list[str]:
    """Names of what all checks find; all of them must have been made."""
    (diagnosis,) = diagnose(folder)
    assert diagnosis.not_checked == ()
    assert all("\n" not in str(finding) for finding in diagnosis.findings)
    return [finding.check for finding in diagnosis.findings]


def rewrite(folder: Path, recipe: Recipe) -> None:
    """Another recipe for the same run."""
    (folder / "recipe.json").write_text(recipe.to_json())


def resign(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change a checkpoint, and give it the checksum that belongs to the change."""
    meta, tensors = read_checkpoint(file)
    change(meta, tensors)
    text = json.dumps(meta)
    save_file(tensors, file, metadata={"stepdistill": text, "sha256": checksum(text, tensors)})


def replaced(file: Path, old: str, new: str) -> None:
    """One piece of a text file."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


# Sound runs


def test_a_sound_run_is_healthy_and_nothing_of_it_changes(sound: Path) -> None:
    def files() -> dict[str, tuple[bytes, int]]:
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(sound.rglob("*")) if p.is_file()}

    before = files()
    assert found(sound) == []
    assert files() == before


def test_a_sound_run_of_adapters_behind_a_warm_start_is_healthy(tmp_path: Path) -> None:
    adapters = Weights("lora", rank=2, targets=("conv1",))
    run = replace(SOUND.run, steps=6, save_every=3, health_every=0, ema=0.3)
    first = replace(SOUND, student=adapters, critic=adapters, run=run)
    recipe = replace(first, warm_start=first)
    distill(recipe, tmp_path)
    stage, whole = diagnose(tmp_path)
    assert (stage.folder.parent.name, whole.folder) == ("stages", tmp_path)
    assert stage.findings == whole.findings == stage.not_checked == whole.not_checked == ()


def test_a_run_under_way_is_healthy(run: Path) -> None:
    shutil.rmtree(run / "pipeline")
    (run / NEWEST).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:6]))  # to step 12; the checkpoint is of step 10
    assert found(run) == []


def test_quick_checks_open_no_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepdistill.doctor.run.open_teacher", None)
    monkeypatch.setattr("stepdistill.doctor.run.load_student", None)
    (diagnosis,) = diagnose(run, checks=QUICK)
    assert diagnosis.findings == diagnosis.not_checked == ()


# Of the recipe


def test_real_images_in_place_of_backward_simulation(run: Path) -> None:
    rewrite(run, replace(SOUND, objective=replace(SOUND.objective, rollout=FromData())))
    assert found(run) == ["no_backward_simulation"]
    rewrite(run, replace(SOUND, objective=replace(SOUND.objective, rollout=BackwardSim(last_only=True))))
    assert found(run) == ["no_backward_simulation"]


def test_a_learning_rate_of_zero_and_a_warm_up_without_end(run: Path) -> None:
    rewrite(run, replace(SOUND, optim=SOUND.optim | {"critic": AdamW(0.0)}))
    assert found(run) == ["critic_stands_still"]
    rewrite(run, replace(SOUND, optim=SOUND.optim | {"student": AdamW(1e-4, warmup=20)}))
    assert found(run) == ["student_warms_up"]


def test_an_average_that_still_holds_its_start(run: Path) -> None:
    """Ten updates of the student: 0.7^10 is 0.03 and 0.8^10 is 0.11."""
    rewrite(run, replace(SOUND, run=replace(SOUND.run, ema=0.8)))
    (diagnosis,) = diagnose(run, checks=QUICK)
    (finding,) = diagnosis.findings
    assert finding.check == "average_too_slow" and "weight 0.11 after its 10 updates" in finding.evidence


def test_guidance_counted_from_zero(run: Path) -> None:
    rewrite(run, replace(SOUND, teacher=Teacher("bundled:digits", guidance=0.0)))
    assert found(run) == ["guidance_below_one"]


def test_a_recipe_that_cannot_be_read_is_a_finding(run: Path) -> None:
    (run / "recipe.json").write_text('{"type": "Recipe", "teach')
    assert found(run) == ["bad_recipe"]


# Of the files


def test_a_student_that_started_elsewhere(run: Path) -> None:
    lines = (run / "health.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"start_gap": 0.2}
    (run / "health.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    assert found(run) == ["starts_elsewhere"]
    rewrite(run, replace(SOUND, student=Weights(layers=1)))  # of fewer layers it is another network from the start
    assert [f.check for f in diagnose(run, checks=QUICK)[0].findings] == []


def test_curves_are_looked_through(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]
    lines[-1]["diversity"] *= 0.2
    (run / "health.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert found(run) == ["collapsed"]


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_named_and_left_where_it_is(run: Path, how: str) -> None:
    file = run / NEWEST
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes({"flipped": bytes(raw), "cut": bytes(raw[:1000]), "empty": b""}[how])
    # the export is then held against the checkpoint before it, which is neither the average's nor the student's
    assert found(run) == ["damaged_checkpoint"]
    assert file.exists()
    (finding,) = diagnose(run, checks=QUICK)[0].findings
    assert "00000010.safetensors" in finding.cure


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(run: Path, bad: float) -> None:
    def spoil(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["nets.student.net.conv_in.weight"][0, 0, 0, 0] = bad

    resign(run / NEWEST, spoil)
    (finding,) = diagnose(run, checks=QUICK)[0].findings
    assert finding.check == "bad_weights" and "1 of " in finding.evidence and "conv_in" in finding.evidence


def test_exported_weights_that_are_not_finite(run: Path) -> None:
    file = run / "pipeline" / "unet" / WEIGHTS
    state = load_file(file)
    state["conv_out.bias"][:] = float("nan")
    save_file(state, file)
    assert found(run) == ["bad_weights"]


def test_metrics_that_end_early_or_are_torn_or_have_gaps(run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]))
    assert found(run) == ["metrics_end_early"]
    file.write_text("".join([*lines[:6], '{"step": 14, "stu', *lines[7:]]))
    (finding,) = diagnose(run, checks=QUICK)[0].findings
    assert finding.check == "metrics_end_early" and "its line 7 cannot be read" in finding.evidence
    file.write_text("".join(lines[:3] + lines[5:]))
    (finding,) = diagnose(run, checks=QUICK)[0].findings
    assert finding.check == "metrics_have_gaps" and "2 lines are missing, the first at step 8" in finding.evidence


def test_a_run_that_stopped_early_may_end_anywhere(run: Path) -> None:
    (run / NEWEST).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]))  # to step 10, as the checkpoint
    assert found(run) == ["metrics_end_early"]
    rewrite(run, replace(SOUND, evaluation=Evaluation(every=5, keep_best="fd", patience=1)))
    assert found(run) == []
    (run / "metrics.jsonl").write_text("".join(lines[:4]))
    assert found(run) == ["metrics_end_early"]


def test_a_run_that_nobody_goes_on_with(run: Path) -> None:
    shutil.rmtree(run / "pipeline")
    (run / NEWEST).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:6]))
    os.utime(run / "metrics.jsonl", (time.time() - 7200,) * 2)
    assert found(run) == ["stopped"]


def test_leftovers_of_killed_writers(run: Path) -> None:
    (run / "checkpoints" / ".00000030.safetensors.part").write_bytes(b"x" * 2_000_000)
    (run / ".pipeline.123.old").mkdir()
    (run / ".pipeline.123.old" / "weights").write_bytes(b"x" * 1_000_000)
    (finding,) = diagnose(run, checks=QUICK)[0].findings
    assert finding.check == "leftovers" and "2 of them with 3.0 MB" in finding.evidence
    assert (run / "checkpoints" / ".00000030.safetensors.part").exists()


def test_a_disk_without_room_for_a_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(run / "pipeline")
    usage = shutil.disk_usage(run)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert [f.check for f in diagnose(run, checks=QUICK)[0].findings] == ["disk_full"]


# Of the networks


def test_an_export_of_the_raw_student(run: Path) -> None:
    opened = open_teacher(SOUND.teacher)
    student = new_student_of(SOUND, opened)
    student.load_state_dict(Examined(run, SOUND).state("student"))
    save_pipeline(student, opened, run / "pipeline")
    assert found(run) == ["average_not_applied"]


@pytest.mark.parametrize("role", ["critic", "student"])
def test_a_player_that_has_never_moved(run: Path, role: str) -> None:
    opened = open_teacher(SOUND.teacher)
    fresh = {f"nets.{role}.{k}": v for k, v in new_student_of(SOUND, opened).state_dict().items()}
    resign(run / NEWEST, lambda meta, tensors: tensors.update(fresh))
    assert found(run) == [f"{role}_never_moved"]


def test_adapters_that_have_never_moved(tmp_path: Path) -> None:
    """Their first factors start at random, so only the second ones tell."""
    critic = Weights("lora", rank=2, targets=("conv1",))
    recipe = replace(SOUND, critic=critic, run=replace(SOUND.run, steps=4, save_every=0, ema=0.1, health_every=0))
    distill(recipe, tmp_path)
    assert found(tmp_path) == []

    def zero(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            if name.startswith("nets.critic.") and "lora_B" in name:
                value.zero_()

    resign(tmp_path / "checkpoints/00000004.safetensors", zero)
    assert found(tmp_path) == ["critic_never_moved"]


def test_a_scheduler_that_was_changed(run: Path) -> None:
    replaced(run / "pipeline/scheduler/scheduler_config.json", '"trailing"', '"leading"')
    (diagnosis,) = diagnose(run)
    assert [f.check for f in diagnosis.findings] == ["bad_pipeline"]
    assert "timesteps" in diagnosis.findings[0].evidence
    assert diagnosis.not_checked  # the average cannot be looked for in there


def test_a_pipeline_with_another_grid(run: Path) -> None:
    """Sound in itself: the pipeline of another run."""
    opened = open_teacher(SOUND.teacher)
    student = new_student(opened, Sampler(trailing(2), Ddim()))
    student.load_state_dict(Examined(run, SOUND).state("ema"))
    save_pipeline(student, opened, run / "pipeline")
    (finding,) = diagnose(run)[0].findings
    assert (
        finding.check == "timesteps" and "[1, 0.5]" in finding.evidence and "[1, 0.75, 0.5, 0.25]" in finding.evidence
    )


def test_a_pipeline_with_another_rule(run: Path) -> None:
    opened = open_teacher(SOUND.teacher)
    student = new_student(opened, Sampler(trailing(4), Renoise()))
    student.load_state_dict(Examined(run, SOUND).state("ema"))
    save_pipeline(student, opened, run / "pipeline")
    assert found(run) == ["rule"]


def test_a_trained_student_that_was_not_exported(run: Path) -> None:
    shutil.rmtree(run / "pipeline")
    assert found(run) == ["not_exported"]


PROMPTED = Recipe(
    teacher=Teacher("bundled:shapes-sd", guidance=3.0),
    objective=SOUND.objective,
    data=Prompts(prompts=("a red circle",)),
    optim=SOUND.optim,
    sampler=Sampler(trailing(1), Ddim()),
)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image run, exported and not trained."""
    out = tmp_path_factory.mktemp("prompted")
    rewrite(out, PROMPTED)
    opened = open_teacher(PROMPTED.teacher)
    save_pipeline(new_student_of(PROMPTED, opened), opened, out / "pipeline")
    return out


def guidance_of(folder: Path) -> list[str]:
    """What is said of guidance."""
    (diagnosis,) = diagnose(folder)
    return [f"{f.what}: {f.evidence}" for f in diagnosis.findings if f.check == "guidance"]


def test_guidance_that_is_part_of_the_student_and_switched_on_again(prompted: Path, tmp_path: Path) -> None:
    assert guidance_of(prompted) == []
    run = Path(shutil.copytree(prompted, tmp_path / "run"))
    replaced(run / "pipeline/scheduler/scheduler_config.json", '"guidance_scale": 1.0', '"guidance_scale": 3.0')
    (text,) = guidance_of(run)
    assert "guided again" in text and "guidance_scale 3 where 1 is right" in text
    rewrite(run, replace(PROMPTED, teacher=Teacher("bundled:shapes-sd"), null_rate=0.1))
    assert guidance_of(run) == []  # a student that has kept its null condition may be guided


def test_guidance_that_a_student_is_told_off_by_one(prompted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(prompted, tmp_path / "run"))
    teacher = Teacher("bundled:shapes-sd", guidance_range=(2.0, 6.0))
    rewrite(run, replace(PROMPTED, teacher=teacher, student=Weights(told_guidance=True)))
    config = run / "pipeline/scheduler/scheduler_config.json"
    replaced(config, '"guidance_scale": 1.0', '"guidance_scale": 4.0')
    assert guidance_of(run) == []  # the middle of the range
    replaced(config, '"guidance_scale": 4.0', '"guidance_scale": 3.0')
    (text,) = guidance_of(run)
    assert "off by one" in text and "guidance_scale 3 where 4 is right" in text


# The command


def test_the_command_prints_a_line_for_each_finding_and_exits_with_one(
    run: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", str(sound), "--quick"])
    assert capsys.readouterr().out == f"{sound}: nothing found\n"
    (run / NEWEST).write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(run), "--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 1 and lines[0] == f"{run}: 1 found"
    assert lines[1].startswith("- a checkpoint is damaged: 00000020.safetensors")


def test_the_command_prints_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / NEWEST).write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["doctor", str(run), "--json", "--quick"])
    (stage,) = json.loads(capsys.readouterr().out)
    assert stage["folder"] == str(run) and stage["not_checked"] == []
    assert [f["check"] for f in stage["findings"]] == ["damaged_checkpoint"]
    assert stage["findings"][0].keys() == {"check", "what", "evidence", "cause", "cure"}


def test_what_is_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(tmp_path)])
    assert stopped.value.code == 2 and "no recipe.json" in capsys.readouterr().err


def test_a_teacher_that_cannot_be_opened_leaves_checks_that_are_named(run: Path) -> None:
    rewrite(run, replace(SOUND, teacher=Teacher("no/where")))
    (diagnosis,) = diagnose(run)
    assert diagnosis.findings == ()
    assert [line.partition(":")[0] for line in diagnosis.not_checked] == ["average_not_applied", "never_moved"]


def test_every_check_says_what_it_is_for() -> None:
    assert all(check.__doc__ for check in CHECKS) and len({check.__name__ for check in CHECKS}) == len(CHECKS)


def test_nothing_draws_from_the_global_stream(run: Path) -> None:
    before = torch.random.get_rng_state()
    diagnose(run, checks=QUICK)
    assert torch.equal(torch.random.get_rng_state(), before)
