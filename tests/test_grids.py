"""Grids: answers at each level that differ in their own rubric and in little else."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.grids import BALANCED, LENGTH, GradedAnswer, Grid, GridMaker, Shifts, missing_levels
from cpt_ray.rubrics.rubric import Rubric
from tests.builders import LEVELS, make_generation, make_rubric

OWN, OTHER = make_rubric(), make_rubric(id="mood", title="Mood")
MARGIN = 0.1


def answer(prompt: str, number: int, own: float, other: float, tokens: int = 5) -> GradedAnswer:
    generation = dataclasses.replace(make_generation("low", prompt, number), num_tokens=tokens)
    return GradedAnswer(generation, {OWN.id: own, OTHER.id: other})


def correlated(prompts: int, per_prompt: int, slope: float, seed: int) -> dict[str, list[GradedAnswer]]:
    """Answers whose two scores go together: `slope` sd of one per sd of the other."""
    draw = random.Random(seed)
    pools: dict[str, list[GradedAnswer]] = {}
    for at in range(prompts):
        pool = []
        for number in range(per_prompt):
            own = draw.gauss(0, 1)
            other = slope * own + math.sqrt(1 - slope**2) * draw.gauss(0, 1)
            pool.append(answer(f"p{at}", number, 50 + 35 * own, 50 + 35 * other))
        pools[f"p{at}"] = pool
    return pools


Pools = dict[str, list[GradedAnswer]]


def differences(pools: Pools, balance: bool, offset: float = 0.0) -> tuple[list[float], Shifts]:
    """Each grid's difference in the other rubric, high less low, in sd; and what is said of it."""
    answers = [one for pool in pools.values() for one in pool]
    sd = statistics.pstdev(one.scores[OTHER.id] for one in answers)
    scores = {one.generation.unit_id: one.scores[OTHER.id] / sd for one in answers}
    grids, shifts = GridMaker([OWN, OTHER], pools, MARGIN, balance, {OWN.id: {OTHER.id: offset}}).draw([OWN], 2)
    ends = [list(grid.values()) for some in grids.values() for grid in some]
    return [scores[grid[-1].unit_id] - scores[grid[0].unit_id] for grid in ends], shifts


def test_what_is_not_dialled_is_balanced_over_grids_to_a_tenth_of_its_deviation() -> None:
    for seed in range(5):
        pools = correlated(prompts=60, per_prompt=12, slope=0.3, seed=seed)
        balanced, _ = differences(pools, True)
        by_hash, _ = differences(pools, False)
        assert abs(statistics.fmean(balanced)) <= BALANCED
        assert statistics.fmean(by_hash) > 0.25
        assert len(balanced) > 0.8 * len(by_hash)


@pytest.mark.parametrize("offset", [-1.0, -0.5, 0.5])
def test_an_offset_is_what_grids_are_balanced_to_instead(offset: float) -> None:
    for seed in range(3):
        pools = correlated(prompts=60, per_prompt=12, slope=0.3, seed=seed)
        shifted, shifts = differences(pools, True, offset)
        assert abs(shifts.gaps[OTHER.id]) <= BALANCED * len(shifted)
        assert statistics.fmean(shifted) == pytest.approx(offset, abs=0.3)  # grids without an end are wanted less
        assert len(shifted) > 0.5 * len(differences(pools, True)[0])


def test_an_offset_that_answers_do_not_have_leaves_the_other_rubrics_balanced() -> None:
    third = make_rubric(id="third", title="Third")
    draw, pools = random.Random(1), correlated(prompts=60, per_prompt=8, slope=0.3, seed=1)
    for pool in pools.values():
        for at, one in enumerate(pool):
            scores = {**one.scores, third.id: 50 + 0.5 * (one.scores[OWN.id] - 50) + 20 * draw.gauss(0, 1)}
            pool[at] = GradedAnswer(one.generation, scores)
    for offset, limit in ((-0.5, BALANCED), (-9.0, BALANCED)):
        maker = GridMaker([OWN, OTHER, third], pools, MARGIN, True, {OWN.id: {OTHER.id: offset}})
        grids, shifts = maker.draw([OWN], 2)
        assert abs(shifts.taken[third.id]) <= limit * shifts.grids
        assert sum(map(len, grids.values())) == shifts.grids


def test_a_grid_of_neighbouring_levels_is_wanted_half_of_the_offset() -> None:
    pool = [answer("p", at, own, 50 + at) for at, own in enumerate((2, 50))]
    _, shifts = GridMaker([OWN, OTHER], {"p": pool}, MARGIN, True, {OWN.id: {OTHER.id: -1.0}}).draw([OWN], 1)
    assert shifts.grids == 1
    assert shifts.gaps[OTHER.id] == pytest.approx(shifts.taken[OTHER.id] + 0.5)


def test_an_offset_of_one_rubric_leaves_the_grids_of_others_alone() -> None:
    pools = correlated(prompts=20, per_prompt=12, slope=0.3, seed=3)
    makers = [GridMaker([OWN, OTHER], pools, MARGIN, True, offset) for offset in ({}, {OWN.id: {OTHER.id: -1.0}})]
    assert makers[0].draw([OTHER], 2)[0] == makers[1].draw([OTHER], 2)[0]
    assert makers[0].draw([OWN], 2)[0] != makers[1].draw([OWN], 2)[0]


def test_all_grids_are_kept_where_half_of_them_could_not_be_balanced() -> None:
    pools = correlated(prompts=40, per_prompt=12, slope=0.95, seed=0)
    balanced, _ = differences(pools, True)
    by_hash, _ = differences(pools, False)
    assert len(balanced) == len(by_hash)


def test_the_shifts_that_are_reported_are_those_of_the_grids() -> None:
    pools = correlated(prompts=40, per_prompt=12, slope=0.6, seed=1)
    for balance in (True, False):
        found, shifts = differences(pools, balance)
        assert shifts.grids == len(found)
        assert shifts.taken[OTHER.id] == pytest.approx(sum(found))
        assert shifts.offered[OTHER.id] / shifts.grids > 0.5


def drawn(
    rubrics: list[Rubric], pool: list[GradedAnswer], most: int, balance: bool = True, offset: float = 0.0
) -> list[Grid]:
    """The grids of one prompt."""
    maker = GridMaker([OWN, OTHER], {"p": pool}, MARGIN, balance, {OWN.id: {OTHER.id: offset}})
    return maker.draw(rubrics, most)[0].get("p", [])


def test_answers_far_out_on_their_own_rubric_are_taken() -> None:
    pool = [answer("p", at, own, 50) for at, own in enumerate((2, 8, 22, 48, 52, 71, 92, 99))]
    (grid,) = drawn([OWN], pool, 1)
    scores = {one.generation.unit_id: one.scores[OWN.id] for one in pool}
    taken = {level[0]: scores[generation.unit_id] for level, generation in grid.items()}
    assert taken["mid"] in (48, 52)
    assert taken["low"] <= 8
    assert taken["high"] >= 92


def test_length_is_balanced_too_where_no_rubric_is_about_it() -> None:
    scores = ((10, 20), (10, 60), (50, 60), (50, 90), (90, 60), (90, 200))
    (grid,) = drawn([OWN], [answer("p", at, own, 50, tokens) for at, (own, tokens) in enumerate(scores)], 1)
    assert [generation.num_tokens for generation in grid.values()] == [60, 60, 60]


def test_a_rubric_called_length_is_balanced_by_its_scores_and_not_by_tokens() -> None:
    size = make_rubric(id="length", title="Size")
    made = [(12, 5), (2, 90), (90, 50)]  # score, tokens: the lowest score has the most tokens
    pool = [
        GradedAnswer(answer("p", at, 50, 50, tokens).generation, {"length": score, OTHER.id: 50.0})
        for at, (score, tokens) in enumerate(made)
    ]
    grids, shifts = GridMaker([size, OTHER], {"p": pool}, MARGIN, True).draw([size], 1)
    assert [generation.sample for generation in grids["p"][0].values()] == [1, 2]
    assert LENGTH in shifts.taken


_scores = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=20)


@given(_scores, st.integers(1, 4), st.booleans(), st.floats(-2, 2))
def test_no_answer_is_in_two_grids_of_a_rubric_and_each_is_at_its_own_level(
    scores: list[tuple[float, float]], most: int, is_balanced: bool, offset: float
) -> None:
    pool = [answer("p", at, own, other) for at, (own, other) in enumerate(scores)]
    by_id = {one.generation.unit_id: one for one in pool}
    for rubrics in ([OWN], [OWN, OTHER]):
        grids = drawn(rubrics, pool, most, is_balanced, offset)
        taken = [generation.unit_id for grid in grids for generation in grid.values()]
        assert len(taken) == len(set(taken))
        assert len(grids) <= most
        for grid in grids:
            assert len(grid) >= 2
            for level, generation in grid.items():
                assert by_id[generation.unit_id].level(rubrics, MARGIN) == level
            parts = list(grid)
            assert all(len(set(column)) == len(column) for column in zip(*parts, strict=True))


def test_a_prompt_lacks_what_no_answer_is_at() -> None:
    pool = [answer("p", 0, 9, 50), answer("p", 1, 12, 50), answer("p", 2, 70, 50), answer("p", 3, 88, 50)]
    assert missing_levels(OWN, pool, 2, MARGIN) == {"mid": 2, "high": 1}
    assert missing_levels(OWN, pool, 1, MARGIN) == {"mid": 1}
    assert missing_levels(OWN, [], 1, MARGIN) == dict.fromkeys(LEVELS, 1)
