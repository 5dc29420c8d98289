"""From predictors to records: pictures in parts, guidance and evaluations counted, every metric under its own judge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill.build import new_student
from stepdistill.evaluation import benchmark
from stepdistill.evaluation.benchmark import bench_student, bench_teacher, check_judged, evaluator_for, pictures
from stepdistill.evaluation.columns import SECONDS
from stepdistill.evaluation.digits import DigitsEvaluator
from stepdistill.evaluation.grids import Grid
from stepdistill.evaluation.report import write_report
from stepdistill.models.denoiser import Cond, Guided
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.recipe import Weights
from stepdistill.sampling import Sampler, trailing
from tests.tiny import sd, sd3, unet2d

TWO_STEPS = Sampler(trailing(2))


class Brightness:
    """Two judges that look at the mean."""

    n = 5

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def cond(self, opened: Opened) -> Cond:
        return opened.encode(["a", "b", "c", "d", "e"])

    def scores(self, images: Tensor) -> dict[str, float]:
        self.seen.append(images)
        return {"fd": float(images.float().mean()), "clip_score": 1.0}

    def ceiling(self) -> dict[str, float]:
        return {"fd": 0.5}

    def protocol(self, metric: str) -> dict[str, int | str]:
        judge = ("a" if metric == "clip_score" else "b") * 64
        return {"n": self.n, "extractor_sha256": judge, "reference_sha256": "c" * 64, "resize": "none"}


@pytest.fixture(scope="module")
def opened() -> Opened:
    """A tiny latent pipeline."""
    return open_pipeline(sd.pipeline())


def test_pictures_are_the_same_in_parts(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, cond = Guided(opened.denoiser, 2.0, opened.null), opened.encode(["a", "b", "c", "d", "e"])
    whole = list(pictures(teacher, TWO_STEPS, opened, cond, 5, seed=3))
    monkeypatch.setattr(benchmark, "AT_ONCE", 2)
    parts = list(pictures(teacher, TWO_STEPS, opened, cond, 5, seed=3))
    assert [len(part) for part in whole] == [5] and [len(part) for part in parts] == [2, 2, 1]
    assert whole[0].shape == (5, 3, 16, 16) and whole[0].dtype == torch.uint8
    torch.testing.assert_close(torch.cat(parts), whole[0], rtol=0, atol=1)


def test_records_name_guidance_evaluations_and_judges(opened: Opened) -> None:
    evaluator = Brightness()
    teacher = Guided(opened.denoiser, 2.0, opened.null)
    records = bench_teacher(teacher, opened, evaluator, (1, 2), (0, 1))
    assert {(r.steps, r.nfe, r.guidance, r.method) for r in records} == {(1, 2, 2.0, "-"), (2, 4, 2.0, "-")}
    assert {r.metric: r.extractor_sha256[0] for r in records} == {"fd": "b", "clip_score": "a", SECONDS: "b"}
    assert all(r.seeds == [0, 1] and r.n == 5 for r in records)
    assert not torch.equal(evaluator.seen[0], evaluator.seen[1])
    told = bench_teacher(Guided(opened.denoiser, 2.0, told=True), opened, evaluator, (2,), (0,))
    assert {(r.nfe, r.guidance) for r in told} == {(2, 2.0)}  # told its scale, it is evaluated once

    records = bench_student(new_student(opened, TWO_STEPS), opened, evaluator, (0,), subject="s", method="KD")
    assert {(r.subject, r.role, r.steps, r.nfe, r.guidance) for r in records} == {("s", "student", 2, 2, 1.0)}


def test_students_that_take_a_scale_are_told_it(opened: Opened) -> None:
    student = new_student(opened, TWO_STEPS, Weights(told_guidance=True))
    assert bench_student(student, opened, Brightness(), (0,), subject="s", method="CD", told=3.0)
    with pytest.raises(ValueError, match="told the guidance scale"):
        bench_student(student, opened, Brightness(), (0,), subject="s", method="CD")


def test_what_a_teacher_makes_chooses_its_benchmark(opened: Opened) -> None:
    digits = open_pipeline(unet2d.pipeline(in_channels=1, out_channels=1))
    evaluator = evaluator_for(digits, 20)
    assert isinstance(evaluator, DigitsEvaluator) and evaluator.cond(digits) == {} and evaluator.ceiling() == {}
    for make in (sd.pipeline, sd3.pipeline):
        check_judged(open_pipeline(make(sample_size=16)))  # 32x32 pixels
    for other in (opened, open_pipeline(unet2d.pipeline())):
        with pytest.raises(
            ValueError, match=r"evaluation judges digits .* and captioned shapes .* leave evaluation out"
        ):
            check_judged(other)


def test_a_report_names_its_columns_once(opened: Opened, tmp_path: Path) -> None:
    records = bench_student(new_student(opened, TWO_STEPS), opened, Brightness(), (0,), subject="s", method="KD")
    grid = Grid("one", torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 2, ("a <red> ring", "rain"))
    grids = [grid, grid._replace(title="two")]
    page = write_report(tmp_path, title="t", records=records, grids=grids, curves=None, load_code="x", notes="Real: 1.")
    text = page.read_text()
    assert text.count("Columns, from the left: 1. a &lt;red&gt; ring; 2. rain</p>") == 1
    assert "<p>Real: 1.</p>" in text
