"""The default run, made small, with the real pretrained model: every stage on real parts, and nothing done twice."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from cpt_ray.config import load_config
from cpt_ray.plan import make_plan, plan_units
from cpt_ray.rubrics.bins import level_at
from cpt_ray.rubrics.grading import measured_criterion
from cpt_ray.synthesis.stage import name_shards, with_levels
from cpt_ray.tables.records import Generation, Pair
from cpt_ray.tables.rundir import MODEL_INFO_FILE, RunDir
from tests.local_cluster import ROOT

RUN_FILE = "jobs/quickstart.yaml"
SMALL = (
    "prompts.limit=36",
    "synthesis.first_pass=4",
    "synthesis.samples=6",
    "synthesis.shard_rows=96",
    "train.max_pairs=48",
    "train.epochs=1",
    "train.loss={sigmoid: 1}",  # without SFT's part the first loss is known
    "train.save_steps=2",
    "evaluate.prompts=2",
    "evaluate.directives=1",
    "evaluate.judge_check_answers=6",
    "evaluate.bootstrap=50",
)


def cpt_run(run: RunDir) -> str:
    command = [sys.executable, "-m", "cpt_ray", "run", RUN_FILE, *SMALL, f"run_dir={run.path}"]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, str]:
    """(the finished run, what was printed)."""
    run = RunDir(tmp_path_factory.mktemp("real") / "run")
    return run, cpt_run(run)


def test_labels_are_what_the_measures_say_of_the_real_answers(small_run: tuple[RunDir, str]) -> None:
    run, _ = small_run
    plan = make_plan(load_config(ROOT / RUN_FILE, [*SMALL, f"run_dir={run.path}", *_dtypes(run)]))
    units = plan_units(plan)
    shards = name_shards(plan, units)
    rubrics = {rubric.id: rubric for rubric in with_levels(plan, run, units).rubrics}
    texts = {one.text for one in run.read("generations", shards.generations, Generation)}
    pairs = {one.pair_id: one for one in run.read("pairs", shards.pairs, Pair)}
    held_out = {one.prompt_id for one in plan.prompts_of("held_out")}
    assert len(pairs) >= 48
    for pair in pairs.values():
        rubric, text = rubrics[pair.rubric_id], pair.chosen[0].content
        score = measured_criterion(rubric, rubric.criteria[0], text).score
        assert score == pytest.approx(pair.chosen_score)
        assert level_at(rubric, pair.chosen_score, plan.config.synthesis.margin) == pair.level
        assert text in texts
        assert pairs[pair.twin_id].rejected == pair.chosen
        assert pair.prompt_id not in held_out


def _dtypes(run: RunDir) -> list[str]:
    """The dtype that the run has chosen, as overrides."""
    dtype = run.read_yaml("run.yaml")["cpu_dtype"]
    return [f"writer.engine.dtype={dtype}", f"policy.engine.dtype={dtype}", f"judge.engine.dtype={dtype}"]


def test_the_first_loss_is_that_of_a_policy_that_is_the_reference(small_run: tuple[RunDir, str]) -> None:
    summary = small_run[0].read_json(MODEL_INFO_FILE)["summary"]
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=0.05)
    assert summary["steps"] == 4


def test_the_report_has_every_dial_with_its_second_measure_and_the_judges_worth(small_run: tuple[RunDir, str]) -> None:
    found = small_run[0].read_json("report/results.json")
    for name in ("slope", "check"):
        assert set(found[name]) == {"length", "mood", "wording"}
        assert all(entry["base"]["slope"] is not None for entry in found[name].values())
    assert found["perplexity"]["ratio"] == pytest.approx(1, abs=0.5)
    assert found["trained_directives"]["gap"].keys() == {"length", "mood", "wording"}
    assert found["judge_check"]["asked"] >= 6
    assert "ordered pairs" in small_run[1]


def test_the_same_command_again_does_nothing_again(small_run: tuple[RunDir, str]) -> None:
    run, _ = small_run
    files = [*run.path.glob("*/*.parquet"), run.model / "model.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in files}
    ledger = json.loads((run.path / "ledger.json").read_text())
    cpt_run(run)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert json.loads((run.path / "ledger.json").read_text())["write"] == ledger["write"]
