"""From probabilities and measures to a grade: exact values, and no made-up score."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.grading import grade_answer, interpolate, judged_criterion, measured_criterion
from cpt_ray.measures import MEASURES
from tests.builders import make_rubric

RUBRIC = make_rubric()
WORDS, BANGS = RUBRIC.criteria


def test_a_certain_verdict_is_the_levels_anchor() -> None:
    for number, level in enumerate(RUBRIC.levels, start=1):
        assert judged_criterion(RUBRIC, WORDS, {number: 0.0}).score == level.score


def test_an_even_verdict_between_two_levels_is_half_way() -> None:
    half = math.log(0.5)
    assert judged_criterion(RUBRIC, WORDS, {1: half, 2: half}).score == pytest.approx(30.0)


def test_a_verdict_off_the_level_tokens_is_ungraded_with_its_reason() -> None:
    for logprobs in ({}, {1: math.log(0.2), 2: math.log(0.2)}, {1: float("nan")}, {1: float("-inf")}):
        grade = judged_criterion(RUBRIC, WORDS, logprobs)
        assert grade.score is None
        assert "of its probability" in grade.reason


def test_a_measure_interpolates_between_the_levels_values() -> None:
    assert measured_criterion(RUBRIC, BANGS, "A! B.").score == pytest.approx(50.0)
    assert measured_criterion(RUBRIC, BANGS, "A. B. C! D.").score == pytest.approx(30.0)
    assert measured_criterion(RUBRIC, BANGS, "...").score is None


def test_the_grade_is_weighted_and_ungraded_if_any_part_is() -> None:
    grade = grade_answer(RUBRIC, "u", "A! B!", [judged_criterion(RUBRIC, WORDS, {1: 0.0})], "judge")
    assert (grade.score, grade.judged, grade.measured) == (pytest.approx(0.6 * 10 + 0.4 * 90), 10, 90)
    grade = grade_answer(RUBRIC, "u", "A! B!", [judged_criterion(RUBRIC, WORDS, {})], "judge")
    assert grade.score is None
    assert grade.reason.startswith("words: judge put 0%")


@given(st.lists(st.floats(-20, 0), min_size=3, max_size=3), st.floats(-100, 1000))
def test_scores_stay_between_the_outer_anchors(logprobs: list[float], value: float) -> None:
    score = judged_criterion(RUBRIC, WORDS, dict(enumerate(logprobs, start=1))).score
    assert score is None or 10 - 1e-9 <= score <= 90 + 1e-9
    assert 10 <= interpolate(value, [(0, 10), (1, 50), (2, 90)]) <= 90


@given(st.text(max_size=200), st.sampled_from(sorted(MEASURES)))
def test_every_measure_takes_every_text(text: str, name: str) -> None:
    value = MEASURES[name](text, ("a", "b"), ("c",))
    assert value is None or value >= 0


def test_measures_give_known_values() -> None:
    text = "Don't shout! The dog, the cat. Why?"

    def measure(name: str, words: tuple[str, ...] = (), against: tuple[str, ...] = ()) -> float | None:
        return MEASURES[name](text, words, against)

    assert measure("word_count") == 7
    assert measure("words_per_sentence") == pytest.approx(7 / 3)
    assert measure("exclamation_density") == pytest.approx(1 / 3)
    assert measure("question_density") == pytest.approx(1 / 3)
    assert measure("unique_word_share") == pytest.approx(6 / 7)
    assert measure("word_share", ("the", "don't")) == pytest.approx(3 / 7)
    assert measure("word_balance", ("dog",), ("the",)) == pytest.approx(1 / 3)
    assert measure("word_balance", ("fish",), ("bird",)) is None
