"""Labels: `chosen` follows the grade, twins are complete, nothing ungraded becomes a label."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.config import SynthesisConfig
from cpt_ray.engines.ledger import NOT_IN_LEDGER
from cpt_ray.judging.judge import Gradings
from cpt_ray.rubrics.bins import level_at
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.synthesis.levels import level_counts
from cpt_ray.synthesis.pairing import Paired, pair_answers
from cpt_ray.tables.records import CONTROL, Generation, Reject
from tests.builders import LEVELS, make_directives, make_generation, make_grade, make_rubric

RUBRIC = make_rubric()
ANCHOR = {level.name: level.score for level in RUBRIC.levels}
LENGTH = make_rubric(
    criteria=[
        {
            "name": "size",
            "weight": 100,
            "descriptors": {name: f"{name} size" for name in LEVELS},
            "measure": {"name": "word_count", "values": {"low": 1, "mid": 2, "high": 3}},
        }
    ]
)


def pair_scores(scores: dict[str, float | None], **settings: object) -> Paired:
    """The pool of one prompt: answers that were asked for at these levels and have these scores."""
    generations = [make_generation(level) for level in scores]
    grades = {(one.unit_id, RUBRIC.id): make_grade(one.unit_id, scores[one.level]) for one in generations}
    rules = SynthesisConfig.model_validate(settings)
    return pair_answers([RUBRIC], generations, Gradings(grades, {}, {}), make_directives(), rules, {})


def reasons(rejects: list[Reject]) -> dict[str, str]:
    """unit's target level to the reason."""
    return {reject.level: reject.reason for reject in rejects}


def test_three_levels_give_six_pairs() -> None:
    paired = pair_scores(dict(ANCHOR))
    assert {(one.level, one.rejected_level) for one in paired.pairs} == {
        (a, b) for a in LEVELS for b in LEVELS if a != b
    }
    assert paired.rejects == []


def test_the_grade_decides_the_level_whatever_was_asked_for() -> None:
    paired = pair_scores({"low": 88, "mid": 12, "high": 51})
    by_level = {one.level: one.chosen[0].content for one in paired.pairs}
    assert by_level == {
        "high": "A low answer to p (0).",
        "low": "A mid answer to p (0).",
        "mid": "A high answer to p (0).",
    }
    assert paired.rejects == []
    assert (paired.at_level.total(), paired.hit.total(), sum(map(len, paired.kept.values()))) == (3, 0, 3)


def test_what_is_ungraded_between_two_levels_or_alone_is_rejected_with_its_reason() -> None:
    paired = pair_scores({"low": 10, "mid": 70, "high": None})
    assert paired.pairs == []
    assert reasons(paired.rejects) == {"low": "no partner", "mid": "between two levels", "high": "ungraded"}


def test_the_margin_says_how_wide_between_two_levels_is() -> None:
    assert reasons(pair_scores({"low": 10, "mid": 66, "high": 90}).rejects) == {"mid": "between two levels"}
    assert pair_scores({"low": 10, "mid": 66, "high": 90}, margin=0.05).rejects == []


def test_the_same_text_at_two_levels_never_becomes_a_pair() -> None:
    texts = ("Same caf\u00e9.", "Same cafe\u0301.", "Same caf\u00e9. ")
    generations = [make_generation(level, text=text) for level, text in zip(LEVELS, texts, strict=True)]
    grades = {(one.unit_id, RUBRIC.id): make_grade(one.unit_id, ANCHOR[one.level]) for one in generations}
    paired = pair_answers([RUBRIC], generations, Gradings(grades, {}, {}), make_directives(), SynthesisConfig(), {})
    assert paired.pairs == []
    assert sorted(one.reason for one in paired.rejects) == ["no partner", "same text", "same text"]


def test_held_out_directives_are_never_trained_on() -> None:
    generations = [make_generation(level) for level in LEVELS]
    grades = {(one.unit_id, RUBRIC.id): make_grade(one.unit_id, ANCHOR[one.level]) for one in generations}
    directives = make_directives("held_out")
    paired = pair_answers([RUBRIC], generations, Gradings(grades, {}, {}), directives, SynthesisConfig(), {})
    assert paired.pairs == []


def test_an_answer_that_was_cut_says_nothing_of_its_length_and_has_no_end_mark() -> None:
    def paired(rubric_is_length: bool) -> Paired:
        rubric = LENGTH if rubric_is_length else RUBRIC
        answers = [dataclasses.replace(make_generation(level), is_cut=level == "high") for level in LEVELS]
        grades = {(one.unit_id, rubric.id): make_grade(one.unit_id, ANCHOR[one.level]) for one in answers}
        return pair_answers([rubric], answers, Gradings(grades, {}, {}), make_directives(), SynthesisConfig(), {})

    assert {one.level for one in paired(True).pairs} == {"low", "mid"}
    assert reasons(paired(True).rejects) == {"high": "between two levels"}
    assert {(one.level, one.chosen_is_cut) for one in paired(False).pairs} == {
        ("low", False),
        ("mid", False),
        ("high", True),
    }


def test_the_policys_own_answer_counts_only_where_its_own_rubric_graded_it_whole() -> None:
    def why_rejected(graded_by: str, is_cut: bool = False, rubric: Rubric = RUBRIC) -> dict[str, str]:
        other = make_rubric(id="other")
        answers = [make_generation(level) for level in (*LEVELS, CONTROL)]
        answers[-1] = dataclasses.replace(answers[-1], rubric_id=rubric.id, is_cut=is_cut)
        grades = {
            (one.unit_id, rubric.id): make_grade(one.unit_id, ANCHOR.get(one.level, 50.0)) for one in answers[:-1]
        }
        control = dataclasses.replace(make_grade(answers[-1].unit_id, 30.0), rubric_id=graded_by)
        grades[control.unit_id, graded_by] = control
        paired = pair_answers(
            [rubric, other], answers, Gradings(grades, {}, {}), make_directives(), SynthesisConfig(), {}
        )
        return reasons(paired.rejects)

    assert why_rejected(RUBRIC.id) == {}
    assert why_rejected("other") == {CONTROL: "ungraded"}
    assert why_rejected(RUBRIC.id, is_cut=True) == {}
    assert why_rejected(LENGTH.id, is_cut=True, rubric=LENGTH) == {CONTROL: "between two levels"}


_scores = st.one_of(st.none(), st.floats(0, 100), st.sampled_from([30.0, 70.0]))  # half-way between two levels: ties
_answers = st.tuples(_scores, st.sampled_from("vwxyz"), st.integers(1, 9))
"""(score, text, tokens): few texts and lengths, so that answers repeat each other and lengths are far apart."""
_keys = st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.sampled_from((*LEVELS, "", CONTROL)))


def _generation(prompt: str, sample: int, level: str, text: str, tokens: int) -> Generation:
    made = dataclasses.replace(make_generation(level, prompt, sample, text), num_tokens=tokens)
    return made if level else dataclasses.replace(made, rubric_id="")


@given(
    st.dictionaries(_keys, _answers),
    st.sampled_from([None, 1.5, 4.0]),
    st.integers(1, 3),
    st.booleans(),
    st.floats(0, 0.4),
)
def test_labels_follow_grades_and_nothing_is_lost(
    table: dict[tuple[str, int, str], tuple[float | None, str, int]],
    max_length_ratio: float | None,
    grids: int,
    balance: bool,
    margin: float,
) -> None:
    generations = [
        _generation(prompt, 0 if level == CONTROL else sample, level, text, tokens)
        for (prompt, sample, level), (_, text, tokens) in table.items()
        if level != CONTROL or sample == 0
    ]
    scores = {one.unit_id: table[one.prompt_id, one.sample, one.level][0] for one in generations}
    grades = {(unit_id, RUBRIC.id): make_grade(unit_id, score) for unit_id, score in scores.items()}
    rules = SynthesisConfig(
        neutral_directives=("Be yourself.",),
        max_length_ratio=max_length_ratio,
        grids=grids,
        balance=balance,
        margin=margin,
    )
    paired = pair_answers([RUBRIC], generations, Gradings(grades, {}, {}), make_directives(), rules, {})
    by_id = {one.pair_id: one for one in paired.pairs}
    assert len(by_id) == len(paired.pairs)
    by_grade = sorted(generations, key=lambda one: scores[one.unit_id] is not None, reverse=True)[::-1]
    by_text = {(one.prompt_id, one.text): one for one in by_grade}  # of equal ones the first that is graded is used
    directive_level = {one.directive_id: one.level for one in make_directives()} | {"": CONTROL}
    cells: dict[tuple[str, str], str] = {}
    for one in paired.pairs:
        twin = by_id[one.twin_id]
        assert (twin.chosen, twin.rejected, twin.twin_id) == (one.rejected, one.chosen, one.pair_id)
        assert (twin.level, twin.rejected_level) == (one.rejected_level, one.level)
        assert directive_level[one.directive_id] == one.level
        chosen, rejected = (by_text[one.prompt_id, text[0].content] for text in (one.chosen, one.rejected))
        assert chosen.text != rejected.text
        assert (one.chosen_score, one.rejected_score) == (scores[chosen.unit_id], scores[rejected.unit_id])
        if one.level == CONTROL:
            assert chosen.level == CONTROL
        else:
            assert level_at(RUBRIC, one.chosen_score, margin) == one.level
            assert level_at(RUBRIC, one.rejected_score) != one.level
        if max_length_ratio:
            short, long = sorted((chosen.num_tokens, rejected.num_tokens))
            assert long <= max_length_ratio * short
        assert cells.setdefault((one.prompt_id, chosen.text), one.cell_id) == one.cell_id  # in one grid alone
    per_prompt = Counter(prompt for prompt, _ in {(one.prompt_id, one.cell_id) for one in paired.pairs})
    assert all(count <= grids for count in per_prompt.values())
    used = {(one.prompt_id, one.chosen[0].content) for one in paired.pairs}
    rejected_ids = {one.subject_id for one in paired.rejects}
    for generation in generations:
        is_used = (generation.prompt_id, generation.text) in used
        is_first = by_text[generation.prompt_id, generation.text] is generation
        assert (is_used and is_first) != (generation.unit_id in rejected_ids)


def test_answers_are_taken_by_the_first_judge_and_their_scores_are_reported_by_the_others() -> None:
    noise = random.Random(0)
    generations = [make_generation(level, sample=sample) for level in LEVELS for sample in range(60)]
    true = {row.unit_id: noise.uniform(0, 100) for row in generations}
    grades = [
        dataclasses.replace(
            make_grade(row.unit_id, min(100, max(0, true[row.unit_id] + noise.gauss(0, 15)))), judge=name
        )
        for name in ("first", "second")
        for row in generations
    ]
    gradings = Gradings.of([RUBRIC], grades, "mean")
    paired = pair_answers([RUBRIC], generations, gradings, make_directives(), SynthesisConfig(grids=2), {})
    counts = level_counts(paired, [], [], gradings)
    taken_by, others = (
        [counts[f"{NOT_IN_LEDGER}{what}/{RUBRIC.id}/{level}"] / 2 for level in ("low", "high")]
        for what in ("taken_by", "others")
    )
    kept = {level: paired.kept[RUBRIC.id, level] for level in ("low", "high")}
    for at, level in enumerate(("low", "high")):
        first = [gradings.first[unit_id, RUBRIC.id].score or 0.0 for unit_id in kept[level]]
        assert taken_by[at] == sum(first) / 2
    assert taken_by[0] < others[0] < others[1] < taken_by[1]


def test_with_one_judge_nothing_is_reported_by_others() -> None:
    generations = [make_generation(level) for level in LEVELS]
    gradings = Gradings.of([RUBRIC], [make_grade(row.unit_id, ANCHOR[row.level]) for row in generations], "mean")
    paired = pair_answers([RUBRIC], generations, gradings, make_directives(), SynthesisConfig(), {})
    counts = level_counts(paired, [], [], gradings)
    assert not {"others", "others_n"} & {key.removeprefix(NOT_IN_LEDGER).split("/")[0] for key in counts}
    assert counts[f"{NOT_IN_LEDGER}taken_by/{RUBRIC.id}/high"] == ANCHOR["high"]
