"""The whole loop on real parts, with the toy model: its run file, then what a user does next."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import mean
from typing import Any

import httpx
import openai
import pytest

from cpt_ray.cluster import unused_port
from cpt_ray.config import load_config
from cpt_ray.plan import make_plan, plan_units
from cpt_ray.rubrics.measures import measures
from cpt_ray.rubrics.rubric import load_rubrics
from cpt_ray.synthesis.stage import name_shards
from cpt_ray.tables.records import Directive, Generation, Pair, Unit
from cpt_ray.tables.rundir import RunDir
from tests import toy
from tests.local_cluster import ROOT, LocalCluster

RUN_FILE = "tests/toy/run.yaml"


def cpt(*arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpt_ray", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def files(run: RunDir) -> dict[str, int]:
    """Every table's shard and the model, with the time it was written."""
    found = [*run.path.glob("*/*.parquet"), run.model / "model.safetensors"]
    return {str(path): path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def loop(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, str]:
    """(the finished run, what was printed): the stages as jobs on a cluster, then `cpt run`, which finds them done."""
    run = RunDir(tmp_path_factory.mktemp("loop") / "run")
    printed = ""
    for stage in ("synthesize", "train", "evaluate"):
        job = ("--", sys.executable, f"jobs/{stage}.py", RUN_FILE, f"run_dir={run.path}")
        env = json.dumps({"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}})  # one that is set in the program too
        done = cluster.job("submit", "--working-dir", ".", "--runtime-env-json", env, *job, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        printed += done.stdout
    before = files(run)
    done = cpt("run", RUN_FILE, f"run_dir={run.path}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == ""
    assert files(run) == before, "the same work was done again"
    return run, printed + done.stdout


def results(run: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = run.read_json("report/results.json")
    return found


def test_the_tuned_model_beats_the_base_on_what_was_held_out(loop: tuple[RunDir, str]) -> None:
    found = results(loop[0])
    assert found["tuned"]["accuracy"] - found["base"]["accuracy"] >= 0.25
    for name in ("accuracy", "spearman_rho", "kendall_tau"):
        assert found["difference"][f"{name}_ci"][0] > 0
    assert found["tuned"]["spearman_rho"] >= 0.8
    assert found["tuned"]["measured"]["spearman_rho"] >= 0.8
    assert found["tuned"]["without_directive"]["spearman_rho"] < 0.3
    assert found["judge_agreement"]["spearman_rho"] >= 0.8


def test_only_this_programs_own_lines_are_printed(loop: tuple[RunDir, str]) -> None:
    for noise in ("WARNING", "Traceback", "(raylet)", "vllm", "it/s"):
        assert noise not in loop[1]
    assert "cpt serve" in "".join(loop[1].splitlines()[-5:])


def test_the_tables_are_complete_and_twins_are_pairs(loop: tuple[RunDir, str]) -> None:
    run, _ = loop
    plan = make_plan(load_config(ROOT / RUN_FILE))
    units = plan_units(plan)
    shards = name_shards(plan, units)
    assert run.read("units", list(units), Unit) == [row for rows in units.values() for row in rows]
    generations = run.read("generations", shards.generations, Generation)
    assert len({row.unit_id for row in generations}) == len(generations)
    pairs = {row.pair_id: row for row in run.read("pairs", shards.pairs, Pair)}
    assert all(pairs[row.twin_id].chosen == row.rejected for row in pairs.values())
    held_out = {one.prompt_id for one in plan.prompts_of("held_out")}
    assert not held_out & {row.prompt_id for row in pairs.values()}
    directives = run.read("directives", shards.directives, Directive)
    assert {row.source for row in directives} == {"tests/toy/model"}


def test_pairs_load_as_a_preference_data_set(loop: tuple[RunDir, str]) -> None:
    import datasets

    loaded = datasets.load_dataset("parquet", data_files=str(loop[0].path / "pairs" / "*.parquet"), split="train")
    assert {"prompt", "chosen", "rejected"} <= set(loaded.column_names)
    assert [one["role"] for one in loaded[0]["prompt"]] == ["system", "user"]


def test_the_ledger_accounts_for_every_row(loop: tuple[RunDir, str]) -> None:
    ledger = loop[0].read_json("ledger.json")
    assert ledger["plan"]["rows_out"] == ledger["write"]["rows_in"]  # there is one pass
    for stage in ("write", "judge"):
        assert ledger[stage]["rows_in"] == ledger[stage]["rows_out"] + sum(ledger[stage]["rejected"].values())
    assert ledger["write"]["generated_tokens"] > 0
    assert ledger["judge"]["cached_tokens"] > 0


def test_model_and_adapter_load_in_transformers_and_peft_and_agree(loop: tuple[RunDir, str]) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(loop[0].model, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(toy.MODEL, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, loop[0].adapter)
    tokenizer = AutoTokenizer.from_pretrained(loop[0].model)
    ids = tokenizer("Write about the harbor at dawn.", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (merged(ids).logits - adapted(ids).logits).abs().max()
        with adapted.disable_adapter():
            change = (merged(ids).logits - adapted(ids).logits).abs().max()
    assert difference < 0.2  # the merged weights are stored in bfloat16
    assert change > 2 * difference


@pytest.mark.slow
def test_choices_steer_real_answers_and_are_held_against_the_baselines(
    cluster: LocalCluster, loop: tuple[RunDir, str]
) -> None:
    """Utility is measured on the texts, and shares nothing with the policy; whatever ignores choices is at 0.5."""
    smaller = ("kinds=[high,low]", "users=200", "test_users=8", "seeds=1", "steps=120", "policy_steps=60")
    settings = [f"steer.{one}" for one in (*smaller, "samples=1", "best_of=2")]
    job = (sys.executable, "jobs/steer.py", "evaluate", RUN_FILE, f"run_dir={loop[0].path}", *settings)
    done = cluster.job("submit", "--working-dir", ".", "--", *job, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = loop[0].read_json("report/steering.json")
    accuracy, satisfaction = found["accuracy"], found["satisfaction"]
    after_ten = found["counts"].index(10)
    for name in ("NP-DPO gated_lora", "inferred directive", "inferred directive, asked"):
        assert satisfaction[name]["steer_gap_ci"][after_ten][0] > 0, satisfaction[name]
    for name in ("static", "random configuration", "everybody's favourite"):
        assert satisfaction[name]["mean"] == pytest.approx([0.5] * len(found["counts"]))
    assert satisfaction["nearest configuration"]["mean"][0] == pytest.approx(0.5)
    assert satisfaction["nearest configuration"]["mean"][after_ten] > 0.6
    assert "pairs in the prompt" in satisfaction  # the toy mostly answers it with a number, which has no measure
    assert satisfaction["NP-BTL, best of n"]["mean"][after_ten] > 0.5
    assert satisfaction["oracle"]["mean"][after_ten] > 0.8
    for name in ("NP-BTL", "inferred directive"):
        assert accuracy[name]["mean"][after_ten] > accuracy[f"{name}, another's choices"]["mean"][after_ten] + 0.1


@pytest.fixture(scope="module")
def served(cluster: LocalCluster, loop: tuple[RunDir, str]) -> Iterator[openai.OpenAI]:
    """`jobs/serve.py` on the finished run, as a job that `ray job stop` ends, and the real client."""
    port = unused_port()
    url, variables = f"http://127.0.0.1:{port}/toy", {"CPT_API_KEY": "a-test-key", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    env = json.dumps({"env_vars": variables})
    options = ("--no-wait", "--submission-id", "serving", "--working-dir", ".", "--runtime-env-json", env)
    job = ("--", sys.executable, "jobs/serve.py", RUN_FILE, f"run_dir={loop[0].path}", f"serve.port={port}")
    assert cluster.job("submit", *options, *job).returncode == 0

    def until(is_healthy: bool) -> None:
        deadline = time.monotonic() + 300
        while (answers(f"{url}/health") == 200) != is_healthy:
            assert time.monotonic() < deadline, cluster.job("logs", "serving").stdout[-3000:]
            time.sleep(0.5)

    until(True)
    yield openai.OpenAI(base_url=f"{url}/v1", api_key="a-test-key", timeout=60, max_retries=0)
    stopped = cluster.job("stop", "serving")
    assert "was stopped" in stopped.stdout + stopped.stderr
    until(False)
    assert cluster.actors() == set()


def answers(url: str) -> int | None:
    """The status, or None if nobody is there."""
    try:
        return httpx.get(url, timeout=60).status_code
    except httpx.TransportError:
        return None


@pytest.mark.parametrize("rubric_id", ["mood", "ornament"])
def test_the_served_model_follows_the_configuration(served: openai.OpenAI, rubric_id: str) -> None:
    rubric = next(one for one in load_rubrics([toy.RUBRICS]) if one.id == rubric_id)
    spec = rubric.measured[0].measure
    assert spec is not None

    def measured(target: str | int) -> float:
        values = []
        for seed in range(8):
            answer = served.chat.completions.create(
                model="toy",
                messages=[{"role": "user", "content": "Write about the harbor at dawn."}],
                extra_body={"configuration": {rubric_id: target}},
                max_tokens=96,
                seed=seed,
            )
            value = measures(answer.choices[0].message.content or "", spec.words, spec.against)[spec.name]
            values.append(0.5 if value is None else value)
        return mean(values)

    lowest, highest = rubric.levels[0].name, rubric.levels[-1].name
    assert measured(highest) - measured(lowest) > 0.4
    assert measured(100) - measured(0) > 0.4


def test_configurations_are_listed_and_a_wrong_key_is_refused(served: openai.OpenAI) -> None:
    listed = json.dumps(served.get("/configurations", cast_to=object))
    assert "ornament" in listed
    stranger = openai.OpenAI(base_url=str(served.base_url), api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
