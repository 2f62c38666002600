"""Slopes, crosstalk and perplexity against values known by construction."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_ray.evaluation.dials import check_score
from cpt_ray.evaluation.scoring import score_trials
from cpt_ray.judging.spread import CHECK, survey
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial
from tests.builders import LEVELS, make_generation, make_rubric

SCORES = {"low": 10.0, "mid": 50.0, "high": 90.0}


def measured(rubric_id: str, measure: str, values: Sequence[float], **changes: Any) -> Rubric:
    spec: dict[str, Any] = {"name": measure, "values": dict(zip(LEVELS, values, strict=True))} | changes.pop("spec", {})
    descriptors = {name: f"{name} {measure}" for name in LEVELS}
    criterion = {"name": "only", "weight": 100, "descriptors": descriptors, "measure": spec}
    return make_rubric(id=rubric_id, title=rubric_id.title(), criteria=[criterion], **changes)


LENGTH = measured("length", "word_count", (10, 20, 30))
PLAIN = measured("plain", "mean_word_length", (4, 5, 6))
BRIEF = measured("brief", "word_count", (30, 20, 10))
POINTS = ((9, 0), (21, 50), (34, 100))
LINEAR = [3 + 4 * at / 100 for at in range(101)]
"""Quantiles of mean word length, evenly from 3 to 7."""


def text_of(words: int, letters: int) -> str:
    return " ".join(["a" * letters] * words)


def make_trial(rubric: Rubric, level: str, text: str, prompt: int = 0, **changes: Any) -> Trial:
    fields: dict[str, Any] = {
        "trial_id": f"{rubric.id}/{level}/{prompt}",
        "model": "tuned",
        "prompt_id": f"p{prompt}",
        "prompt": f"Write {prompt}.",
        "rubric_id": rubric.id,
        "level": level,
        "target": SCORES[level],
        "directive": "Write so.",
        "text": text,
        "reason": "",
    }
    return Trial(**fields | changes)


def turned(rubric: Rubric, low: tuple[int, int], high: tuple[int, int], **changes: Any) -> list[Trial]:
    """Texts of (words, letters) at the lowest and highest level; each prompt has a word more than the last."""
    return [
        make_trial(rubric, level, text_of(words + prompt, letters), prompt, **changes)
        for level, (words, letters) in (("low", low), ("high", high))
        for prompt in range(3)
    ]


def results_of(trials: Sequence[Trial], *rubrics: Rubric, resamples: int = 20, **more: Any) -> dict[str, Any]:
    return score_trials(trials, rubrics, resamples, 0, **more)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 9))


@given(sizes, sizes, sizes, sizes)
@settings(max_examples=50)
def test_slope_and_crosstalk_are_what_moved_over_what_was_asked(
    short: tuple[int, int], long: tuple[int, int], simple: tuple[int, int], learned: tuple[int, int]
) -> None:
    trials = [*turned(LENGTH, short, long), *turned(PLAIN, simple, learned)]
    results = results_of(trials, LENGTH, PLAIN)
    crosstalk = results["crosstalk"]["tuned"]
    assert results["slope"]["length"]["tuned"]["slope"] == pytest.approx((long[0] - short[0]) / 20)
    assert results["slope"]["plain"]["tuned"]["slope"] == pytest.approx((learned[1] - simple[1]) / 2)
    assert crosstalk["length"]["plain"]["slope"] == pytest.approx((long[1] - short[1]) / 2)
    assert crosstalk["plain"]["length"]["slope"] == pytest.approx((learned[0] - simple[0]) / 20)
    assert results["slope"]["length"]["base"]["slope"] is None
    json.dumps(results, allow_nan=False)


def test_a_measure_that_falls_from_level_to_level_has_a_slope_of_one_as_well() -> None:
    results = results_of(turned(BRIEF, (30, 4), (10, 4)), BRIEF)
    assert results["slope"]["brief"]["tuned"]["slope"] == pytest.approx(1)
    assert results["slope"]["brief"]["anchors"] == {"low": 30, "mid": 20, "high": 10}


def test_anchors_of_a_rubric_graded_by_points_are_the_values_with_the_levels_scores() -> None:
    rubric = measured("length", "word_count", (10, 20, 30), spec={"points": POINTS})
    anchors = results_of([], rubric)["levels"]["length"]["anchors"]
    assert anchors == pytest.approx({"low": 9 + 0.2 * 12, "mid": 21, "high": 21 + 0.8 * 13})


def test_a_judged_dial_is_in_score_points_and_known_of_its_own_answers_alone() -> None:
    judged = make_rubric()  # one judged criterion, one measured
    trials = [*turned(LENGTH, (10, 4), (30, 4)), *turned(judged, (10, 4), (20, 4))]
    scored = [
        trial if trial.rubric_id == "length" else make_trial(judged, trial.level, trial.text, score=score)
        for trial, score in zip(trials, [0.0] * 6 + [20.0] * 3 + [60.0] * 3, strict=True)
    ]
    results = results_of(scored, LENGTH, judged)
    assert results["slope"]["ornament"]["tuned"]["slope"] == pytest.approx(40 / 80)
    assert results["slope"]["ornament"]["measure"] == "score"
    assert results["crosstalk"]["tuned"]["length"] == {}
    assert results["crosstalk"]["tuned"]["ornament"]["length"]["slope"] == pytest.approx(10 / 20)


def test_a_dial_of_several_measures_is_graded_in_every_text() -> None:
    names = {"words": ("word_count", (10, 20, 30)), "letters": ("mean_word_length", (4, 5, 6))}
    criteria = [
        {"name": name, "weight": 50, "descriptors": {level: f"{level} {name}" for level in LEVELS},
         "measure": {"name": measure, "values": dict(zip(LEVELS, values, strict=True))}}
        for name, (measure, values) in names.items()
    ]  # fmt: skip
    both = make_rubric(id="both", criteria=criteria)
    length = [make_trial(LENGTH, level, text_of(words, 4)) for level, words in (("low", 10), ("high", 30))]
    results = results_of(length, LENGTH, both)
    assert results["crosstalk"]["tuned"]["length"]["both"]["slope"] == pytest.approx((50 - 10) / 80)


def test_the_second_measure_has_its_anchors_in_the_pool_and_none_without_one() -> None:
    rubric = measured("length", "word_count", (10, 20, 30), check={"name": "mean_word_length"})
    trials = turned(rubric, (10, 4), (30, 6))
    pool = {"length": {CHECK: {"quantiles": LINEAR, "sd": 1.0}}}
    entry = results_of(trials, rubric, written=pool)["check"]["length"]
    assert entry["measure"] == "mean_word_length"
    assert entry["anchors"] == pytest.approx({"low": 3.4, "mid": 5.0, "high": 6.6})
    assert entry["tuned"]["slope"] == pytest.approx(2 / 3.2)
    assert results_of(trials, rubric)["check"] == {}
    assert results_of(trials, LENGTH, written=pool)["check"] == {}
    # 10, 20 and 30 words are where a quarter, a half and three quarters of the pool are shorter
    pool["length"]["only"] = {"quantiles": [40 * at / 100 for at in range(101)], "sd": 5.0}
    entry = results_of(trials, rubric, written=pool)["check"]["length"]
    assert entry["anchors"] == pytest.approx({"low": 4.0, "mid": 5.0, "high": 6.0}, abs=0.02)
    assert entry["tuned"]["slope"] == pytest.approx(1, abs=0.02)


def test_what_moved_is_also_in_standard_deviations_of_the_pool_where_they_are_known() -> None:
    trials = [*turned(LENGTH, (10, 4), (30, 4)), *turned(PLAIN, (20, 4), (10, 6))]
    results = results_of(trials, LENGTH, PLAIN, written={"length": {"only": {"sd": 5.0}}})
    assert results["slope"]["length"]["tuned"]["pool_sd"] == pytest.approx(20 / 5)
    assert results["crosstalk"]["tuned"]["plain"]["length"]["pool_sd"] == pytest.approx(-10 / 5)
    assert "pool_sd" not in results["crosstalk"]["tuned"]["length"]["plain"]


def test_texts_without_a_value_are_counted_and_left_out() -> None:
    trials = [
        *turned(LENGTH, (10, 4), (30, 4)),
        make_trial(LENGTH, "low", "", 4),
        make_trial(LENGTH, "low", "12 34", 5),
    ]
    results = results_of(trials, LENGTH)
    low = results["levels"]["length"]["tuned"]["low"]
    assert (low["mean"], low["n"], low["undefined"]) == (11.0, 3, 2)
    assert results["levels"]["length"]["tuned"]["mid"]["n"] == 0
    assert results["slope"]["length"]["tuned"]["slope"] == pytest.approx(1)


def noisy(num_prompts: int, num_directives: int) -> list[Trial]:
    draw = random.Random(3)
    return [
        make_trial(LENGTH, level, text_of(draw.randint(1, 30), draw.randint(1, 9)), prompt, model=model,
                   trial_id=f"{level}/{number}/{prompt}", directive_id=f"{level}-{number}")
        for model in ("base", "tuned")
        for level in LEVELS
        for number in range(num_directives)
        for prompt in range(num_prompts)
    ]  # fmt: skip


def test_a_slopes_interval_is_that_of_slopes_of_copied_rows() -> None:
    trials = noisy(4, 3)
    entry = results_of(trials, LENGTH, resamples=70)["slope"]["length"]
    draw = np.random.default_rng(0)
    prompts = draw.multinomial(4, [1 / 4] * 4, size=70)
    directives = {level: draw.multinomial(3, [1 / 3] * 3, size=70) for level in sorted(LEVELS)}
    slopes: dict[str, list[float]] = {"base": [], "tuned": []}
    for at in range(70):
        for model, values in slopes.items():
            ends = []
            for level in ("low", "high"):
                copies: list[int] = []
                for trial in trials:
                    if (trial.model, trial.level) == (model, level):
                        count = (
                            prompts[at][int(trial.prompt_id[1:])] * directives[level][at][int(trial.directive_id[-1])]
                        )
                        copies += [len(trial.text.split())] * int(count)
                ends.append(sum(copies) / len(copies))
            values.append((ends[1] - ends[0]) / 20)
    for model, values in slopes.items():
        assert entry[model]["slope_ci"] == pytest.approx(list(np.percentile(values, [2.5, 97.5])))
    change = [tuned - base for base, tuned in zip(slopes["base"], slopes["tuned"], strict=True)]
    assert entry["change"]["slope_ci"] == pytest.approx(list(np.percentile(change, [2.5, 97.5])))


def test_row_order_changes_nothing() -> None:
    trials = noisy(5, 2)
    log_probs = {(trial.model, trial.trial_id): (-0.1 * at, at % 7 + 1) for at, trial in enumerate(trials)}
    before = results_of(trials, LENGTH, PLAIN, log_probs=log_probs)
    random.Random(0).shuffle(trials)
    assert results_of(trials, LENGTH, PLAIN, log_probs=log_probs) == before


def test_the_gap_is_how_much_more_the_dial_moves_under_trained_directives() -> None:
    trials = turned(LENGTH, (10, 4), (20, 4))
    assert results_of(trials, LENGTH)["trained_directives"] is None
    trained = turned(LENGTH, (10, 4), (30, 4), is_trained=True)
    results = results_of(trials + trained, LENGTH)
    assert results["slope"]["length"]["tuned"]["slope"] == pytest.approx(0.5)
    assert results["trained_directives"]["slope"]["length"]["tuned"]["slope"] == pytest.approx(1)
    assert results["trained_directives"]["gap"]["length"]["tuned"]["slope"] == pytest.approx(0.5)


def test_perplexity_is_over_all_tokens_of_a_models_answers() -> None:
    trials = [make_trial(LENGTH, "low", "a", prompt, model=model) for model in ("base", "tuned") for prompt in range(3)]
    log_probs = {("base", trials[0].trial_id): (-6.0, 2), ("base", trials[1].trial_id): (-2.0, 6)}
    log_probs |= {("tuned", trials[0].trial_id): (-16.0, 8)}
    entry = results_of(trials, LENGTH, log_probs=log_probs)["perplexity"]
    assert entry["base"]["perplexity"] == pytest.approx(math.exp(8 / 8))
    assert (entry["base"]["n"], entry["base"]["tokens"]) == (2, 8)
    assert entry["ratio"] == pytest.approx(math.exp(2 - 1))
    assert entry["per_rubric"]["length"]["ratio"] == entry["ratio"]
    assert results_of(trials, LENGTH)["perplexity"] is None
    assert (
        results_of([*trials, make_trial(PLAIN, "low", "a")], LENGTH, PLAIN, log_probs=log_probs)["perplexity"][
            "per_rubric"
        ]["plain"]
        is None
    )


def test_chance_is_one_level_in_so_many() -> None:
    assert results_of([], LENGTH)["chance"] == {"length": pytest.approx(1 / 3)}


def test_a_judged_rubric_without_measures_is_held_against_its_second_measure() -> None:
    plain = [{"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in LEVELS}}]
    rubric = make_rubric(id="plain", criteria=plain, check={"name": "mean_word_length"})
    pool = survey([rubric], [make_generation("low", text=text_of(1, 3 + at)) for at in range(5)])  # as LINEAR
    assert check_score(rubric, pool["plain"], "aaaaa") == pytest.approx(50)
    assert check_score(rubric, pool["plain"], "aa") == 0
    trials = [make_trial(rubric, "low", text_of(4, 3 + at), at, judged=(10.0, 50.0, 90.0)[at // 2]) for at in range(5)]
    entry = results_of(trials, rubric, written=pool)["judge_agreement"]["per_rubric"]["plain"]
    assert (entry["n"], entry["same_level"]) == (5, 0.8)
    assert results_of(trials, rubric)["judge_agreement"]["n"] == 0
    check = results_of([*trials, make_trial(rubric, "high", "a" * 7)], rubric, written=pool)["check"]["plain"]
    assert check["anchors"] == pytest.approx({"low": 3.4, "mid": 5.0, "high": 6.6})
    assert check["tuned"]["slope"] == pytest.approx((7 - 5) / 3.2)
