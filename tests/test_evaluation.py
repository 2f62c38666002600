"""What is evaluated: which prompts are asked under which directives."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.config import EvaluateConfig
from cpt_ray.evaluation import in_turn, trials_of
from cpt_ray.records import Prompt
from tests.builders import LEVELS, make_directives, make_rubric

PROMPTS = [Prompt(prompt_id=f"p{at}", text=f"Write {at}.", split="held_out") for at in range(8)]


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40))
def test_every_directive_is_used_equally_often_over_the_prompts(num_directives: int, count: int, prompts: int) -> None:
    directives = [one for one in make_directives() if one.level == "low"][:num_directives]
    asked = [[one.directive_id for one in in_turn(directives[::-1], count, turn)] for turn in range(prompts)]
    uses = Counter(name for names in asked for name in names)
    assert all(len(set(names)) == len(names) == min(count, num_directives) for names in asked)
    assert max(uses.values()) - min(uses[one.directive_id] for one in directives) <= 1


def test_a_prompt_is_asked_under_held_out_and_trained_directives_and_none_at_every_level() -> None:
    directives = [*make_directives("held_out"), *make_directives("train")]
    for trained in (0, 2):
        settings = EvaluateConfig(directives=1, trained_directives=trained)
        rows = [
            row
            for turn, prompt in enumerate(PROMPTS)
            for row in trials_of(make_rubric(), prompt, directives, settings, turn)
        ]
        counts = Counter((row.level, row.directive is None, row.is_trained) for row in rows)
        expected = {(level, is_bare, False): len(PROMPTS) for level in LEVELS for is_bare in (False, True)}
        expected |= {(level, False, True): trained * len(PROMPTS) for level in LEVELS if trained}
        assert counts == expected
        assert all((row.directive_id == "") == (row.directive is None) for row in rows)
