"""The logic of the stages, with an engine that answers by a function."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pydoc
import re
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from cpt_ray.chat.conversations import policy_messages, rubric_text
from cpt_ray.cli import main
from cpt_ray.config import JudgeConfig, ModelConfig, PriceConfig, load_config
from cpt_ray.console import status_lines
from cpt_ray.engines.engine import Completion, FakeEngine, Request, check_schema_is_enforced
from cpt_ray.engines.ledger import Tally, ledger_entry
from cpt_ray.engines.pool import LocalRunner
from cpt_ray.engines.worker import MAX_DEATHS, Attempts, endpoint_key
from cpt_ray.errors import UserError
from cpt_ray.evaluation.stage import AnswerStep, GradeTrialsStep, evaluate, update_report
from cpt_ray.judging.judge import JudgeStep
from cpt_ray.plan import Plan, Shards, make_plan, plan_units
from cpt_ray.steering.stage import Steering
from cpt_ray.synthesis.stage import Steps, name_shards, synthesize
from cpt_ray.tables.records import CONTROL, Directive, Generation, Grade, Pair, Reject, Unit
from cpt_ray.tables.rundir import REPORT_FILE, STEERING_RESULTS_FILE, RunDir
from cpt_ray.tables.shard import ShardName
from cpt_ray.units import control_directive
from tests.builders import LEVELS, make_generation, make_grade, make_rubric, rubric_dict
from tests.tiny_model import make_tiny_model


def make_run(
    tmp_path: Path, *overrides: str, second: dict[str, Any] | None = None, **rubric: Any
) -> tuple[Plan, RunDir]:
    """A run over one rubric (or two) and 20 prompts."""
    for name, one in (("rubric", rubric_dict(**rubric)), ("second", second)):
        if one:
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(one), encoding="utf-8")
    rows = [json.dumps({"prompt": f"Write about thing {at}."}) for at in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    model = {"model": "fake", "sampling": {"max_tokens": 20}}
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "name": "t",
                "run_dir": str(tmp_path / "run"),
                "rubrics": [
                    str(tmp_path / f"{name}.yaml") for name in (("rubric", "second") if second else ("rubric",))
                ],
                "prompts": {"source": str(tmp_path / "prompts.jsonl"), "held_out": 0.3},
                "synthesis": {"shard_rows": 30, "paraphrases": 3, "samples": 1},
                "writer": model,
                "policy": model,
            }
        ),
        encoding="utf-8",
    )
    return make_plan(load_config(tmp_path / "run.yaml", overrides)), RunDir(tmp_path / "run")


def level_in(text: str) -> str:
    """The level a writer's or director's request names."""
    return text.split(" of 3, ")[1].split()[0].strip(".")


def answer(request: Request) -> Completion:
    """Writes what is asked (with the bangs that the measure wants); judges by the word it finds; errs now and then."""
    asked = request.messages[-1]["content"]
    if request.labels:
        found = next(at for at, level in enumerate(LEVELS) if f"{level} text" in asked)
        return Completion(label_logprobs=tuple(0.0 if at == found else -math.inf for at in range(3)))
    if " of 3, " not in asked:  # no rubric in front of it: the policy's own answer
        return Completion(text="mid text! B. C! Own.", num_tokens=4)
    level = level_in(asked)
    if "tell a writer" in asked:
        return Completion(text=f"Write the {level} way.")
    if "thing 7." in asked and level == "mid":
        return Completion(text="half", error="cut off", detail="not finished after 20 tokens")
    if "thing 8." in asked and level == "high":
        return Completion(text="low text. B.")
    bangs = {"low": ". B. C. D.", "mid": "! B. C! D.", "high": "! B! C! D!"}[level]
    return Completion(text=f"{level} text{bangs}", num_tokens=4)


def with_engine(reply: Callable[[Request], Completion]) -> LocalRunner:
    """A runner whose engine answers by a function, whatever the role."""
    return LocalRunner(lambda model: FakeEngine(reply))


def synthesized(plan: Plan, run: RunDir, reply: Callable[[Request], Completion] = answer) -> Shards:
    """A whole synthesis in this process; the names of its shards."""
    synthesize(plan, run, with_engine(reply))
    return name_shards(plan, plan_units(plan))


GIVEN = [
    {"name": name, "score": score, "directives": [f"Go {name} {kind}." for kind in ("now", "softly", "please")]}
    for name, score in zip(LEVELS, (10, 50, 90), strict=True)
]


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


def test_rejects_are_counted_by_reason_in_the_ledger(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    train = {one.text for one in plan.prompts_of("train")}
    shards = synthesized(plan, run)
    written = run.read_json("ledger.json")["write"]
    assert written["rows_in"] == 3 * len(train)
    assert written["rejected"] == ({"cut off": 1} if "Write about thing 7." in train else {})
    paired = run.read_json("ledger.json")["pair"]
    assert paired["rejected"] == ({"not needed": 1} if "Write about thing 8." in train else {})  # two low answers
    assert paired["rows_out"] == len(run.read("pairs", shards.pairs, Pair))


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


def test_a_run_directory_serves_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.locked(), pytest.raises(UserError, match="another process"), RunDir(tmp_path / "run").locked():
        pass
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot be written"), RunDir(blocked / "run").locked():
        pass


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


MOOD = rubric_dict(
    id="mood",
    title="Mood",
    levels=[one | {"directives": [f"Feel {one['name']} {kind}." for kind in ("now", "softly")]} for one in GIVEN],
    criteria=[{"name": "feeling", "weight": 100, "descriptors": {name: f"{name} mood" for name in LEVELS}}],
)


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


def concluded(plan: Plan, run: RunDir, writes: Callable[[Request], Completion]) -> None:
    """A run to its end, with a writer that does this and a judge that finds the level in a text."""

    def does(request: Request) -> Completion:
        is_writer = not request.labels and "tell a writer" not in request.messages[-1]["content"]
        return writes(request) if is_writer else answer(request)

    synthesize(plan, run, with_engine(does))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Completion(error="refused", detail="no such field"), r"{n} of {n} answers were refused: no such field"),
        (
            Completion(error="cut off", detail="not finished after 20 tokens", text="half"),
            r"{n} of {n} answers were cut off at 20 tokens: raise writer\.sampling\.max_tokens; see",
        ),
        (
            Completion(error="cut off", detail="not finished after 20 tokens (all of the text is thoughts)"),
            r"{n} of {n} answers were cut off at 20 tokens: raise writer\.sampling\.max_tokens, or turn thinking off",
        ),
        (
            Completion(error="thoughts not ended", detail="all of the text is thoughts"),
            r"{n} of {n} answers were thoughts without an answer: raise writer\.sampling\.max_tokens",
        ),
        (Completion(error="ended by abort", detail="x"), r"{n} of {n} answers were lost: ended by abort \(x\)"),
        (
            Completion(text="low text. B."),
            r"\d+ of {n} answers have the text of another answer to their prompt: raise writer\.sampling\.temperature; "
            r"\d+ of {n} answers have no answer at another level to be compared with \(.* the same level \(ornament",
        ),
    ],
)
def test_no_pairs_end_the_run_with_what_was_lost_and_the_ledger_has_it(
    made: Completion, said: str, tmp_path: Path
) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    number = 3 * len(plan.prompts_of("train"))
    with pytest.raises(UserError, match="no pair was made: " + said.format(n=number)):
        concluded(plan, run, lambda request: made)
    ledger = run.read_json("ledger.json")
    assert ledger["write"]["rows_in"] == number
    assert sum(ledger["write"]["rejected"].values()) == (number if made.error else 0)
    assert ledger["pair"]["rows_out"] == 0


def test_what_is_lost_before_judging_is_said_before_the_writer_is_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    number = 3 * len(plan.prompts_of("train"))

    def writes(request: Request) -> Completion:
        asked = request.messages[-1]["content"]
        level = level_in(asked)
        if any(f"thing {at}." in asked for at in (1, 2, 3)):
            return answer(request)
        if level == "high":
            return Completion(error="cut off", text="half", detail="not finished after 20 tokens")
        return Completion(text="low text. B.") if level == "mid" else Completion(text="low text. B. C.")

    concluded(plan, run, writes)
    (note,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and "cannot be used" in line
    ]
    cut, other = (run.read_json("ledger.json")[stage]["rejected"] for stage in ("write", "pair"))
    assert note.split(": ", 2)[2].startswith(
        f"{cut['cut off']} of {number} answers were cut off at 20 tokens: raise writer.sampling.max_tokens; "
        f"{other['no partner']} of {number} answers have no answer at another level"
    )


def test_thoughts_are_counted_and_are_not_in_an_answers_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    number = 3 * len(plan.prompts_of("train"))
    thinks = {"num_tokens": 40, "had_thoughts": True, "thought_tokens": 30}
    concluded(plan, run, lambda request: Completion(text=answer(request).text.replace("half", "mid text!"), **thinks))
    written = run.read_json("ledger.json")["write"]
    assert (written["with_thoughts"], written["thought_tokens"]) == (number, 30 * number)
    assert f"{number} came with thoughts, which were cut (75% of the tokens)" in capsys.readouterr().out
    generations = [row for name in run.names("generations") for row in run.read("generations", [name], Generation)]
    assert {row.num_tokens for row in generations} == {10}


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


def test_the_card_describes_the_pairs_and_loads_as_a_data_set(tmp_path: Path) -> None:
    import datasets

    synthesized(*make_run(tmp_path, "writer.sampling.top_p=0.5", levels=GIVEN))  # of other settings
    plan, run = make_run(tmp_path, 'judges=[{"model": "other"}]', levels=GIVEN)
    shards = synthesized(plan, run)
    pairs = run.read("pairs", shards.pairs, Pair)
    tables = {"pairs": pairs, "grades": run.read("grades", shards.grades, Grade)}
    assert run.names("grades") > {*shards.grades}
    assert run.names("pairs") == {*shards.pairs}  # what is cheap to make is not kept
    for table, rows in tables.items():
        loaded = datasets.load_dataset(str(run.path), table, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.num_rows == len(rows)
    card = (run.path / "README.md").read_text()
    low = sum(one.level == "low" for one in pairs)
    num_prompts = len(plan.prompts_of("train"))
    assert f"| ornament | low | {num_prompts} | 4 | 4 | 4 |" in card
    assert f"| ornament | low | {num_prompts} | {num_prompts} | {num_prompts + 1} | {num_prompts} | {low} |" in card
    assert "| fake | other | ornament |" in card
    judges = run.read_json("judges.json")
    assert {(one["judge"], one["against"]): one["weighted_kappa"] for one in judges}["fake", "other"] == 1.0
    before = (run.path / "README.md").stat().st_mtime_ns
    synthesized(plan, run)
    assert (run.path / "README.md").stat().st_mtime_ns == before


def test_the_card_is_written_again_when_shards_of_other_settings_lie_beside_its_own(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    synthesized(plan, run)
    assert "grades/*.parquet" in (run.path / "README.md").read_text()
    synthesized(*make_run(tmp_path, "writer.sampling.top_p=0.5", levels=GIVEN))
    synthesized(plan, run)
    assert "grades/*.parquet" not in (run.path / "README.md").read_text()


def test_steering_learns_from_what_the_judges_come_to_together(tmp_path: Path) -> None:
    words = [{"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in LEVELS}}]
    plan, run = make_run(tmp_path, 'judges=[{"model": "other"}]', levels=GIVEN, criteria=words)
    shards = synthesized(plan, run)
    for name in shards.grades:
        rows = run.read("grades", [name], Grade)
        if rows[0].judge == "other":
            run.write("grades", name, [dataclasses.replace(one, score=0.0) for one in rows])
    found = {
        (one.text.split()[0], one.scores["ornament"]) for one in Steering(plan, run, shards).training_population.answers
    }
    assert found == {("low", 5.0), ("mid", 25.0), ("high", 45.0)}


def test_a_rubric_that_cannot_check_the_judge_is_named_before_anything_starts(tmp_path: Path) -> None:
    measured = str(tmp_path / "measured.yaml")
    only = rubric_dict()
    (tmp_path / "measured.yaml").write_text(
        yaml.safe_dump(only | {"criteria": [only["criteria"][1] | {"weight": 100}]})
    )
    with pytest.raises(UserError, match=r"measured\.yaml: no measure to compare the judge with"):
        make_run(tmp_path, f"evaluate.judge_check={measured}")
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read"):
        make_run(tmp_path, f"evaluate.judge_check={tmp_path / 'gone.yaml'}")


def test_a_saved_configuration_that_no_rubric_has_is_named_before_anything_starts(tmp_path: Path) -> None:
    make_run(tmp_path, "serve.configurations={poet: {ornament: high}, plain: {ornament: 10}}")
    with pytest.raises(UserError, match=r"serve\.configurations\.poet: configuration\.ornament: no level 'hihg'"):
        make_run(tmp_path, "serve.configurations={poet: {ornament: hihg}}")
    with pytest.raises(UserError, match=r"serve\.configurations\.poet: configuration: no rubric 'ornamant'"):
        make_run(tmp_path, "serve.configurations={poet: {ornamant: high}}")


def test_a_held_out_prompt_in_other_letters_fails_the_run(tmp_path: Path) -> None:
    plan, _ = make_run(tmp_path)
    leaked = plan.prompts_of("held_out")[0].text.upper().strip(".") + "!"
    for at in range(50):  # whichever of these is in the other split
        with (tmp_path / "prompts.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"prompt": leaked + "!" * at}))
    with pytest.raises(UserError, match="has the same words"):
        make_plan(plan.config)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt_ray.tables.files.uuid.uuid4", lambda: uuid.UUID(int=0))
    plan, run = make_run(tmp_path)
    name, units = next(iter(plan_units(plan).items()))
    path = run.shard("units", name)
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.{uuid.UUID(int=0).hex}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some space"):
        run.write("units", name, units)
    assert list(path.parent.iterdir()) == []
    run.attempts.mkdir(parents=True)
    (run.attempts / f".write-x.{uuid.UUID(int=0).hex}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"write-x: cannot be written \(No space left on device\); free some space"):
        Attempts(run.attempts).begin("write-x", "on write of shard x")


def test_the_death_of_an_engine_is_forgiven_a_bounded_number_of_times(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for _ in range(MAX_DEATHS):
        attempts.begin("write-x", "on write of shard x")
    attempts.note("write-x", "EngineDiedError: core dumped")
    expected = r"died 3 times on write of shard x \(the last time: EngineDiedError: core dumped\)"
    with pytest.raises(UserError, match=expected):
        attempts.begin("write-x", "on write of shard x")
    attempts.end("write-x")
    attempts.begin("write-x", "on write of shard x")


def test_the_ledger_says_what_it_cost_and_status_prints_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    tally, other = Tally(3), Tally(1)
    tally.add([Completion(num_prompt_tokens=1000, num_cached_tokens=800, num_tokens=50)])
    tally.reject("cut off")
    run.write("units", "a", [], tally.close(2))
    run.write("units", "b", [], other.close(1))
    price = PriceConfig(prompt=1, cached=0.1, generated=10)
    entry = ledger_entry(run, "units", ["a", "b"], price)
    assert entry["cost"] == pytest.approx((200 * 1 + 800 * 0.1 + 50 * 10) / 1e6)
    assert (entry["rows_in"], entry["rows_out"], entry["rejected"]) == (4, 3, {"cut off": 1})
    more = {"engine_seconds": 0.5, "generated_tokens_per_second": 100.0, "steps": 2000, "so far": "this command"}
    lines = status_lines({"write": entry | more})
    assert lines[1].split() == ["write", "4", "3", "1,000", "800", "50", "0.5", "100", "0.00078"]
    assert lines[2:] == ["  rejected: 1 cut off", "  steps: 2,000, so far: this command"]


def evaluated(plan: Plan, run: RunDir) -> None:
    """Synthesis and evaluation by an engine that counts 100 tokens for every request and 10 for every answer."""
    runner = with_engine(lambda request: dataclasses.replace(answer(request), num_prompt_tokens=100, num_tokens=10))
    synthesize(plan, run, runner)
    evaluate(plan, run, name_shards(plan, plan_units(plan)), runner)


def test_evaluation_costs_what_its_roles_do(tmp_path: Path) -> None:
    policy = f"policy.model={make_tiny_model(tmp_path / 'policy')}"
    plan, run = make_run(tmp_path, policy, "policy.price.generated=50", "judge.price.prompt=3", levels=GIVEN)
    evaluated(plan, run)
    ledger, num_trials = run.read_json("ledger.json"), 3 * 2 * len(plan.prompts_of("held_out"))
    for stage in ("answer-base", "answer-tuned"):
        assert (ledger[stage]["rows_in"], ledger[stage]["cost"]) == (num_trials, num_trials * 10 * 50 / 1e6)
    assert (ledger["grade"]["rows_in"], ledger["grade"]["cost"]) == (2 * num_trials, 2 * num_trials * 100 * 3 / 1e6)


STEERED: dict[str, Any] = {
    "counts": [0],
    "num_users": 8,
    "accuracy": {"NP-BTL": {"mean": [0.5], "ci": [None]}},
    "satisfaction": {},
    "costs": {},
}


@pytest.mark.parametrize("policy", ["the tuned", "an earlier"])
def test_steering_that_was_fitted_before_is_in_the_report_if_it_is_of_that_policy(policy: str, tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, f"policy.model={make_tiny_model(tmp_path / 'policy')}", levels=GIVEN)
    run.write_json(STEERING_RESULTS_FILE, STEERED | {"policy": str(run.model) if policy == "the tuned" else policy})
    evaluated(plan, run)
    assert ("NP-BTL" in (run.path / REPORT_FILE).read_text(encoding="utf-8")) == (policy == "the tuned")


def test_steering_after_an_evaluation_renders_its_report_again_and_alone_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = f"policy.model={make_tiny_model(tmp_path / 'policy')}"
    plan, run = make_run(tmp_path, policy, levels=GIVEN)
    evaluated(plan, run)
    shards = name_shards(plan, plan_units(plan))
    run.write_json(STEERING_RESULTS_FILE, STEERED | {"policy": str(run.model)})
    update_report(plan, run, shards)
    page = (run.path / REPORT_FILE).read_text(encoding="utf-8")
    assert "NP-BTL" in page
    assert "The dials" in page
    (run.path / REPORT_FILE).write_text("of other settings", encoding="utf-8")
    others, _ = make_run(tmp_path, policy, "policy.sampling.max_tokens=5", levels=GIVEN)
    update_report(others, run, shards)
    assert (run.path / REPORT_FILE).read_text(encoding="utf-8") == "of other settings"
    assert "report/report.html is of other settings" in capsys.readouterr().out
    (run.path / REPORT_FILE).unlink()
    update_report(others, run, shards)
    assert not (run.path / REPORT_FILE).exists()


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


def test_verbose_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synthesize", "no-such-file.yaml"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["synthesize", "no-such-file.yaml", "--verbose"]) == 1
    shown = capsys.readouterr().err
    assert "in read_yaml" in shown
    assert shown.splitlines()[-1].startswith("error: no-such-file.yaml: cannot be read")


def test_a_missing_key_is_noticed_before_anything_starts_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    endpoint = "judge.endpoint={base_url: 'http://127.0.0.1:1/v1', api_key_env: NO_SUCH_KEY}"
    _, run = make_run(tmp_path, endpoint)
    for command in ("run", "synthesize", "evaluate"):
        assert main([command, str(tmp_path / "run.yaml"), endpoint]) == 1
        assert "set the environment variable NO_SUCH_KEY" in capsys.readouterr().err
    for key in ("sk-one sk-two", "sk-\u00e9", "sk-one\nsk-two"):
        monkeypatch.setenv("NO_SUCH_KEY", key)
        assert main(["synthesize", str(tmp_path / "run.yaml"), endpoint]) == 1
        shown = capsys.readouterr().err
        assert "the environment variable NO_SUCH_KEY cannot be a key" in shown
        assert "sk-" not in shown
    monkeypatch.setenv("NO_SUCH_KEY", " sk-mine\n")
    judge = make_run(tmp_path, endpoint)[0].config.judge
    assert (found := endpoint_key(judge))
    assert found.get_secret_value() == "sk-mine"
    assert main(["train", str(tmp_path / "run.yaml"), endpoint]) == 1
    assert "nothing is there; run `cpt synthesize`" in capsys.readouterr().err
    assert not run.path.exists()


def test_a_run_file_is_checked_without_starting_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, run = make_run(tmp_path)
    assert main(["check", str(tmp_path / "run.yaml"), str(tmp_path / "rubric.yaml")]) == 0
    shown = capsys.readouterr()
    answers = sum(len(list(units)) for units in plan_units(plan).values())
    assert f"{answers} answers in the first pass" in shown.out + shown.err
    assert "rubric.yaml: ok (Ornament: 3 levels" in shown.out + shown.err
    assert not run.path.exists()
    (tmp_path / "prompts.jsonl").unlink()
    assert main(["check", str(tmp_path / "run.yaml")]) == 1
    assert "prompts.jsonl" in capsys.readouterr().err


def test_a_judge_that_nothing_asks_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    endpoint = "judge.endpoint={base_url: 'http://127.0.0.1:1/v1', api_key_env: NO_SUCH_KEY}"
    make_run(tmp_path, endpoint, criteria=[rubric_dict()["criteria"][1] | {"weight": 100}])
    assert main(["evaluate", str(tmp_path / "run.yaml"), endpoint]) == 1
    assert "nothing is there; run `cpt synthesize`" in capsys.readouterr().err


def test_a_reader_that_has_left_ends_a_command_in_one_line(tmp_path: Path) -> None:
    RunDir(tmp_path).write_text("run.yaml", "name: mine\n")
    command = [sys.executable, "-m", "cpt_ray", "status", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "stopped: nobody reads the output any more\n")


def test_status_needs_only_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert "no run.yaml there that names a run" in capsys.readouterr().err
    run = RunDir(tmp_path)
    run.write_text("run.yaml", "name: mine\n")
    run.add_to_ledger("write", {"rows_in": 5, "rows_out": 4, "rejected": {"cut off": 1}})
    with run.locked():
        assert main(["status", str(tmp_path)]) == 0
    assert "mine: a process is at work on it" in capsys.readouterr().out
    assert main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mine: no process is at work on it" in printed
    assert "rejected: 1 cut off" in printed
