"""Metrics against their definitions and against values from scipy; what must never move them; the intervals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_ray.evaluation.resampling import Resamples
from cpt_ray.evaluation.scoring import STATISTICS, score_trials
from cpt_ray.rubrics.bins import confirms
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial
from tests.builders import LEVELS, make_rubric

ANCHORS = {"low": 10.0, "mid": 50.0, "high": 90.0}
RUBRIC = make_rubric()
JUDGED_ONLY = make_rubric(
    id="mood",
    title="Mood",
    criteria=[{"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in LEVELS}}],
)


def make_trial(level: str, score: float | None, prompt: str = "p0", **changes: Any) -> Trial:
    trial = Trial(
        trial_id=f"{prompt}/{level}",
        model="tuned",
        prompt_id=prompt,
        prompt=f"Write {prompt}.",
        rubric_id="ornament",
        level=level,
        target=ANCHORS[level],
        directive="Write so.",
        text="An answer.",
        score=score,
        judged=score,
        measured=score,
        reason="" if score is not None else "no verdict",
    )
    return dataclasses.replace(trial, **changes)


def scored(trials: Sequence[Trial], resamples: int = 0, rubrics: Sequence[Rubric] = (RUBRIC,)) -> dict[str, Any]:
    return score_trials(trials, rubrics, resamples, seed=0)


def noisy_trials(num_prompts: int, gain: float, model: str = "tuned", seed: int = 0) -> list[Trial]:
    """Scores that follow the request with slope `gain`, noise per prompt and per row."""
    draw = random.Random(f"{seed}{model}")
    rows = []
    for number in range(num_prompts):
        offset = draw.gauss(0, 5)
        for level, anchor in ANCHORS.items():
            score = min(100.0, max(0.0, 50 + gain * (anchor - 50) + offset + draw.gauss(0, 15)))
            rows.append(make_trial(level, score, prompt=f"p{number}", model=model))
    return rows


def tau_b(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-b, by its definition."""
    both = apart_x = apart_y = 0
    for (x, y), (u, v) in itertools.combinations(pairs, 2):
        dx, dy = (x > u) - (x < u), (y > v) - (y < v)
        both, apart_x, apart_y = both + dx * dy, apart_x + abs(dx), apart_y + abs(dy)
    return both / math.sqrt(apart_x * apart_y) if apart_x and apart_y else None


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation of average ranks, by its definition."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]

    xs, ys = (ranks([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) + 1) / 2
    covariance = sum((x - middle) * (y - middle) for x, y in zip(xs, ys, strict=True))
    spread = sum((x - middle) ** 2 for x in xs) * sum((y - middle) ** 2 for y in ys)
    return covariance / math.sqrt(spread) if spread else None


scores = st.one_of(st.none(), st.integers(0, 100).map(float), st.floats(0, 100))
rows = st.builds(
    make_trial,
    level=st.sampled_from(LEVELS),
    score=scores,
    prompt=st.sampled_from(["p0", "p1", "p2", "p3"]),
    model=st.sampled_from(["base", "tuned"]),
    directive=st.sampled_from(["Write so.", None]),
    directive_id=st.sampled_from(["", "d0", "d1"]),
)
trial_lists = st.lists(rows, max_size=25)


@given(trial_lists)
@settings(max_examples=100, deadline=None)
def test_metrics_are_what_their_definitions_say_ties_included(trials: list[Trial]) -> None:
    entry = scored(trials)["tuned"]
    pairs = [
        (trial.target, trial.score)
        for trial in trials
        if trial.model == "tuned" and trial.directive and trial.score is not None
    ]
    assert entry["n"] == len(pairs)
    assert entry["kendall_tau"] == pytest.approx(tau_b(pairs))
    assert entry["spearman_rho"] == pytest.approx(spearman(pairs))


@given(trial_lists, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_row_order_changes_nothing_not_even_the_intervals(trials: list[Trial], shuffler: random.Random) -> None:
    before = scored(trials, resamples=20)
    shuffled = list(trials)
    shuffler.shuffle(shuffled)
    assert scored(shuffled, resamples=20) == before


@given(trial_lists)
@settings(max_examples=50, deadline=None)
def test_ungraded_rows_count_as_ungraded_and_as_nothing_else(trials: list[Trial]) -> None:
    with_all = scored(trials)["tuned"]
    graded = scored([trial for trial in trials if trial.score is not None])["tuned"]
    assert all(with_all[name] == graded[name] for name in STATISTICS)
    rows_asked = [trial for trial in trials if trial.model == "tuned" and trial.directive]
    assert with_all["n"] + with_all["ungraded"] == len(rows_asked)
    assert graded["ungraded"] == 0


def test_an_empty_answer_that_was_graded_is_neither_ungraded_nor_missed() -> None:
    rows = [make_trial("low", 10.0), make_trial("low", 10.0, prompt="p1", text=""), make_trial("high", None)]
    entry = scored(rows)["tuned"]
    assert (entry["accuracy"], entry["n"], entry["ungraded"], entry["unanswered"]) == (1.0, 2, 1, 0)


def test_a_model_that_gives_no_answer_has_missed() -> None:
    trials = [make_trial("low", 10.0, prompt=f"p{at}") for at in range(3)]
    entry = scored([*trials, make_trial("high", None, text="")])["tuned"]
    assert (entry["accuracy"], entry["n"], entry["ungraded"], entry["unanswered"]) == (0.75, 3, 0, 1)


@given(trial_lists)
@settings(max_examples=50, deadline=None)
def test_every_number_is_in_range_and_the_results_are_strict_json(trials: list[Trial]) -> None:
    results = scored(trials, resamples=20, rubrics=(RUBRIC, JUDGED_ONLY))
    json.dumps(results, allow_nan=False)
    for model in ("base", "tuned"):
        for metric, low in zip(STATISTICS, (0, -1, -1), strict=True):
            values = [results[model][metric], *(results[model][f"{metric}_ci"] or [])]
            assert all(value is None or low <= value <= 1 for value in values)


@given(st.lists(st.tuples(st.sampled_from(LEVELS), st.sampled_from(["p0", "p1", "p2"])), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_perfect_scores_give_exactly_one(asked: list[tuple[str, str]]) -> None:
    entry = scored([make_trial(level, ANCHORS[level], prompt) for level, prompt in asked])["tuned"]
    assert entry["accuracy"] == 1.0
    for metric in ("kendall_tau", "spearman_rho"):
        assert entry[metric] == (1.0 if len({level for level, _ in asked}) > 1 else None)


def test_tau_and_rho_are_scipys() -> None:
    # scipy 1.17.1: kendalltau(x, y).statistic and spearmanr(x, y).statistic
    levels = ["low", "low", "mid", "mid", "mid", "high", "high", "high"]
    values = [12.0, 40.0, 40.0, 55.0, 33.0, 55.0, 90.0, 71.0]
    entry = scored([make_trial(*pair) for pair in zip(levels, values, strict=True)])["tuned"]
    assert entry["kendall_tau"] == pytest.approx(0.7275328372685521, abs=1e-12)
    assert entry["spearman_rho"] == pytest.approx(0.8224739598517063, abs=1e-12)
    assert entry["accuracy"] == 6 / 8


def test_a_resample_is_worth_what_copied_rows_are_worth() -> None:
    # Two prompts, so that a resample is {p0 twice}, {p1 twice} or both: the interval's ends are the first two.
    first = [make_trial(level, score, "p0") for level, score in (("low", 20.0), ("mid", 60.0), ("high", 55.0))]
    second = [make_trial(level, score, "p1") for level, score in (("low", 20.0), ("mid", 40.0), ("high", 95.0))]
    entry = scored(first + second, resamples=200)["tuned"]
    pairs = [(trial.target, trial.score) for trial in first if trial.score is not None]
    assert entry["kendall_tau_ci"] == [pytest.approx(tau_b(pairs * 2)), 1.0]
    assert entry["spearman_rho_ci"] == [pytest.approx(spearman(pairs * 2)), 1.0]
    assert entry["accuracy_ci"] == [pytest.approx(2 / 3), 1.0]


def crossed_trials(num_prompts: int, num_directives: int, seed: int = 0) -> list[Trial]:
    """Each prompt under each directive of each level; scores with noise of prompt, directive and row."""
    draw = random.Random(seed)
    of_prompt = [draw.gauss(0, 10) for _ in range(num_prompts)]
    rows = []
    for level, anchor in ANCHORS.items():
        for number in range(num_directives):
            shift = draw.gauss(0, 20)
            for at, offset in enumerate(of_prompt):
                score = min(100.0, max(0.0, float(round(anchor + shift + offset + draw.gauss(0, 10)))))
                names = {"trial_id": f"p{at}/{level}/{number}", "directive_id": f"{level}-{number}"}
                rows.append(make_trial(level, score, f"p{at}", **names))
    return rows


def test_a_two_way_resample_is_worth_what_rows_copied_by_prompt_and_directive_are_worth() -> None:
    trials = sorted(crossed_trials(4, 3), key=repr)
    drawn: list[Any] = []

    def keep(weights: Any) -> Any:
        drawn.append(weights)
        return weights[:1]

    Resamples(trials, 70, seed=0).statistics(trials, keep)
    expected = {name: [] for name in STATISTICS}
    for counts in np.concatenate(drawn, axis=1).T:
        by_prompt = {row.prompt_id: 0.0 for row in trials}
        by_directive = {row.directive_id: 0.0 for row in trials}
        for row, count in zip(trials, counts, strict=True):  # a prompt's rows sum to its count times all directives
            by_prompt[row.prompt_id] += count / 9
            by_directive[row.directive_id] += count / 4
        assert [round(by_prompt[row.prompt_id] * by_directive[row.directive_id], 9) for row in trials] == list(counts)
        assert all(sum(by_directive[f"{level}-{at}"] for at in range(3)) == pytest.approx(3) for level in LEVELS)
        copies = [row for row, count in zip(trials, counts, strict=True) for _ in range(int(count))]
        pairs = [(row.target, row.score) for row in copies if row.score is not None]
        expected["accuracy"].append(sum(confirms(RUBRIC, row.level, row.score or 0.0) for row in copies) / len(copies))
        expected["kendall_tau"].append(tau_b(pairs))
        expected["spearman_rho"].append(spearman(pairs))
    entry = scored(trials[::-1], resamples=70)["tuned"]
    for name, (sample, *resampled) in expected.items():
        assert entry[name] == pytest.approx(sample)
        assert entry[f"{name}_ci"] == pytest.approx(list(np.percentile(resampled, [2.5, 97.5])))


def test_intervals_widen_where_directives_differ_and_are_few() -> None:
    def width(trials: list[Trial]) -> float:
        low, high = scored(trials, resamples=300)["tuned"]["accuracy_ci"]
        return float(high - low)

    trials = crossed_trials(30, 3)
    assert width(trials) > 1.5 * width([dataclasses.replace(trial, directive_id="") for trial in trials])


@pytest.mark.parametrize("seed", range(5))
def test_intervals_contain_the_estimate_and_narrow_with_more_prompts(seed: int) -> None:
    few, many = (scored(noisy_trials(size, 0.6, seed=seed), resamples=400)["tuned"] for size in (10, 90))
    for metric in STATISTICS:
        for entry in (few, many):
            low, high = entry[f"{metric}_ci"]
            assert low <= entry[metric] <= high
        assert many[f"{metric}_ci"][1] - many[f"{metric}_ci"][0] < few[f"{metric}_ci"][1] - few[f"{metric}_ci"][0]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    many = noisy_trials(4000, 0.5, seed=99)
    truth = sum(confirms(RUBRIC, trial.level, trial.score or 0.0) for trial in many) / len(many)
    intervals = [scored(noisy_trials(30, 0.5, seed=seed), resamples=300)["tuned"]["accuracy_ci"] for seed in range(60)]
    assert sum(low <= truth <= high for low, high in intervals) >= 52


def test_one_prompt_gives_an_estimate_but_no_interval() -> None:
    entry = scored(noisy_trials(1, 1.0), resamples=50)["tuned"]
    assert entry["accuracy"] is not None
    assert entry["accuracy_ci"] is None


def test_the_difference_is_paired_over_the_same_prompts() -> None:
    base = noisy_trials(30, 0.4, "base")
    same = [dataclasses.replace(trial, model="tuned") for trial in base]
    shifted = score_trials(base + same, [RUBRIC], 200, 0)["difference"]
    assert [shifted[f"{metric}_ci"] for metric in STATISTICS] == [[0.0, 0.0]] * 3
    results = score_trials(base + noisy_trials(30, 1.0), [RUBRIC], 200, 0)
    for metric in STATISTICS:
        low, high = results["difference"][f"{metric}_ci"]
        assert results["difference"][metric] == results["tuned"][metric] - results["base"][metric]
        assert low <= results["difference"][metric] <= high
    assert set(results["difference"]["per_rubric"]) == {"ornament"}


def test_rows_under_trained_directives_are_kept_apart() -> None:
    held_out = noisy_trials(5, 1.0)
    trained = [dataclasses.replace(trial, is_trained=True, score=50.0) for trial in held_out]
    assert scored(held_out + trained)["tuned"] == scored(held_out)["tuned"]


def test_rows_without_a_directive_are_kept_apart() -> None:
    plain = [make_trial(level, 50.0, directive=None) for level in LEVELS]
    entry = scored([*noisy_trials(5, 1.0), *plain])["tuned"]
    assert entry["n"] == 15
    assert entry["without_directive"]["n"] == 3
    assert entry["without_directive"]["accuracy"] == pytest.approx(1 / 3)
    assert entry["without_directive"]["kendall_tau"] is None


def test_per_rubric_splits_what_overall_pools() -> None:
    good = [make_trial(level, ANCHORS[level]) for level in LEVELS]
    bad = [make_trial(level, 50.0, rubric_id="mood", measured=None) for level in LEVELS]
    entry = scored(good + bad, rubrics=(RUBRIC, JUDGED_ONLY))["tuned"]
    assert entry["accuracy"] == pytest.approx(4 / 6)
    assert entry["per_rubric"]["ornament"]["accuracy"] == 1.0
    assert entry["per_rubric"]["mood"]["accuracy"] == pytest.approx(1 / 3)


def test_measured_scores_replace_the_judges_where_a_rubric_has_measures() -> None:
    rows = [make_trial(level, 50.0, measured=ANCHORS[level]) for level in LEVELS]
    rows += [make_trial(level, 50.0, rubric_id="mood", measured=None) for level in LEVELS]
    entry = scored(rows, rubrics=(RUBRIC, JUDGED_ONLY))["tuned"]
    assert entry["measured"]["accuracy"] == 1.0
    assert (entry["measured"]["n"], entry["measured"]["ungraded"]) == (3, 0)
    assert set(entry["measured"]["per_rubric"]) == {"ornament"}
    assert scored(rows[3:], rubrics=(JUDGED_ONLY,))["tuned"]["measured"] is None


def test_judge_agreement_counts_rows_with_both_opinions() -> None:
    opinions = [(10.0, 15.0), (50.0, 95.0), (90.0, 71.0), (None, 50.0), (50.0, None)]
    trials = [
        make_trial("mid", None, f"p{at}", judged=judged, measured=measured)
        for at, (judged, measured) in enumerate(opinions)
    ]
    entry = scored(trials)["judge_agreement"]
    assert entry["n"] == 3
    assert entry["same_level"] == pytest.approx(2 / 3)
    assert entry["spearman_rho"] == pytest.approx(0.5)
    of_rubric = entry["per_rubric"]["ornament"]
    assert {name: of_rubric[name] for name in ("n", "spearman_rho", "same_level")} == {
        name: entry[name] for name in ("n", "spearman_rho", "same_level")
    }
    # judged levels 0, 1, 2 against measured 0, 2, 2: squared distances of 1 in all, and of 15 over all nine pairings
    assert of_rubric["weighted_kappa"] == pytest.approx(1 - 1 / (15 / 3))


def test_nothing_graded_gives_nulls() -> None:
    for trials in ([], [make_trial("low", None, measured=None)]):
        results = scored(trials, resamples=10)
        assert results["base"]["accuracy"] is None
        assert results["tuned"]["accuracy_ci"] is None
        assert results["difference"]["accuracy"] is None
        assert results["judge_agreement"] == {
            "n": 0, "spearman_rho": None, "same_level": None,
            "per_rubric": {"ornament": {"n": 0, "same_level": None, "weighted_kappa": None, "spearman_rho": None,
                                        "mean_score_per_level": {}}},
        }  # fmt: skip
