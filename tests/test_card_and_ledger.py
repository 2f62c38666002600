"""What a run says of itself: the data set's card, the ledger with its costs, and steering in the report."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.config import PriceConfig
from cpt_ray.console import status_lines
from cpt_ray.engines.engine import Completion
from cpt_ray.engines.ledger import Tally, ledger_entry
from cpt_ray.evaluation.stage import evaluate, update_report
from cpt_ray.plan import Plan, plan_units
from cpt_ray.synthesis.stage import name_shards, synthesize
from cpt_ray.tables.records import Grade, Pair, Reject
from cpt_ray.tables.rundir import REPORT_FILE, STEERING_RESULTS_FILE, RunDir
from tests.builders import LEVELS
from tests.fake_runs import GIVEN, MOOD, answer, make_run, synthesized, with_engine
from tests.tiny_model import make_tiny_model


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
    run.write("rejects", "train-later", [Reject.of_row("train", "x", "too long", "")])
    rejects = datasets.load_dataset(str(run.path), "rejects", split="train", cache_dir=str(tmp_path / "cache"))
    assert {row["stage"] for row in rejects} <= {"write", "direct", "judge", "pair"}
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


def test_another_judge_does_not_confirm_what_is_measured(tmp_path: Path) -> None:
    measure = {"name": "word_count", "values": {"low": 1, "mid": 2, "high": 3}}
    descriptors = {name: f"{name} size" for name in LEVELS}
    size = [{"name": "size", "weight": 100, "descriptors": descriptors, "measure": measure}]
    plan, run = make_run(tmp_path, 'judges=[{"model": "other"}]', levels=GIVEN, second=MOOD, criteria=size)
    shards = synthesized(plan, run)
    judges = defaultdict(set)
    for grade in run.read("grades", shards.grades, Grade):
        judges[grade.rubric_id].add(grade.judge)
    assert (len(judges["ornament"]), len(judges["mood"])) == (1, 2)


def test_the_card_is_written_again_when_shards_of_other_settings_lie_beside_its_own(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    synthesized(plan, run)
    assert "grades/*.parquet" in (run.path / "README.md").read_text()
    synthesized(*make_run(tmp_path, "writer.sampling.top_p=0.5", levels=GIVEN))
    synthesized(plan, run)
    assert "grades/*.parquet" not in (run.path / "README.md").read_text()


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
