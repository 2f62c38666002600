"""The logic of the stages, with an engine that answers by a function."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from cpt_ray.config import JudgeConfig
from cpt_ray.engines.engine import Completion, FakeEngine, Request, check_schema_is_enforced
from cpt_ray.errors import UserError
from cpt_ray.judging.judge import JudgeStep
from cpt_ray.plan import plan_units
from cpt_ray.steering.stage import Steering
from cpt_ray.synthesis.levels import LevelCounts
from cpt_ray.synthesis.stage import Steps
from cpt_ray.tables.records import CONTROL, Directive, Generation, Grade, Pair, Reject, Unit
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.shard import ShardName
from cpt_ray.units import control_directive
from tests.builders import LEVELS, make_generation, make_grade, make_rubric
from tests.fake_runs import GIVEN, MOOD, answer, level_in, make_run, synthesized


def test_every_unit_ends_in_a_pair_or_among_the_rejects(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    shards = synthesized(plan, run)
    units = [row for rows in plan_units(plan).values() for row in rows]
    texts = {row.unit_id: row.text for row in run.read("generations", shards.generations, Generation)}
    pairs = run.read("pairs", shards.pairs, Pair)
    rejects = [row for path in (run.path / "rejects").iterdir() for row in run.read("rejects", [path.stem], Reject)]
    in_pairs = {(row.prompt_id, row.chosen[0].content) for row in pairs}
    rejected = {row.subject_id for row in rejects}
    assert len(units) == 3 * len(plan.prompts_of("train"))
    for unit in units:
        is_used = (unit.prompt_id, texts.get(unit.unit_id)) in in_pairs
        assert is_used != (unit.unit_id in rejected)


def test_held_out_prompts_and_directives_are_in_no_pair(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    shards = synthesized(plan, run)
    held_out = {one.prompt_id for one in plan.prompts_of("held_out")}
    directives = run.read("directives", shards.directives, Directive)
    splits = Counter((one.level, one.split) for one in directives)
    assert splits == {(level, split): n for level in LEVELS for split, n in (("train", 2), ("held_out", 1))}
    trained = {one.directive_id for one in directives if one.split == "train"}
    for one in run.read("pairs", shards.pairs, Pair):
        assert one.prompt_id not in held_out
        assert one.directive_id in trained


def test_a_director_that_leaks_or_repeats_is_refused_with_the_reason(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path)
    direct = Steps.of(plan, ()).direct
    with pytest.raises(UserError, match=r"level low: 0 usable directive\(s\)"):
        direct(FakeEngine(lambda request: Completion(text="Aim for a score of 90.")), run, "ornament")
    same = FakeEngine(lambda request: Completion(text=f"Be {level_in(request.messages[-1]['content'])}."))
    with pytest.raises(UserError, match=r"1 usable directive\(s\)"):
        direct(same, run, "ornament")
    spellings = itertools.cycle(("Be {}.", "be {}", "BE  {}."))
    shouting = FakeEngine(
        lambda asked: Completion(text=next(spellings).format(level_in(asked.messages[-1]["content"])))
    )
    with pytest.raises(UserError, match=r"1 usable directive\(s\), .* 11 repeats another"):
        direct(shouting, run, "ornament")


def test_a_later_pass_is_not_judged_by_a_rubric_that_has_all_its_levels(tmp_path: Path) -> None:
    run, rubrics = RunDir(tmp_path), {"ornament": make_rubric(), "other": make_rubric(id="other")}
    first = [make_generation(level, text=f"{level} text.") for level in LEVELS]
    later = dataclasses.replace(make_generation("low", sample=1, text="low text again."), rubric_id="other")
    shard = ShardName(number=0).made_of("later")
    run.write("generations", "first", first)
    run.write("generations", shard, [later])
    scores = dict(zip(LEVELS, (10, 50, 90), strict=True))
    run.write("grades", "of-first", [make_grade(one.unit_id, scores[one.level]) for one in first])
    for earlier, graded_by in (({}, {"ornament", "other"}), ({shard: [("first", "of-first")]}, {"other"})):
        step = JudgeStep(rubrics=rubrics, model=JudgeConfig(model="judge"), margin=0.1, earlier_passes=earlier)
        step(FakeEngine(answer), run, shard)
        assert {row.rubric_id for row in run.read("grades", [step.output(shard)], Grade)} == graded_by
        run.shard("grades", step.output(shard)).unlink()


def test_units_are_unique_and_written_as_they_are_planned(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "synthesis.samples=3", "synthesis.first_pass=3", "synthesis.control=0.5")
    units = plan_units(plan)
    rows = [row for shard in units.values() for row in shard]
    assert len({row.unit_id for row in rows}) == len(rows)
    for name, shard in units.items():
        run.write("units", name, shard)
    assert run.read("units", list(units), Unit) == rows


def test_a_grade_without_verdict_stays_empty_in_the_table(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    units = plan_units(plan)
    steps = Steps.of(plan, ())
    write, judge = steps.write, steps.judges[0]
    name = next(iter(units))
    run.write("units", name, units[name])
    write(FakeEngine(answer), run, name)
    judge(FakeEngine(lambda request: Completion(error="too long")), run, name)
    grades = run.read("grades", [judge.output(name)], Grade)
    assert grades
    assert all(one.score is None and one.reason for one in grades)
    assert run.counts("grades", judge.output(name))["rejected: ungraded"] == len(grades)


def test_a_prompt_too_long_for_the_judge_is_ungraded_for_that_reason(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)

    def too_long(request: Request) -> Completion:
        return Completion(error="too long", detail="9 prompt") if request.labels else answer(request)

    steps = Steps.of(plan, ())
    write, judge = steps.write, steps.judges[0]
    name, units = next(iter(plan_units(plan).items()))
    run.write("units", name, units)
    write(FakeEngine(too_long), run, name)
    judge(FakeEngine(too_long), run, name)
    assert {one.reason for one in run.read("grades", [judge.output(name)], Grade)} == {"words: too long: 9 prompt"}


def test_control_rows_choose_the_policys_own_answer_where_no_directive_is_given(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "synthesis.control=0.9", levels=GIVEN)
    shards = synthesized(plan, run)
    pairs = {one.pair_id: one for one in run.read("pairs", shards.pairs, Pair)}
    control = [one for one in pairs.values() if one.level == CONTROL]
    assert len({one.cell_id for one in control}) > 5
    systems = set()
    for one in control:
        told = control_directive(plan.config.synthesis.neutral_directives, one.cell_id)
        assert [message.content for message in one.prompt if message.role == "system"] == ([told] if told else [])
        systems.add(told)
        assert one.chosen[0].content == "mid text! B. C! Own."
        assert one.rejected_level in ("low", "high")  # the policy's own answer is mid already
        assert pairs[one.twin_id].level == one.rejected_level
        assert pairs[one.twin_id].rejected == one.chosen
    assert systems == {None, "You are a helpful assistant."}
    without, _ = make_run(tmp_path, levels=GIVEN)
    names = list(plan_units(plan))
    assert [name for name in names if not ShardName.parse(name).is_control] == list(plan_units(without))


def joint_answer(request: Request) -> Completion:
    """Writes the level of each rubric it is asked for; judges by finding it."""
    system, asked = (one["content"] for one in request.messages)
    if request.labels:
        title = next(one for one in ("Ornament", "Mood") if f"# {one}" in system)
        found = [f"{title} {level};" in asked for level in LEVELS]
        return Completion(label_logprobs=tuple(0.0 if one else -math.inf for one in found))
    targets = re.findall(r"(\w+): Target level: \d of 3, (\w+)", asked)
    if not targets:
        targets = [(re.search(r"# (\w+)", system)[1], level_in(asked))]  # type: ignore[index]
    return Completion(text=" ".join(f"{title} {level};" for title, level in targets), num_tokens=4)


def test_two_rubrics_at_once_make_pairs_under_both_directives(tmp_path: Path) -> None:
    words = [{"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in LEVELS}}]
    override = "synthesis.combine=[[ornament, mood]]"
    plan, run = make_run(tmp_path, override, second=MOOD, levels=GIVEN, criteria=words)
    shards = synthesized(plan, run, joint_answer)
    pairs = [one for one in run.read("pairs", shards.pairs, Pair) if one.rubric_id == "ornament+mood"]
    assert len(pairs) == 6 * len(plan.prompts_of("train"))
    for name, level in itertools.product(("ornament", "mood"), LEVELS):
        counts = LevelCounts(run, shards.pairs).level(name, level)
        assert counts["hit"] <= counts["asked"]  # answers to two rubrics were asked for both at once
    for one in pairs:
        ornament, mood = one.level.split("+")
        assert f"Go {ornament}" in one.prompt[0].content
        assert f"Feel {mood}" in one.prompt[0].content
        assert one.chosen[0].content == f"Ornament {ornament}; Mood {mood};"
        assert all(a != b for a, b in zip(one.level.split("+"), one.rejected_level.split("+"), strict=True))
    assert len({one.level for one in pairs}) == 9


def test_a_rationale_is_read_by_its_schema_and_an_unreadable_one_is_no_score(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "judge.mode=rationale", "judge.votes=2", levels=GIVEN)
    votes = iter(range(10**6))

    def reason(request: Request) -> Completion:
        if request.json_schema is None:
            return answer(request)
        assert request.samples == 2
        if "thing 3." in request.messages[-1]["content"]:
            return Completion(text='{"words": {"reason": "cut', error="cut off", detail="short")
        level = 1 + next(votes) % 2  # the two votes on an answer differ by one level
        return Completion(text=json.dumps({"words": {"reason": "So it is.", "level": level}}))

    steps = Steps.of(plan, ())
    write, judge = steps.write, steps.judges[0]
    for name, units in plan_units(plan).items():
        run.write("units", name, units)
        write(FakeEngine(reason), run, name)
        judge(FakeEngine(reason), run, name)
        texts = {one.unit_id: one.prompt for one in run.read("generations", [name], Generation)}
        for grade in run.read("grades", [judge.output(name)], Grade):
            if "thing 3." in texts[grade.unit_id]:
                assert (grade.score, grade.reason) == (None, "words: cut off: short")
            else:
                assert (grade.judged, grade.criteria[0].reason) == (30.0, "So it is.")


def test_votes_that_did_not_come_are_named(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "judge.mode=rationale", "judge.votes=3", levels=GIVEN)
    votes = iter(range(10**6))

    def filtered(request: Request) -> Completion:
        if request.json_schema is None:
            return answer(request)
        if next(votes) % 3:
            return Completion(error="filtered", detail="finish_reason content_filter")
        return Completion(text=json.dumps({"words": {"reason": "So it is.", "level": 1}}))

    steps = Steps.of(plan, ())
    write, judge = steps.write, steps.judges[0]
    name, units = next(iter(plan_units(plan).items()))
    run.write("units", name, units)
    write(FakeEngine(filtered), run, name)
    judge(FakeEngine(filtered), run, name)
    grades = run.read("grades", [judge.output(name)], Grade)
    assert {one.criteria[0].reason for one in grades} == {"unreadable verdict (2 of 3 votes): 2 filtered"}


def test_an_engine_that_ignores_schemas_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match="rationales need a server that enforces schemas"):
        check_schema_is_enforced(FakeEngine(lambda request: Completion(text="Paris.")), "judge m")
    check_schema_is_enforced(FakeEngine(lambda request: Completion(text='{"answer": "quokka-7301"}')), "judge m")


def test_an_answer_that_nearly_repeats_an_earlier_one_is_rejected(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "synthesis.near_duplicates=0.5", levels=GIVEN)

    def nearly(request: Request) -> Completion:
        made = answer(request)
        number = re.search(r"thing (\d+)", request.messages[-1]["content"])
        if request.labels or made.error or not number:
            return made
        own = " ".join(f"word{int(number[1]) % 5}of{at}" for at in range(40))
        return Completion(text=f"{made.text} {own} {number[1]}", num_tokens=44)

    shards = synthesized(plan, run, nearly)
    rejects = [one for path in (run.path / "rejects").iterdir() for one in run.read("rejects", [path.stem], Reject)]
    repeated = {one.subject_id for one in rejects if one.reason in ("near duplicate", "other level")}
    generations = run.read("generations", shards.generations, Generation)
    kinds = {(one.level, int(one.prompt.split()[-1].strip(".")) % 5) for one in generations}
    assert len(generations) - len(repeated) == len(kinds)


def test_steering_learns_from_what_the_judges_come_to_together(tmp_path: Path) -> None:
    words = [{"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in LEVELS}}]
    plan, run = make_run(tmp_path, 'judges=[{"model": "other"}]', levels=GIVEN, criteria=words)
    shards = synthesized(plan, run)
    for name in shards.grades:
        rows = run.read("grades", [name], Grade)
        if rows[0].judge == "other":
            run.shard("grades", name).unlink()
            run.write("grades", name, [dataclasses.replace(one, score=0.0) for one in rows])
    found = {
        (one.text.split()[0], one.scores["ornament"]) for one in Steering(plan, run, shards).training_population.answers
    }
    assert found == {("low", 5.0), ("mid", 25.0), ("high", 45.0)}


def test_steering_has_a_judges_grades_of_an_answer_by_every_rubric(tmp_path: Path) -> None:
    words = [{"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in LEVELS}}]
    asked = ("synthesis.ask=prompt", "synthesis.samples=4", "synthesis.first_pass=4")
    plan, run = make_run(tmp_path, *asked, second=MOOD, levels=GIVEN, criteria=words)
    numbers = itertools.count()

    def write(request: Request) -> Completion:
        if request.labels or " of 3, " in request.messages[-1]["content"]:
            return answer(request)
        number = next(numbers)
        return Completion(text=f"{LEVELS[number % 3]} text {number}.", num_tokens=4)

    shards = synthesized(plan, run, write)
    graded = {(one.unit_id, one.rubric_id) for one in run.read("grades", shards.grades, Grade) if one.score is not None}
    both = {name for name, rubric in graded if rubric == "ornament" and (name, "mood") in graded}
    assert both  # no answer was asked for at a rubric
    answers = Steering(plan, run, shards).training_population.answers
    assert any(answer.scores.keys() == {"ornament", "mood"} for answer in answers)
