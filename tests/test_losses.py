"""How many tokens would hold nine of ten answers, from those that ended and the number of those that did not."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cpt_ray.engines.losses import FARTHEST, LEAST_ENDS, MOST_CUT, cut_note, tokens_to_hold

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


def censored(lengths: list[int], max_tokens: int) -> tuple[list[int], int]:
    finished = [length for length in lengths if length <= max_tokens]
    return finished, len(lengths) - len(finished)


@pytest.mark.parametrize("most", [80, 120, 160])
@pytest.mark.parametrize("mean", [60, 100])
def test_an_exponential_tail_is_found_behind_the_cut(mean: float, most: int) -> None:
    """Lengths at the quantiles of an exponential distribution that begins at 20."""
    lengths = [round(20 - mean * math.log(1 - (at + 0.5) / 2000)) for at in range(2000)]
    finished, num_cut = censored(lengths, most)
    held = 20 + mean * math.log(10)
    if 2 * num_cut > 2000:
        assert tokens_to_hold(finished, num_cut, most) is None
    else:
        assert tokens_to_hold(finished, num_cut, most) == pytest.approx(held, abs=12)


@given(LENGTHS, st.integers(1, 300))
def test_what_is_found_without_extrapolation_is_the_least_that_holds_nine_of_ten(lengths: list[int], most: int) -> None:
    most = max(most, sorted(lengths)[len(lengths) - len(lengths) // 10 - 1])  # at most one of ten is cut
    finished, num_cut = censored(lengths, most)
    assert 10 * num_cut <= len(lengths)
    enough = tokens_to_hold(finished, num_cut, most)
    assert enough is not None
    assert enough <= most
    assert 10 * sum(length <= enough for length in lengths) >= 9 * len(lengths)
    assert 10 * sum(length < enough for length in lengths) < 9 * len(lengths)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 20))
def test_an_extrapolation_is_beyond_the_cut_grows_with_it_and_is_not_far(
    lengths: list[int], most: int, more: int
) -> None:
    finished, num_cut = censored(lengths, most)
    assume(10 * num_cut > len(lengths))
    enough, with_more = tokens_to_hold(finished, num_cut, most), tokens_to_hold(finished, num_cut + more, most)
    late = sum(length > most / 2 for length in finished)
    if late < LEAST_ENDS or 2 * num_cut > len(lengths):
        assert enough is None
    if enough is not None:
        assert most < enough < FARTHEST * most + 10
        assert enough % 10 == 0
        assert with_more is None or with_more >= enough


@given(LENGTHS, st.integers(1, 300), st.integers(2, 9))
def test_longer_tokens_change_the_unit_alone(lengths: list[int], most: int, times: int) -> None:
    finished, num_cut = censored(lengths, most)
    small = tokens_to_hold(finished, num_cut, most)
    large = tokens_to_hold([times * length for length in finished], num_cut, times * most)
    assert (small is None) == (large is None)
    if small is not None and large is not None:
        assert large == pytest.approx(times * small, abs=10 * times)


def test_nothing_is_estimated_of_no_answers() -> None:
    assert tokens_to_hold([], 0, 100) is None
    assert cut_note("writer", [], 0, 100) == ""


def test_a_share_over_a_fifth_is_said_with_what_to_set() -> None:
    finished = [round(20 - 60 * math.log(1 - (at + 0.5) / 100)) for at in range(63)]
    assert cut_note("writer", finished, 37, max(finished)) == (
        "37% are cut at 79 tokens; nine of ten would need at least 160 (extrapolated): raise writer.sampling.max_tokens"
    )
    assert cut_note("policy", [5], 9, 10) == (
        "90% are cut at 10 tokens; more would be needed, how many cannot be estimated from so few that ended: "
        "raise policy.sampling.max_tokens"
    )
    assert cut_note("writer", [5] * 80, 20, 10) == "" != cut_note("writer", [5] * 79, 21, 10)
    assert MOST_CUT == 0.2
