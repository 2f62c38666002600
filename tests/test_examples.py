"""`synthesis.ask: examples`: later passes show the writer answers that are at the missing level."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from cpt_ray.engines.engine import Completion, Request
from cpt_ray.plan import plan_units
from cpt_ray.rubrics.bins import level_at
from cpt_ray.synthesis.levels import LevelCounts
from cpt_ray.synthesis.stage import name_shards, with_levels
from cpt_ray.synthesis.write import EXAMPLES
from cpt_ray.tables.records import Unit
from tests.builders import LEVELS
from tests.fake_runs import synthesized
from tests.test_spread import make_run, ramble, score

ASK = "synthesis.ask=examples"


def imitate(request: Request) -> Completion:
    """An answer as long as the last one that it was shown."""
    answers = [message["content"] for message in request.messages if message["role"] == "assistant"]
    if not answers:
        return ramble(request)
    text = " ".join(f"w{request.seed}x{at}" for at, _ in enumerate(answers[-1].split()))
    return Completion(text=text, num_tokens=len(text.split()))


def test_examples_are_answers_to_other_prompts_at_the_level_that_is_missing(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, ASK)
    requests: list[Request] = []

    def noted(request: Request) -> Completion:
        requests.append(request)
        return imitate(request)

    shards = synthesized(plan, run, noted)
    rubric = with_levels(plan, run, plan_units(plan)).rubrics[0]
    later = [passes[1:] for passes in shards.passes.values()]
    units = run.read("units", [each.generations for passes in later for each in passes], Unit)
    levels = Counter[str]()
    for request in requests:
        shown = [message["content"] for message in request.messages[1::2]]
        prompts = [message["content"] for message in request.messages[::2]]
        assert len(prompts) == len(set(prompts)) == len(shown) + 1
        assert len(shown) <= EXAMPLES
        if shown:
            (level,) = {level_at(rubric, score(rubric, text), plan.config.synthesis.margin) for text in shown}
            levels[str(level)] += 1
    assert levels == Counter(unit.level for unit in units if unit.level)
    assert {unit.level for unit in units} == {*LEVELS}


def test_the_end_of_the_stage_says_how_often_an_asked_level_was_hit(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, ASK)
    shards = synthesized(plan, run, imitate)
    for level in LEVELS:
        counts = LevelCounts(run, shards.pairs).level("size", level)
        assert counts["asked"] == counts["hit"] > 0


@pytest.mark.parametrize("most", [4, 5, 9])
def test_a_prompt_is_asked_at_most_samples_times_in_all(tmp_path: Path, most: int) -> None:
    plan, run = make_run(tmp_path, ASK, f"synthesis.samples={most}", "synthesis.grids=3")
    shards = synthesized(plan, run, ramble_shown)
    asked = Counter(unit.prompt_id for unit in run.read("units", shards.written, Unit))
    assert max(asked.values()) == most


def ramble_shown(request: Request) -> Completion:
    """Any length, whatever is shown."""
    return ramble(dataclasses.replace(request, messages=request.messages[-1:]))


def test_the_first_pass_is_that_of_bare_prompts_and_no_later_one_is(tmp_path: Path) -> None:
    bare, shown = (make_run(tmp_path, *given)[0] for given in ((), (ASK,)))
    names = [name_shards(plan, plan_units(plan)).passes for plan in (bare, shown)]
    assert list(names[0]) == list(names[1])
    for passes in zip(*(some.values() for some in names), strict=True):
        first, *later = zip(*passes, strict=True)
        assert first[0] == first[1]
        assert all(one.generations != other.generations for one, other in later)
