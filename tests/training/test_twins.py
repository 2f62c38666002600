"""A training on twin pairs by two workers."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.chat.conversations import token_ids
from cpt_ray.logprobs.reference import add_reference
from cpt_ray.logprobs.rows import Tokeniser, sequence_ids
from cpt_ray.tables.records import ReferenceLogProb, Reject
from cpt_ray.tables.rundir import TRAIN_PROGRESS_FILE, RunDir
from cpt_ray.training.pairs import own_pairs
from cpt_ray.training.row_making import make_rows
from cpt_ray.training.stage import train
from tests.trainings import (
    NUM_HELD_OUT,
    NUM_PAIRS,
    NUM_STEPS,
    another_node,
    assert_same_training,
    make_config,
    make_run,
    make_twins,
    samples,
    stdout_to,
    wait_for_slots,
    wait_for_step,
)


@pytest.fixture(scope="module")
def trained(cluster: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    """An undisturbed training by LoRA, and its summary."""
    run = make_run(tmp_path_factory.mktemp("trained"))
    with stdout_to(run.path / "stdout.log"):
        return run, train(make_config(policy), run, ["a-0", "b-0"], "key-1")


# ---------------------------------------------------------------- a training


def test_before_the_first_step_the_loss_is_ln_2(trained: tuple[RunDir, dict[str, Any]]) -> None:
    assert abs(trained[1]["first_loss"] - math.log(2)) < 1e-5


def test_every_step_is_logged_once_and_the_pairs_are_learned(trained: tuple[RunDir, dict[str, Any]]) -> None:
    summary = trained[1]
    assert [one["step"] for one in summary["history"]] == list(range(1, NUM_STEPS + 1))
    assert summary["steps"] == NUM_STEPS
    assert summary["last_loss"] < 0.3
    assert summary["last_accuracy"] == 1.0


def test_every_epoch_takes_every_pair_once_and_every_step_its_share(trained: tuple[RunDir, dict[str, Any]]) -> None:
    steps = samples(trained[0])
    halves = [[name for step in range(*part) for name in steps[step]] for part in ((1, 11), (11, 21))]
    assert sorted(halves[0]) == sorted(halves[1])
    assert len(set(halves[0])) == len(halves[0]) == NUM_PAIRS - NUM_HELD_OUT
    assert {len(one) for one in steps.values()} == {8, 9}


def test_two_checkpoints_are_kept(trained: tuple[RunDir, dict[str, Any]]) -> None:
    folders = [one for one in (trained[0].checkpoints / "key-1").glob("checkpoint_*") if one.is_dir()]
    assert len(folders) == 2


def test_a_pair_that_is_too_long_goes_with_its_twin_and_both_are_counted(
    trained: tuple[RunDir, dict[str, Any]],
) -> None:
    run, summary = trained
    rejects = run.read("rejects", ["train-key-1"], Reject)
    assert {one.subject_id for one in rejects} == {one.pair_id for one in make_twins("the sea")}
    assert {(one.stage, one.reason) for one in rejects} == {("train", "too long")}
    entry = run.read_json("ledger.json")["train"]
    assert (entry["rows_in"], entry["rejected"]) == (NUM_PAIRS + 2, {"too long": 2})
    assert (entry["rows_out"], entry["held_out"]) == (NUM_PAIRS - NUM_HELD_OUT, NUM_HELD_OUT)
    assert summary["pairs"] == NUM_PAIRS - NUM_HELD_OUT


def test_what_is_held_out_is_measured_at_each_checkpoint_and_tells_that_the_directive_is_read(
    trained: tuple[RunDir, dict[str, Any]],
) -> None:
    measured = trained[1]["held_out"]
    assert [one["step"] for one in measured] == [4, 8, 12, 16, 20]
    last = measured[-1]
    assert last["twin_accuracy"] == last["pair_accuracy"] == last["accuracy/ornament/high"] == 1
    assert last["loss"] < measured[0]["loss"] < math.log(2) + 0.1
    assert last["swap_gap"] > 0.01
    assert {"drift", "length_drift", "rewards/margins"} < set(last)
    assert last["kl"] > measured[0]["kl"] > 0


def test_tensorboard_has_every_number(trained: tuple[RunDir, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(trained[0].path / "tensorboard" / "key-1")).Reload()
    tags = set(log.Tags()["scalars"])
    assert {f"eval/{name}" for name in trained[1]["held_out"][-1]} - {"eval/step"} <= tags
    assert {"train/loss", "train/rewards/accuracies", "eval/accuracy/ornament/high", "eval/kl"} <= tags
    assert [one.step for one in log.Scalars("train/loss")] == list(range(1, NUM_STEPS + 1))


def test_the_reference_table_is_what_the_policy_gives_and_is_not_computed_again(
    trained: tuple[RunDir, dict[str, Any]], policy: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = trained
    table = {
        one.sequence_id: one.log_prob for one in run.read("reference", sorted(run.names("reference")), ReferenceLogProb)
    }
    assert len(table) == 2 * NUM_PAIRS
    tokeniser = Tokeniser(AutoTokenizer.from_pretrained(policy), {})
    model = AutoModelForCausalLM.from_pretrained(policy)
    for row in make_rows(own_pairs(make_twins("town 3"), tokeniser), 4):
        for name, answer in zip(sequence_ids(row), row["answers"], strict=True):
            ids = torch.tensor([row["prompt"] + answer])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            assert table[name] == pytest.approx(logps[-len(answer) :].sum().item(), abs=1e-4)
    shards = {path: path.stat().st_mtime_ns for path in (run.path / "reference").iterdir()}
    rows = make_rows(own_pairs(make_twins("town 3"), tokeniser), 4)
    again = add_reference(make_config(policy, beta=0.3, epochs=1), run, rows)
    assert [one["ref_logps"] for one in again] == [[table[name] for name in sequence_ids(row)] for row in rows]
    assert {path: path.stat().st_mtime_ns for path in (run.path / "reference").iterdir()} == shards


def test_the_model_card_says_what_was_trained_on_what_and_how_well(trained: tuple[RunDir, dict[str, Any]]) -> None:
    import yaml

    run, summary = trained
    for folder, library in ((run.model, "transformers"), (run.adapter, "peft")):
        _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        assert yaml.safe_load(head)["library_name"] == library
        assert f"on {summary['pairs']} preference pairs ({NUM_STEPS} steps)" in text
        assert f"| twin_accuracy | {summary['held_out'][-1]['twin_accuracy']:.3f} |" in text


def test_merged_weights_answer_as_base_and_adapter_do(trained: tuple[RunDir, dict[str, Any]], policy: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    pair = make_twins("the hills")[0]
    messages = [{"role": one.role, "content": one.content} for one in pair.prompt]
    ids = torch.tensor([token_ids(tokenizer, messages)])
    base = AutoModelForCausalLM.from_pretrained(policy)
    merged = AutoModelForCausalLM.from_pretrained(run.model)
    with torch.no_grad():
        untuned = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run.adapter)(ids).logits
        found = merged(ids).logits
    assert torch.allclose(found, adapted, atol=1e-4)
    assert not torch.allclose(found, untuned, atol=1e-1)


def test_the_same_key_again_returns_at_once(trained: tuple[RunDir, dict[str, Any]], policy: Path) -> None:
    run, summary = trained
    start = time.monotonic()
    assert train(make_config(policy), run, ["a-0", "b-0"], "key-1") == json.loads(json.dumps(summary))
    assert time.monotonic() - start < 1


def test_nothing_but_our_own_lines_is_printed(trained: tuple[RunDir, dict[str, Any]], cluster: Path) -> None:
    lines = (trained[0].path / "stdout.log").read_text().splitlines()
    assert lines[-2].startswith("train        20/20 steps, ")
    assert lines[-1].startswith(f"model        {trained[0].model} (20 steps on ")
    ours = r"(train +\d+/20 steps|reference +\d+/\d+ shards), \d+ s|(note: 2 pairs are not trained on: 2 t|model .* \()"
    ours += r"|train +\d+ pairs, \d+ held out$"
    ours += r"|(train|reference) +\d of \d (workers|engines) begun"  # where the machine is slow
    assert [one for one in lines if not re.match(ours, one)] == []
    stderr = cluster.read_text().splitlines()  # since the cluster's start
    assert [one for one in stderr if "core_worker.cc" not in one] == []  # Ray Data's actors cannot be restarted


@pytest.mark.slow
def test_a_killed_worker_and_a_lost_node_change_nothing_in_what_is_learned_by_a_sharded_policy(
    trained: tuple[RunDir, dict[str, Any]], policy: Path, tmp_path: Path
) -> None:
    run, seen = make_run(tmp_path, trained[0]), []
    settings: dict[str, Any] = {"num_workers": [1, 2], "resources_per_worker": {"CPU": 1, "slot": 1}}
    settings |= {"sharding": "fsdp", "checkpoints": f"file://{tmp_path}/kept"}

    def disturb(node: subprocess.Popen[bytes]) -> None:
        seen.append(wait_for_step(run, 6))
        os.kill(seen[0]["pid"], signal.SIGKILL)
        seen.append(wait_for_step(run, 11, other_than=seen[0]["pid"]))
        os.kill(seen[1]["pid"], signal.SIGSTOP)  # or the training could end before the node does
        node.terminate()
        wait_for_slots(1)
        with suppress(ProcessLookupError):  # it was on that node
            os.kill(seen[1]["pid"], signal.SIGCONT)

    with ExitStack() as stack:
        nodes = []
        for count in (1, 2):  # one after the other: two that start at once can take the same sockets
            nodes.append(stack.enter_context(another_node()))
            wait_for_slots(count)
        thread = threading.Thread(target=disturb, args=(nodes[0],), daemon=True)
        thread.start()
        summary = train(make_config(policy, **settings), run, ["a-0", "b-0"], "key-1")
        thread.join(timeout=60)
    assert [one["num_workers"] for one in seen] == [2, 2]
    assert run.read_json(TRAIN_PROGRESS_FILE)["num_workers"] == 1
    assert samples(run) == samples(trained[0])
    assert_same_training(run, summary, trained, 1e-4)
    assert not run.checkpoints.exists()
    kept = json.loads((tmp_path / "kept" / "key-1" / "checkpoint_manager_snapshot.json").read_text())
    folders = {one.name for one in (tmp_path / "kept" / "key-1").glob("checkpoint_*") if one.is_dir()}
    named = {one["checkpoint_dir_name"] for one in kept["checkpoint_results"]}
    assert len(named) == 2
    assert named <= folders
    assert len(folders - named) <= 2  # uploads that a kill cut short: named nowhere, so never gone on from
