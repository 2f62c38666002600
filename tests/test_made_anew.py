"""What a change makes anew: all that depends on it, and nothing else."""

from __future__ import annotations

import pydoc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from cpt_ray.chat.conversations import policy_messages, rubric_text
from cpt_ray.config import JudgeConfig, ModelConfig
from cpt_ray.evaluation.stage import AnswerStep, GradeTrialsStep
from cpt_ray.judging.judge import JudgeStep
from cpt_ray.plan import Shards, plan_units
from cpt_ray.synthesis.stage import name_shards
from cpt_ray.tables.records import CONTROL
from cpt_ray.tables.shard import ShardName
from tests.fake_runs import GIVEN, MOOD, make_run


def test_shards_hold_whole_prompts_and_their_names_follow_what_matters(tmp_path: Path) -> None:
    plan, _ = make_run(tmp_path)
    units = plan_units(plan)
    for rows in units.values():
        assert len(list(rows)) <= 15
        assert all(count == 3 for count in Counter(row.prompt_id for row in rows).values())
    again = plan_units(make_run(tmp_path, "train.beta=0.5", "judge.model=other")[0])
    assert list(again) == list(units)
    hotter = plan_units(make_run(tmp_path, "writer.sampling.temperature=0.5")[0])
    assert not set(hotter) & set(units)
    assert list(plan_units(make_run(tmp_path, "synthesis.samples=2")[0])) == list(units)


def test_a_new_judge_regrades_without_writing_anew(tmp_path: Path) -> None:
    plan, _ = make_run(tmp_path)
    other, _ = make_run(tmp_path, "judge.model=other")
    before, after = (name_shards(one, plan_units(one)) for one in (plan, other))
    assert before.generations == after.generations
    assert before.directives == after.directives
    assert not set(before.grades) & set(after.grades)
    assert not set(before.pairs) & set(after.pairs)


def test_each_kind_of_change_redoes_only_what_depends_on_it(tmp_path: Path) -> None:
    def shards(*overrides: str, **rubric: Any) -> Shards:
        plan, _ = make_run(tmp_path, *overrides, second=MOOD, **rubric)
        return name_shards(plan, plan_units(plan))

    before = shards(levels=GIVEN)
    tables = ("generations", "grades", "pairs")
    changes: dict[str, tuple[Shards, tuple[str, ...]]] = {
        "rubric": (shards(levels=GIVEN, version=2), ()),
        "directives": (
            shards(levels=[one | {"directives": one["directives"][:2]} for one in GIVEN]),
            ("generations", "grades"),
        ),
        "judge": (shards("judge.model=other", levels=GIVEN), ("generations",)),
        "more judges": (shards('judges=[{"model": "other"}]', levels=GIVEN), ("generations", "grades")),
        "passes": (shards("synthesis.samples=2", levels=GIVEN), ("generations", "grades")),
        "writer": (shards("writer.sampling.temperature=0.1", levels=GIVEN), ()),
        "length rule": (shards("synthesis.max_length_ratio=2", levels=GIVEN), ("generations", "grades")),
        "training": (shards("train.beta=0.3", "writer.price.generated=1", levels=GIVEN), tables),
    }
    for change, (after, expected) in changes.items():
        same = [table for table in tables if {*getattr(before, table)} <= {*getattr(after, table)}]
        assert same == [*expected], change


def test_answers_that_saw_no_rubric_outlive_a_changed_one(tmp_path: Path) -> None:
    def shards(**rubric: Any) -> Shards:
        plan, _ = make_run(tmp_path, "synthesis.ask=prompt", levels=GIVEN, **rubric)
        return name_shards(plan, plan_units(plan))

    before, after = shards(), shards(version=2)
    assert before.generations == after.generations
    assert not {*before.grades} & {*after.grades}


JUDGED = ("grades", "pairs")
EVERY = ("directives", "generations", "grades", "pairs")


@pytest.mark.parametrize(
    ("function", "mode", "anew"),
    [
        ("writer_messages", "logprobs", ("generations", *JUDGED)),
        ("joint_writer_messages", "logprobs", ("generations", *JUDGED)),
        ("director_messages", "logprobs", ("directives", "pairs")),
        ("judge_messages", "logprobs", JUDGED),
        ("judge_messages", "rationale", ()),
        ("rationale_messages", "rationale", JUDGED),
        ("rationale_schema", "rationale", JUDGED),
        ("rubric_text", "logprobs", EVERY),
        ("_write_tail", "logprobs", ("generations", *JUDGED)),
        ("policy_messages", "logprobs", ("pairs",)),
    ],
)
def test_what_is_asked_in_other_words_is_made_anew_with_all_that_follows(
    function: str, mode: str, anew: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shards() -> Shards:
        combine = "synthesis.combine=[[ornament, mood]]"
        plan, _ = make_run(tmp_path, f"judge.mode={mode}", combine, second=MOOD, levels=GIVEN)
        return name_shards(plan, plan_units(plan))

    before, place = shards(), f"cpt_ray.chat.conversations.{function}"
    monkeypatch.setattr(place, in_other_words(pydoc.locate(place)))
    after = shards()
    changed = [table for table in EVERY if {*getattr(before, table)} != {*getattr(after, table)}]
    assert changed == [*anew]


@pytest.mark.parametrize("policy_is_asked", ["synthesis.ask=prompt", "synthesis.control=0.9"])
def test_answers_to_a_bare_prompt_are_written_anew_if_it_is_put_in_other_words(
    policy_is_asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def units() -> set[str]:
        plan, _ = make_run(tmp_path, policy_is_asked, levels=GIVEN)
        every = (unit for rows in plan_units(plan).values() for unit in rows)
        return {unit.unit_id for unit in every if not unit.rubric_id or unit.level == CONTROL}

    before = units()
    monkeypatch.setattr("cpt_ray.chat.conversations.policy_messages", in_other_words(policy_messages))
    assert before
    assert not before & units()


def in_other_words(function: Any) -> Callable[..., Any]:
    """The same, with one more word in all that it says."""

    def changed(*arguments: Any) -> Any:
        said = function(*arguments)
        if isinstance(said, list):
            return [message | {"content": message["content"] + " Please."} for message in said]
        return said + " Please." if isinstance(said, str) else said | {"description": "Please."}

    return changed


@pytest.mark.parametrize("mode", ["logprobs", "rationale"])
@pytest.mark.parametrize("changed", ["layout", "format"])
def test_what_regrades_written_answers_regrades_the_evaluation(
    changed: str, mode: Literal["logprobs", "rationale"], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = JudgeConfig(model="fake", mode=mode)
    steps = (JudgeStep(rubrics={}, model=judge), GradeTrialsStep(rubrics={}, model=judge))
    shard = ShardName("ornament", 0).made_of()
    before = [step.output(shard) for step in steps]
    if changed == "layout":
        monkeypatch.setattr("cpt_ray.chat.conversations.rubric_text", in_other_words(rubric_text))
    else:
        monkeypatch.setattr("cpt_ray.judging.judge.GRADE_FORMAT", "another")
    assert not {*before} & {step.output(shard) for step in steps}


def test_the_policy_answers_the_evaluation_anew_if_it_is_asked_in_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    step = AnswerStep(stage="answer-base", name="base", planned={}, seed=0, model=ModelConfig(model="fake"))
    shard = ShardName("ornament", 0).made_of()
    before = step.output(shard)
    monkeypatch.setattr("cpt_ray.chat.conversations.policy_messages", in_other_words(policy_messages))
    assert step.output(shard) != before
