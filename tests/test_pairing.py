"""Labels: `chosen` follows the verdict, twins are complete, nothing ungraded becomes a label."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.config import SynthesisConfig
from cpt_ray.grading import confirms
from cpt_ray.pairing import cell_id_of, pair_cells
from cpt_ray.records import CONTROL, Pair, Reject
from tests.builders import LEVELS, make_directives, make_generation, make_grade, make_rubric

RUBRIC = make_rubric()
ANCHOR = {level.name: level.score for level in RUBRIC.levels}


def pair_scores(scores: dict[str, float | None]) -> tuple[list[Pair], list[Reject]]:
    """One cell whose answers have these scores."""
    generations = [make_generation(level) for level in scores]
    grades = {(one.unit_id, RUBRIC.id): make_grade(one.unit_id, scores[one.level]) for one in generations}
    return pair_cells([RUBRIC], generations, grades, make_directives(), SynthesisConfig(), {})


def test_three_confirmed_levels_give_six_pairs() -> None:
    pairs, rejects = pair_scores(dict(ANCHOR))
    assert {(one.level, one.rejected_level) for one in pairs} == {(a, b) for a in LEVELS for b in LEVELS if a != b}
    assert rejects == []


def test_unconfirmed_and_ungraded_answers_are_rejected_with_reasons() -> None:
    pairs, rejects = pair_scores({"low": 10, "mid": 88, "high": None})
    assert pairs == []
    assert [(one.level, one.reason) for one in rejects] == [
        ("mid", "other level"),
        ("high", "ungraded"),
        ("low", "no partner"),
    ]
    assert rejects[0].detail == "graded 88.0 (high), target mid"


def test_the_same_text_at_two_levels_never_becomes_a_pair() -> None:
    texts = ("Same caf\u00e9.", "Same cafe\u0301.", "Same caf\u00e9. ")
    generations = [make_generation(level, text=text) for level, text in zip(LEVELS, texts, strict=True)]
    grades = {(one.unit_id, RUBRIC.id): make_grade(one.unit_id, ANCHOR[one.level]) for one in generations}
    pairs, rejects = pair_cells([RUBRIC], generations, grades, make_directives(), SynthesisConfig(), {})
    assert pairs == []
    assert sorted(one.reason for one in rejects) == ["no partner", "same text", "same text"]


def test_held_out_directives_are_never_trained_on() -> None:
    generations = [make_generation(level) for level in LEVELS]
    grades = {(one.unit_id, RUBRIC.id): make_grade(one.unit_id, ANCHOR[one.level]) for one in generations}
    pairs, rejects = pair_cells([RUBRIC], generations, grades, make_directives("held_out"), SynthesisConfig(), {})
    assert pairs == []
    assert {one.reason for one in rejects} == {"no directive"}


_scores = st.one_of(st.none(), st.floats(0, 100), st.sampled_from([30.0, 70.0]))  # half-way between two levels: ties
_answers = st.tuples(_scores, st.sampled_from("xyz"), st.integers(1, 9))
"""(score, text, tokens): few texts and lengths, so that answers repeat each other and lengths are far apart."""
_keys = st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.sampled_from((*LEVELS, CONTROL)))


@given(st.dictionaries(_keys, _answers), st.sampled_from([None, 1.5, 4.0]))
def test_labels_follow_verdicts_and_nothing_is_lost(
    table: dict[tuple[str, int, str], tuple[float | None, str, int]], max_length_ratio: float | None
) -> None:
    generations = [
        dataclasses.replace(make_generation(level, prompt, sample, text), num_tokens=tokens)
        for (prompt, sample, level), (_, text, tokens) in table.items()
    ]
    scores = {one.unit_id: score for one, (score, _, _) in zip(generations, table.values(), strict=True)}
    grades = {(unit_id, RUBRIC.id): make_grade(unit_id, score) for unit_id, score in scores.items()}
    rules = SynthesisConfig(neutral_directives=("Be yourself.",), max_length_ratio=max_length_ratio)
    pairs, rejects = pair_cells([RUBRIC], generations, grades, make_directives(), rules, {})
    by_id = {one.pair_id: one for one in pairs}
    assert len(by_id) == len(pairs)
    answers = {(cell_id_of(RUBRIC.id, one.prompt_id, one.sample), one.level): one for one in generations}
    directive_level = {one.directive_id: one.level for one in make_directives()} | {"": CONTROL}
    for one in pairs:
        twin = by_id[one.twin_id]
        assert (twin.chosen, twin.rejected, twin.twin_id) == (one.rejected, one.chosen, one.pair_id)
        assert (twin.level, twin.rejected_level) == (one.rejected_level, one.level)
        assert directive_level[one.directive_id] == one.level
        chosen, rejected = answers[one.cell_id, one.level], answers[one.cell_id, one.rejected_level]
        assert (one.chosen[0].content, one.rejected[0].content) == (chosen.text, rejected.text)
        assert chosen.text != rejected.text
        assert (one.chosen_score, one.rejected_score) == (scores[chosen.unit_id], scores[rejected.unit_id])
        if one.level != CONTROL:
            assert one.chosen_score not in (30.0, 70.0)
            assert confirms(RUBRIC, one.level, one.chosen_score)
            assert not confirms(RUBRIC, one.level, one.rejected_score)
        if max_length_ratio:
            assert max(chosen.num_tokens, rejected.num_tokens) <= max_length_ratio * min(
                chosen.num_tokens, rejected.num_tokens
            )
    used = {(one.cell_id, one.level) for one in pairs}
    rejected_ids = {one.subject_id for one in rejects}
    for key, generation in answers.items():
        assert (key in used) != (generation.unit_id in rejected_ids)
