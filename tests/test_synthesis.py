"""The logic of the stages, with an engine that answers by a function."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt_ray.config import load_config
from cpt_ray.engine import Completion, FakeEngine, Request
from cpt_ray.errors import UserError
from cpt_ray.pool import ledger_entry
from cpt_ray.records import Directive, Generation, Grade, Pair, Reject, Unit
from cpt_ray.rundir import RunDir
from cpt_ray.synthesis import Plan, Shards, make_plan, name_shards, pair, plan_units, rubric_of, steps_of
from tests.builders import LEVELS, rubric_dict


def make_run(tmp_path: Path, *overrides: str, **rubric: Any) -> tuple[Plan, RunDir]:
    """A run over one rubric and 20 prompts."""
    (tmp_path / "rubric.yaml").write_text(yaml.safe_dump(rubric_dict(**rubric)), encoding="utf-8")
    rows = [json.dumps({"prompt": f"Write about thing {at}."}) for at in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    model = {"model": "fake", "sampling": {"max_tokens": 20}}
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "name": "t",
                "run_dir": str(tmp_path / "run"),
                "rubrics": [str(tmp_path / "rubric.yaml")],
                "prompts": {"source": str(tmp_path / "prompts.jsonl"), "held_out": 0.3},
                "synthesis": {"shard_rows": 15, "paraphrases": 3},
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
    level = level_in(asked)
    if "tell a writer" in asked:
        return Completion(text=f"Write the {level} way.")
    if "thing 7." in asked and level == "mid":
        return Completion(text="half", error="cut off", detail="not finished after 20 tokens")
    if "thing 8." in asked and level == "high":
        return Completion(text="low text. B.")
    bangs = {"low": ". B. C. D.", "mid": "! B. C! D.", "high": "! B! C! D!"}[level]
    return Completion(text=f"{level} text{bangs}", num_tokens=4)


def run_all(plan: Plan, run: RunDir, engine: FakeEngine) -> Shards:
    units = plan_units(plan)
    shards = name_shards(plan, list(units))
    write, judge, direct = steps_of(plan)
    for name, rows in units.items():
        run.write("units", name, rows)
        write(engine, run, name)
        judge(engine, run, name)
    direct(engine, run, "ornament")
    pair(plan, run, shards)
    return shards


GIVEN = [
    {"name": name, "score": score, "directives": [f"Go {name} {kind}." for kind in ("now", "softly", "please")]}
    for name, score in zip(LEVELS, (10, 50, 90), strict=True)
]


def test_every_unit_ends_in_a_pair_or_among_the_rejects(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    shards = run_all(plan, run, FakeEngine(answer))
    units = [row for rows in plan_units(plan).values() for row in rows]
    texts = {row.unit_id: row.text for row in run.read("generations", shards.generations, Generation)}
    pairs = run.read("pairs", shards.pairs, Pair)
    rejects = [row for path in (run.path / "rejects").iterdir() for row in run.read("rejects", [path.stem], Reject)]
    in_pairs = {(row.prompt_id, row.level) for row in pairs}
    rejected = {row.subject_id for row in rejects}
    assert len(units) == 3 * len(plan.prompts_of("train"))
    for unit in units:
        assert ((unit.prompt_id, unit.level) in in_pairs) != (unit.unit_id in rejected)
        assert unit.unit_id in texts or unit.unit_id in rejected


def test_rejects_are_counted_by_reason_in_the_ledger(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    train = {one.text for one in plan.prompts_of("train")}
    shards = run_all(plan, run, FakeEngine(answer))
    written = ledger_entry(run, "generations", shards.generations)
    assert written["rows_in"] == 3 * len(train)
    assert written["rejected"] == ({"cut off": 1} if "Write about thing 7." in train else {})
    paired = ledger_entry(run, "pairs", shards.pairs)
    assert paired["rejected"] == ({"other level": 1} if "Write about thing 8." in train else {})
    assert paired["rows_out"] == len(run.read("pairs", shards.pairs, Pair))


def test_held_out_prompts_and_directives_are_in_no_pair(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    shards = run_all(plan, run, FakeEngine(answer))
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
    _, _, direct = steps_of(plan)
    with pytest.raises(UserError, match=r"level low: 0 usable directive\(s\)"):
        direct(FakeEngine(lambda request: Completion(text="Aim for a score of 90.")), run, "ornament")
    same = FakeEngine(lambda request: Completion(text=f"Be {level_in(request.messages[-1]['content'])}."))
    with pytest.raises(UserError, match=r"1 usable directive\(s\)"):
        direct(same, run, "ornament")


def test_shards_hold_whole_cells_and_their_names_follow_what_matters(tmp_path: Path) -> None:
    plan, _ = make_run(tmp_path)
    units = plan_units(plan)
    for name, rows in units.items():
        assert rubric_of(name) == "ornament"
        assert len(rows) <= 15
        assert all(count == 3 for count in Counter(row.prompt_id for row in rows).values())
    again = plan_units(make_run(tmp_path, "train.beta=0.5", "judge.model=other")[0])
    assert list(again) == list(units)
    hotter = plan_units(make_run(tmp_path, "writer.sampling.temperature=0.5")[0])
    assert not set(hotter) & set(units)
    more = plan_units(make_run(tmp_path, "synthesis.samples=2")[0])
    assert set(units) < set(more)


def test_a_new_judge_regrades_without_writing_anew(tmp_path: Path) -> None:
    plan, _ = make_run(tmp_path)
    other, _ = make_run(tmp_path, "judge.model=other")
    before, after = (name_shards(one, list(plan_units(one))) for one in (plan, other))
    assert before.generations == after.generations
    assert before.directives == after.directives
    assert not set(before.grades) & set(after.grades)
    assert not set(before.pairs) & set(after.pairs)


def test_units_are_unique_and_written_as_they_are_planned(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "synthesis.samples=3")
    units = plan_units(plan)
    rows = [row for shard in units.values() for row in shard]
    assert len({row.unit_id for row in rows}) == len(rows)
    for name, shard in units.items():
        run.write("units", name, shard)
    assert run.read("units", list(units), Unit) == rows


def test_a_grade_without_verdict_stays_empty_in_the_table(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    units = plan_units(plan)
    write, judge, _ = steps_of(plan)
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
