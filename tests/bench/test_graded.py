"""Judges that grade: single images get numbers, and the page tells where students fall behind their teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepdistill.bench import Subject, Suite
from stepdistill.bench.cache import Cache, key_of
from stepdistill.bench.measure import asked_of, measure_row, outcomes
from stepdistill.bench.output import records_from
from stepdistill.bench.page import failures_of
from stepdistill.bench.rows import rows_of
from stepdistill.evaluation.benchmark import Graded, evaluator_for
from stepdistill.evaluation.clip import open_clip_model
from stepdistill.evaluation.evaluator import FeatureEvaluator
from stepdistill.evaluation.reference import Reference
from stepdistill.models.families import open_pipeline
from stepdistill.paths import project_dir
from stepdistill.recipe import Teacher
from stepdistill.sampling import Ddim
from tests.bench.test_page import outcome
from tests.evaluation.test_evaluator import Mean4, scenes
from tests.tiny import sd

JUDGE = """
import torch
from stepdistill.evaluation.evaluator import FeatureEvaluator
from stepdistill.evaluation.reference import Reference
from tests.evaluation.test_evaluator import Mean4

def judge(opened, n):
    rng = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (30, 3, 16, 16), generator=rng).to(torch.uint8)
    prompts = ["a cat", "a dog", "rain", "a cat", "snow", "sun"]
    return FeatureEvaluator(Mean4(), Reference.of_images(real, Mean4()), prompts=prompts, k=2, metrics=["kid"])
"""


def test_grades_are_clip_scores_or_distances_to_the_nearest_reference() -> None:
    reference = Reference.of_images(scenes(300, 0), Mean4())
    images, labels = scenes(20, 5), torch.arange(20) % 3
    by_class = FeatureEvaluator(Mean4(), reference, labels=labels, metrics=["kid"])
    scores, grades = by_class.scores_and_grades(images)
    own, real = Mean4()(images), Mean4()(scenes(300, 0))
    nearest = torch.stack([(real - one).square().sum(1).sqrt().min() for one in own])
    torch.testing.assert_close(grades, nearest, atol=1e-4, rtol=1e-4)
    assert by_class.grade == "nearest" and scores == by_class.scores(images)
    assert by_class.asked()[:4] == ["class 0", "class 1", "class 2", "class 0"]
    clip = open_clip_model(project_dir("assets") / "shapes-judges" / "clip")
    prompts = [f"a {word} circle" for word in ("red", "blue")] * 10
    by_prompt = FeatureEvaluator(Mean4(), reference, prompts=prompts, clip=clip)
    scores, grades = by_prompt.scores_and_grades(images)
    torch.testing.assert_close(grades, clip.scores(images, prompts))
    assert by_prompt.grade == "clip_score" and scores["clip_score"] == pytest.approx(float(grades.double().mean()))
    assert by_prompt.asked() == prompts and isinstance(by_prompt, Graded)
    unasked = FeatureEvaluator(Mean4(), reference, n=20)
    assert unasked.grade == "" and unasked.asked() == [] and len(unasked.scores_and_grades(images)[1]) == 0


@pytest.mark.filterwarnings("ignore:6 images for 12 features")
def test_a_bench_keeps_grades_and_pictures_of_the_worst(tmp_path: Path) -> None:
    sd.pipeline().save_pretrained(tmp_path / "teacher")
    (tmp_path / "judge.py").write_text(JUDGE)
    teacher = Teacher(str(tmp_path / "teacher"), guidance=2.0)
    student = Subject(str(tmp_path / "teacher"), "unguided", rule=Ddim(), guidance=1.0)
    suite = Suite(teacher, (student,), (1,), (Ddim(),), (2,), 0, (0, 1), 6, f"{tmp_path / 'judge.py'}:judge")
    cache = Cache(tmp_path / "cache")
    rows, _ = rows_of(suite, cache)
    asked = asked_of(suite, rows, cache)
    for one in asked:
        measure_row(suite, one, suite.seeds, True, cache)
        cache.save(key_of(one.time), one.time, {"seconds": [0.1, 0.2], "device": "cpu"})
    found = outcomes(asked, cache)
    for one in found:
        first, second = one.scores[0], one.scores[1]
        order = sorted(range(6), key=lambda i: -first["grades"][i])  # the furthest from all references
        assert first["failures"]["items"] == order and second["failures"] is None
        assert one.look["captions"] == first["asked"] and first["grade"] == "nearest"
    evaluator = evaluator_for(open_pipeline(teacher.source), 6, suite.judge)
    assert found[0].scores[0]["asked"] == evaluator.asked()
    (told,) = failures_of(found, records_from(found))
    gap = {}
    for value, sign in [(v, 1) for v in found[1].scores.values()] + [(v, -1) for v in found[0].scores.values()]:
        for what, grade in zip(value["asked"], value["grades"], strict=True):
            gap[what] = gap.get(what, 0.0) + sign * grade / (4 if what == "a cat" else 2)
    behind = sorted((what for what in gap if gap[what] > 0), key=lambda what: -gap[what])
    assert [what for what, _, _ in told.worst] == behind
    assert all(own.endswith(" of 4" if what == "a cat" else " of 2") for what, own, _ in told.worst)


def test_what_the_teacher_grades_as_badly_is_not_the_students_worst() -> None:
    def graded(name: str, role: str, steps: int, grades: list[float]):
        one = outcome(name, role, steps, (1.0, 2.0))
        keep = {k: v for k, v in one.scores[0].items() if k != "right"}
        value = keep | {"grade": "clip_score", "grades": grades, "asked": ["x", "y", "z", "x", "y"]}
        return replace(one, scores={0: value | {"failures": None}, 1: value})

    teacher = graded("teacher", "teacher", 50, [30.0, 10.0, 20.0, 32.0, 10.0])
    student = graded("s", "student", 1, [29.0, 10.0, 25.0, 27.0, 9.0])
    (told,) = failures_of([teacher, student], records_from([teacher, student]))
    assert told.worst == (("x", "28 of 4", "31 of 4"), ("y", "9.5 of 4", "10 of 4"))
    assert told.summary == "CLIP score 20, teacher's long run 20.4" and told.measure == "CLIP score, mean of images"
