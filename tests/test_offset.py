"""`synthesis.offset`: what a rubric's grids differ in beside the rubric, on purpose; its entries in the run file."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt_ray.errors import UserError
from cpt_ray.plan import plan_units
from cpt_ray.synthesis.stage import name_shards
from tests.fake_runs import MOOD, make_run


def test_an_offset_makes_other_pairs_of_the_same_answers(tmp_path: Path) -> None:
    plain, shifted = (
        name_shards(plan, plan_units(plan))
        for plan in (make_run(tmp_path, *given, second=MOOD)[0] for given in ((), (OFFSET.format("mood"),)))
    )
    assert plain.generations == shifted.generations
    assert plain.grades == shifted.grades
    assert not set(plain.pairs) & set(shifted.pairs)


OFFSET = "synthesis.offset={{ornament: {{{}: -1}}}}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([OFFSET.format("moood")], r"synthesis\.offset: no rubric 'moood' .did you mean .mood."),
        (["synthesis.offset={moood: {mood: 1}}"], r"no rubric 'moood'.*; correct it or leave .*synthesis\.offset={}."),
        ([OFFSET.format("mood"), "synthesis.balance=false"], r"offset: says what grids are balanced to, but balance"),
        ([OFFSET.format("ornament")], r"offset\.ornament: names itself"),
    ],
)
def test_an_offset_that_says_nothing_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_run(tmp_path, *overrides, second=MOOD)
