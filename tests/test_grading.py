"""From probabilities and measures to a grade: exact values, and no made-up score."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.judging.agreement import agreement, spearman, weighted_kappa
from cpt_ray.rubrics.grading import (
    aggregate,
    grade_answer,
    interpolate,
    judged_criterion,
    measured_criterion,
    voted_criteria,
)
from cpt_ray.rubrics.measures import measures
from tests.builders import make_grade, make_rubric

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


def test_two_extremes_are_no_middle() -> None:
    grade = judged_criterion(RUBRIC, WORDS, {1: math.log(0.5), 2: math.log(0.1), 3: math.log(0.4)})
    assert (grade.score, grade.reason) == (None, "judge is of two minds (50% low, 10% mid, 40% high)")
    assert judged_criterion(RUBRIC, WORDS, {1: math.log(0.3), 2: math.log(0.4), 3: math.log(0.3)}).score == 50
    assert judged_criterion(RUBRIC, WORDS, {1: math.log(0.8), 3: math.log(0.2)}).score == pytest.approx(26)


def test_a_measure_interpolates_between_the_levels_values() -> None:
    assert measured_criterion(RUBRIC, BANGS, "A! B.").score == pytest.approx(50.0)
    assert measured_criterion(RUBRIC, BANGS, "A. B. C! D.").score == pytest.approx(30.0)
    for text, why in (
        ("...", "it has no word (numbers and signs are none)"),
        ("วันนี้อากาศดี!", "its script is written without spaces"),
    ):
        grade = measured_criterion(RUBRIC, BANGS, text)
        assert grade.score is None
        assert grade.reason.startswith(f"exclamation_density is undefined for this text: {why}")


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


def test_measures_give_known_values() -> None:
    text = "Don't shout! The dog, the cat. Why?"

    def measure(name: str, words: tuple[str, ...] = (), against: tuple[str, ...] = ()) -> float | None:
        return measures(text, words, against)[name]

    assert measure("word_count") == 7
    assert measure("words_per_sentence") == pytest.approx(7 / 3)
    assert measure("exclamation_density") == pytest.approx(1 / 3)
    assert measure("question_density") == pytest.approx(1 / 3)
    assert measure("unique_word_share") == pytest.approx(6 / 7)
    assert measure("word_share", ("the", "don't")) == pytest.approx(3 / 7)
    assert measure("word_balance", ("dog",), ("the",)) == pytest.approx(1 / 3)
    assert measure("word_balance", ("fish",), ("bird",)) is None


def test_votes_are_averaged_and_what_is_no_verdict_does_not_vote() -> None:
    def vote(level: object) -> str:
        return json.dumps({"words": {"reason": f"level {level}", "level": level}})

    over_two_lines = '{"words": {"reason": "So\nit is.", "level": 2}}'
    (grade,) = voted_criteria(RUBRIC, [vote(1), over_two_lines, "not JSON", vote(4)])
    assert (grade.score, grade.reason) == (30.0, "level 1")
    (grade,) = voted_criteria(RUBRIC, [vote(1), vote(3)])
    assert (grade.score, grade.reason) == (None, "judge is of two minds (50% low, 0% mid, 50% high)")
    (grade,) = voted_criteria(RUBRIC, [vote(1), vote(2), vote(3)])
    assert grade.score == 50
    for unreadable in (vote("2"), vote(True), vote(0), vote(None), "[]", "{}", '"high"'):
        (grade,) = voted_criteria(RUBRIC, [unreadable])
        assert (grade.score, grade.reason) == (None, "unreadable verdict (1 of 1 votes)")


def test_judges_are_combined_by_name() -> None:
    def combined(how: str, *scores: float | None) -> float | None:
        return aggregate(RUBRIC, [make_grade("u", score) for score in scores], how).score

    assert combined("mean", 10, 20, 90) == 40
    assert combined("median", 10, 20, 90) == 20
    assert combined("min", 10, 20, 90) == 10
    assert combined("majority", 10, 20, 90) == 15  # two of them say low
    assert combined("majority", 10, 90) is None
    assert combined("mean", 10, None) is None
    assert aggregate(RUBRIC, [make_grade("u", 10), make_grade("u", 90)], "majority").reason == (
        "no majority: 1 high, 1 low"
    )


def test_agreement_has_the_textbook_values() -> None:
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert spearman([1, 1], [1, 2]) is None
    assert weighted_kappa([0, 1, 2], [0, 1, 2], 3) == 1.0
    assert weighted_kappa([0, 0, 1, 1], [0, 1, 0, 1], 2) == 0.0
    assert weighted_kappa([0, 1, 2, 2], [0, 2, 2, 1], 3) == pytest.approx(1 - 2 / 5.5)
    found = agreement(RUBRIC, [(10, 10), (20, 10), (90, 90), (60, 90)])
    assert (found["same_level"], found["mean_score_per_level"]) == (0.75, {"low": 15.0, "high": 75.0})
