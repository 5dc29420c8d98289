"""Every symptom: found where it is, and not where a run is merely young or on its way."""

from __future__ import annotations

import pytest

from stepdistill.logging import Line
from stepdistill.symptoms import SYMPTOMS, Curves

TEACHER = {"teacher_diversity": 0.4, "teacher_contrast": 0.7, "teacher_saturation": 0.5, "teacher_largest": 1.1}
SOUND = {"diversity": 0.38, "contrast": 0.7, "saturation": 0.5, "outside": 0.0, "average_gap": 0.1}


def health(*changes: dict[str, float], every: int = 100) -> list[Line]:
    """Lines of a sound run but for some figures."""
    return [{"step": i * every} | TEACHER | SOUND | change for i, change in enumerate(changes)]


def metrics(name: str, values: list[float], every: int = 20) -> list[Line]:
    """Lines with one figure."""
    return [{"step": (i + 1) * every, name: value} for i, value in enumerate(values)]


def found(lines: list[Line], logged: list[Line] | None = None, steps: int = 1000) -> list[str]:
    """Names of all checks that find something."""
    curves = Curves(lines, logged or [], steps)
    return [finding.check for symptom in SYMPTOMS for finding in symptom(curves)]


def test_a_sound_run_has_none() -> None:
    logged = [{"step": 20 * (i + 1), "fit/disc_accuracy": 0.7, "student/grad_norm": 1.0 + i % 3} for i in range(50)]
    assert found(health(*[{}] * 11), logged) == []
    assert found([], []) == []


def test_a_student_that_lost_its_diversity_has_collapsed() -> None:
    assert found(health({"diversity": 0.4}, {"diversity": 0.19})) == ["collapsed"]
    assert found(health({"diversity": 0.4}, {"diversity": 0.21})) == []  # half of the teacher's 0.4 is the limit


def test_a_student_that_starts_alike_and_spreads_has_not_collapsed_and_one_that_stays_alike_has() -> None:
    rising = [{"diversity": 0.05 + 0.01 * i} for i in range(8)]
    assert found(health(*rising)) == []
    assert found(health(*[{"diversity": 0.1}] * 4)) == []
    assert found(health(*[{"diversity": 0.1}] * 6)) == ["collapsed"]  # step 500 of 1000


@pytest.mark.parametrize("figure", ["contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.7, 1.5])
def test_tone_that_drifts_from_the_teachers_is_named_with_its_direction(figure: str, factor: float) -> None:
    lines = health({}, {figure: SOUND[figure] * factor})
    assert found(lines) == [f"{figure}_drifts"]
    (finding,) = [f for s in SYMPTOMS for f in s(Curves(lines, [], 1000))]
    assert ("above" if factor > 1 else "below") in finding.what and f"{factor:.2f} times" in finding.evidence


def test_tone_that_comes_nearer_is_left_to_come() -> None:
    nearing = [{"contrast": 0.3 + 0.02 * i} for i in range(9)]
    assert found(health(*nearing)) == []


def test_outputs_that_leave_the_teachers_range_are_named() -> None:
    assert found(health({}, {"outside": 0.04})) == ["out_of_range"]
    assert found(health({}, {"outside": 0.02})) == []
    assert found(health({"outside": 0.1}, {"outside": 0.05})) == []  # a start that mends itself


def test_a_slow_average_is_named_when_half_is_done() -> None:
    assert found(health(*[{"average_gap": 0.6}] * 4)) == []
    assert found(health(*[{"average_gap": 0.6}] * 6)) == ["average_lags"]


def test_a_critic_that_is_worse_than_the_teacher_twice_in_a_row_lags() -> None:
    start, good, bad = ({"critic_error": e, "teacher_error": 0.2} for e in (0.2, 0.15, 0.23))
    assert found(health(start, bad, bad)) == ["critic_lags"]
    assert found(health(start, bad)) == found(health(start, bad, good)) == found(health(start, good, bad)) == []


def test_a_discriminator_at_chance_or_always_right_is_named_after_300_steps() -> None:
    for value, name in ((0.5, "guessing"), (0.99, "winning")):
        assert found([], metrics("critic+disc/disc_accuracy", [value] * 15)) == [name]
        assert found([], metrics("critic+disc/disc_accuracy", [value] * 14)) == []
        assert found([], metrics("critic+disc/disc_accuracy", [value] * 14 + [0.7] + [value] * 14)) == []
        assert found([], metrics("critic+disc/disc_accuracy", [0.7, *[value] * 15])) == [name]


def test_a_gradient_norm_far_above_those_before_it_is_a_spike() -> None:
    usual = [1.0, 2.0, 1.5, 1.2, 0.8, 1.1]
    assert found([], metrics("student/grad_norm", [*usual, 30.0, 1.0])) == ["spikes"]
    assert found([], metrics("student/grad_norm", [*usual, 5.0, 1.0])) == []
    assert found([], metrics("student/grad_norm", [1.0, 30.0, *usual])) == []  # the first updates may jump
    assert found([], metrics("student/loss", [*usual, 30.0, 1.0])) == []


def test_a_loss_scale_that_fell_far_is_named() -> None:
    assert found([], metrics("student/loss_scale", [2.0**16, 2.0**12, 2.0**7])) == ["scale_collapses"]
    assert found([], metrics("student/loss_scale", [2.0**16, 2.0**11])) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_named_with_its_step(bad: float) -> None:
    assert found(health({}, {"diversity": bad}))[0] == "not_finite"
    lines = metrics("student/loss", [1.0, bad])
    (finding,) = next(iter(SYMPTOMS))(Curves([], lines, 1000))
    assert "step 40" in finding.evidence and "metrics.jsonl" in finding.evidence


def test_a_finding_is_one_line_with_cause_and_cure() -> None:
    curves = Curves(health({"diversity": 0.4}, {"diversity": 0.1}), [], 1000)
    (finding,) = [f for s in SYMPTOMS for f in s(curves)]
    text = str(finding)
    assert "\n" not in text and "25%" in text and "Likely cause:" in text and "What to do:" in text
