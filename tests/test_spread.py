"""Levels that the writer's own answers set, and passes that ask for what is missing."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_ray.cli import main
from cpt_ray.config import load_config
from cpt_ray.engines.engine import Completion, Request
from cpt_ray.errors import UserError
from cpt_ray.judging.spread import CHECK, Spread, survey, with_points
from cpt_ray.plan import Plan, check_first_pass, make_plan, plan_units
from cpt_ray.rubrics.bins import level_at
from cpt_ray.rubrics.grading import measured_criterion
from cpt_ray.rubrics.rubric import MeasureSpec, Rubric
from cpt_ray.synthesis.levels import LevelCounts, level_lines
from cpt_ray.synthesis.stage import spread_of, with_levels
from cpt_ray.tables.records import Generation, Pair, Unit
from cpt_ray.tables.rundir import RunDir
from tests.builders import LEVELS, make_generation, rubric_dict
from tests.fake_runs import synthesized

SCORES = (16.7, 50, 83.3)


def spread_dict(**changes: Any) -> dict[str, Any]:
    """A rubric of length whose levels the writer sets."""
    directives = [[f"Be {name} now.", f"Be {name}, please.", f"Go {name}."] for name in LEVELS]
    own = {
        "id": "size",
        "title": "Amount",
        "levels": [
            {"name": name, "score": score, "directives": some}
            for name, score, some in zip(LEVELS, SCORES, directives, strict=True)
        ],
        "criteria": [
            {
                "name": "size",
                "weight": 100,
                "descriptors": {name: f"{name} size" for name in LEVELS},
                "measure": {"name": "word_count", "values": "spread"},
            }
        ],
    }
    return rubric_dict(**own) | changes


SIZE = Rubric.model_validate(spread_dict())


def texts(lengths: list[int]) -> list[Generation]:
    return [make_generation("low", "p", at, " ".join(["word"] * count)) for at, count in enumerate(lengths)]


def points_of(rubric: Rubric) -> tuple[tuple[float, float], ...]:
    assert rubric.criteria[0].measure
    return rubric.criteria[0].measure.points


def score(rubric: Rubric, text: str) -> float:
    found = measured_criterion(rubric, rubric.criteria[0], text).score
    assert found is not None
    return found


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=40, max_size=200))
def test_a_score_is_the_share_of_answers_below_and_thirds_become_levels(lengths: list[int]) -> None:
    answers = texts(lengths)
    try:
        rubric = with_points(SIZE, survey([SIZE], answers)[SIZE.id])
    except UserError as error:
        assert "not spread enough for 3 levels" in str(error)
        assert len(set(np.percentile(lengths, [16, 33, 34, 66, 67, 83]))) < 6  # values between which a bound falls
        return
    for generation in answers:
        found, length = score(rubric, generation.text), len(generation.text.split())
        bounds = [value for value, _ in points_of(rubric)][1:3]
        if length not in bounds:
            expected = "low" if length < bounds[0] else "high" if length > bounds[1] else "mid"
            assert level_at(rubric, found) == expected


def test_scores_go_on_beyond_the_ends() -> None:
    rubric = with_points(SIZE, survey([SIZE], texts(list(range(1, 61))))[SIZE.id])
    by_length = [score(rubric, " ".join(["word"] * count)) for count in (1, 30, 60, 90, 120)]
    assert by_length == sorted(by_length)
    assert by_length[-1] > 150
    assert by_length[4] - by_length[3] == pytest.approx(by_length[3] - by_length[2])


def test_answers_that_were_cut_do_not_say_how_long_answers_are() -> None:
    whole = texts(list(range(1, 41)))
    cut = [dataclasses.replace(one, text=one.text * 9, is_cut=True) for one in whole]
    assert survey([SIZE], whole + cut) == survey([SIZE], whole)


def test_a_writer_without_spread_is_named_with_its_numbers() -> None:
    with pytest.raises(UserError, match=r"rubric size: word_count: .*40 answers; below 17%: 7, 33%: 7, 67%: 7"):
        with_points(SIZE, survey([SIZE], texts([7] * 40))[SIZE.id])
    with pytest.raises(UserError, match="takes 20 answers of the first pass that can be measured; found 5; raise"):
        with_points(SIZE, survey([SIZE], texts([1, 2, 3, 4, 5]))[SIZE.id])


def make_run(tmp_path: Path, *overrides: str) -> tuple[Plan, RunDir]:
    """A run over a rubric whose levels the writer sets, and 40 prompts."""
    (tmp_path / "size.yaml").write_text(yaml.safe_dump(spread_dict()), encoding="utf-8")
    rows = [json.dumps({"prompt": f"Write about thing {at}."}) for at in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = {
        "name": "t",
        "run_dir": str(tmp_path / "run"),
        "rubrics": [str(tmp_path / "size.yaml")],
        "prompts": {"source": str(tmp_path / "prompts.jsonl"), "held_out": 0.3},
        "synthesis": {"shard_rows": 30, "ask": "prompt", "first_pass": 3, "samples": 9},
        "writer": {"model": "fake", "sampling": {"max_tokens": 90}},
        "policy": {"model": "fake"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
    return make_plan(load_config(tmp_path / "run.yaml", overrides)), RunDir(tmp_path / "run")


@pytest.mark.parametrize("command", ["check", "synthesize"])
def test_a_first_pass_that_is_too_small_for_a_spread_is_refused_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, _ = make_run(tmp_path, "prompts.limit=6", "synthesis.first_pass=9")
    check_first_pass(plan)
    assert main([command, str(tmp_path / "run.yaml"), "prompts.limit=6"]) == 1
    said = r"synthesis.first_pass: found \d+ answers, to \d prompts; a rubric with `values: spread` takes 20; raise it"
    assert re.search(said, capsys.readouterr().err)


def ramble(request: Request) -> Completion:
    """An answer of 1 to 60 words, by the request's seed, as a writer without instructions gives it."""
    assert [one["role"] for one in request.messages] == ["user"]
    count = random.Random(request.seed).randint(1, 60)
    return Completion(text=" ".join(f"w{request.seed}x{at}" for at in range(count)), num_tokens=count)


def test_later_passes_ask_only_prompts_that_lack_a_level_and_end_with_grids_for_nearly_all(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path)
    shards = synthesized(plan, run, ramble)
    rubrics = with_levels(plan, run, plan_units(plan)).rubrics
    num_prompts, by_pass = len(plan.prompts_of("train")), list[int]()
    have: dict[str, set[str | None]] = {prompt.prompt_id: set() for prompt in plan.prompts_of("train")}
    for number in range(plan.config.synthesis.num_passes):
        names = [passes[number].generations for passes in shards.passes.values()]
        units, rows = run.read("units", names, Unit), run.read("generations", names, Generation)
        by_pass.append(len(units))
        for unit in units:
            assert not have[unit.prompt_id] >= {*LEVELS}, "a prompt that has everything is not asked again"
        for row in rows:
            have[row.prompt_id].add(level_at(rubrics[0], score(rubrics[0], row.text), 0.1))
    assert by_pass[0] == 3 * num_prompts
    assert by_pass == sorted(by_pass, reverse=True)
    ids = [unit.unit_id for unit in run.read("units", shards.written, Unit)]
    assert len(ids) == len(set(ids))
    complete = sum(levels >= {*LEVELS} for levels in have.values())
    pairs = run.read("pairs", shards.pairs, Pair)
    per_prompt = {one.prompt_id: 0 for one in pairs}
    for one in pairs:
        per_prompt[one.prompt_id] += 1
    assert sum(count == 6 for count in per_prompt.values()) == complete > 0.7 * num_prompts


def test_levels_are_looked_up_once_and_do_not_move(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path)
    units = plan_units(plan)
    with pytest.raises(UserError, match="synthesis is not complete for this run file"):
        with_levels(plan, run, units)
    synthesized(plan, run, ramble)
    before = with_levels(plan, run, units).rubrics
    for path in (run.path / "generations").iterdir():
        path.unlink()
    assert with_levels(plan, run, units).rubrics == before
    spread = spread_of(plan, units)
    assert spread
    assert spread.key == Spread(before, spread.first_pass).key


def test_another_second_measure_is_looked_up_anew_and_moves_no_level(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path)
    synthesized(plan, run, ramble)
    spread = spread_of(plan, plan_units(plan))
    assert spread
    for measure in ("character_count", "mean_word_length"):
        rubrics = [rubric.model_copy(update={"check": MeasureSpec(name=measure)}) for rubric in spread.rubrics]
        checked = Spread(tuple(rubrics), spread.first_pass)
        assert checked.key == spread.key
        assert {entry[CHECK]["measure"] for entry in checked.read_or_make(run).values()} == {measure}
        assert checked.resolve(run)[0].criteria == spread.resolve(run)[0].criteria


def test_what_each_level_took_is_said_and_a_level_that_is_not_reached_is_named(tmp_path: Path) -> None:
    def at_ends(request: Request) -> Completion:
        count = random.Random(request.seed).choice([5, 30, 31, 32, 33, 34, 35, 60])
        return Completion(text=" ".join(f"w{request.seed}x{at}" for at in range(count)), num_tokens=count)

    plan, run = make_run(tmp_path)
    shards = synthesized(plan, run, at_ends)
    tokens = sum(one.num_tokens for one in run.read("generations", shards.written, Generation))
    lines = level_lines(with_levels(plan, run, plan_units(plan)), run, shards, tokens)
    counts = LevelCounts(run, shards.pairs)
    pairs = run.read("pairs", shards.pairs, Pair)
    for level in LEVELS:
        kept = {one.chosen[0].content for one in pairs if one.level == level}
        assert counts.level("size", level)["kept"] == len(kept)
    assert f"{1000 * len(pairs) / tokens:.1f} ordered pairs" in lines[-1]


def test_an_earlier_versions_run_directory_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.check_format()
    run.write_run({"name": "t"})
    run.write("generations", "ornament-00000-0123456789ab", [make_generation("low")])
    run.check_format()
    run.write_text("run.yaml", "name: t\n")
    with pytest.raises(UserError, match="written by an earlier version, in another format; give another run_dir"):
        run.check_format()
    run.prune("generations", ())
    run.check_format()


def test_a_second_measure_of_length_is_looked_up_in_whole_answers() -> None:
    judged = [{"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in LEVELS}}]
    answers = [make_generation("low", text="one two"), make_generation("low", text="one two three")]
    answers[1] = dataclasses.replace(answers[1], is_cut=True)
    for check, count in (("word_count", 1), ("mean_word_length", 2)):
        rubric = Rubric.model_validate(rubric_dict(criteria=judged, check={"name": check}))
        assert survey([rubric], answers)[rubric.id][CHECK]["n"] == count
