"""Pairs to rows, and what is measured on rows that are held out."""

from __future__ import annotations

import itertools

import pytest

from cpt_ray.config import SynthesisConfig
from cpt_ray.judging.judge import Gradings
from cpt_ray.logprobs.rows import Row, sequence_ids
from cpt_ray.synthesis.pairing import pair_answers
from cpt_ray.tables.records import CONTROL
from cpt_ray.training.metrics import held_out_metrics
from cpt_ray.training.pairs import end_pairs
from cpt_ray.training.row_making import make_rows
from tests.builders import make_directives, make_generation, make_grade, make_rubric
from tests.trainings import make_tokens

LENGTHS = {"high": 4, "low": 2}


def make_grid(cell: str) -> list[Row]:
    """The two rows of a cell of two answers: the high one of 4 tokens, the low one of 2."""
    ids = {level: (at,) * LENGTHS[level] for at, level in enumerate(LENGTHS)}
    pairs = [
        one.__class__(
            **{name: getattr(one, name) for name in one.__slots__}
            | {"prompt_ids": (9, len(one.level)), "chosen_ids": ids[one.level], "rejected_ids": ids[one.rejected_level]}
        )
        for one in make_tokens(cell)
    ]
    rows = make_rows(pairs, 4)
    for row in rows:
        row["ref_logps"] = [-8.0, -8.0]
    return rows


def test_a_row_runs_each_answer_once_and_rows_share_no_sequence() -> None:
    grid = make_grid("a") + make_grid("b")
    assert [(one["cell_id"], one["level"]) for one in grid] == [
        ("a", "high"),
        ("a", "low"),
        ("b", "high"),
        ("b", "low"),
    ]
    assert [len(one["answers"]) for one in grid] == [2, 2, 2, 2]
    assert len({name for row in grid[:2] for name in sequence_ids(row)}) == 4


def test_a_row_of_many_pairs_becomes_several() -> None:
    pairs = [make_tokens("a", prompt_ids=(1,), chosen_ids=(2,), rejected_ids=(3 + at,))[0] for at in range(5)]
    rows = make_rows(pairs, 2)
    assert [len(one["chosen"]) for one in rows] == [2, 2, 1]
    assert [one["answers"] for one in rows] == [[[2], [3], [4]], [[2], [5], [6]], [[2], [7]]]


def test_a_policy_that_ignores_its_directive_has_twin_accuracy_of_one_half_and_no_gap() -> None:
    rows = make_grid("a")  # answers in order of (own, other), so that of the second row are swapped
    found = held_out_metrics(rows, [[-3.0, -8.0], [-8.0, -3.0]])
    assert found["twin_accuracy"] == found["pair_accuracy"] == 0.5
    assert found["swap_gap"] == 0
    assert found["length_drift"] == 0.5  # it prefers the long answer, chosen in half of the pairs


def test_a_policy_that_reads_its_directive_has_twin_accuracy_of_one_and_a_gap_per_token() -> None:
    found = held_out_metrics(make_grid("a"), [[-4.0, -10.0], [-6.0, -12.0]])
    assert found["twin_accuracy"] == found["accuracy/ornament/high"] == found["accuracy/ornament/low"] == 1
    assert found["swap_gap"] == pytest.approx(((-4 + 12) / 4 + (-6 + 10) / 2) / 2)
    assert found["drift"] == pytest.approx((4 + 10 + 6 + 12 - 4 * 8) / 12)
    assert found["length_drift"] == 0


def test_without_its_twin_a_pair_counts_for_pair_accuracy_only() -> None:
    found = held_out_metrics(make_grid("a")[:1], [[-4.0, -10.0]])
    assert found["pair_accuracy"] == 1
    assert not {"twin_accuracy", "swap_gap"} & set(found)


def test_of_a_rubrics_levels_the_ends_alone_are_trained_against_each_other_if_wanted() -> None:
    scores = {"low": 12.0, "mid": 50.0, "high": 91.0}
    generations = [make_generation(level) for level in (*scores, CONTROL)]
    grades = {(one.unit_id, "ornament"): make_grade(one.unit_id, scores.get(one.level, 50)) for one in generations}
    made = pair_answers(
        [make_rubric()], generations, Gradings(grades, {}, {}), make_directives(), SynthesisConfig(), {}
    ).pairs
    kept, rejects = end_pairs(made, [make_rubric()])
    assert {(one.level, one.rejected_level) for one in kept} == {
        (a, b) for a, b in itertools.permutations(("low", "high", CONTROL), 2)
    }
    assert {row.subject_id for row in rejects} == {one.pair_id for one in made} - {one.pair_id for one in kept}
    assert {row.reason for row in rejects} == {"middle level"}
    without_high = [one for one in made if "high" not in (one.level, one.rejected_level)]
    assert {one.level for one in end_pairs(without_high, [make_rubric()])[0]} == {"low", CONTROL}  # mid is no end
