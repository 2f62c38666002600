"""Training on a tiny policy: real Ray Train, two gloo workers; the same numbers as on a large one."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from cpt_ray.chat.conversations import token_ids
from cpt_ray.cli import main
from cpt_ray.cluster import connected
from cpt_ray.errors import UserError
from cpt_ray.logprobs.reference import add_reference
from cpt_ray.logprobs.rows import Tokeniser, sequence_ids
from cpt_ray.tables.records import ReferenceLogProb, Reject
from cpt_ray.tables.rundir import TRAIN_PROGRESS_FILE, RunDir
from cpt_ray.training import stage as training
from cpt_ray.training.pairs import own_pairs
from cpt_ray.training.row_making import make_rows
from cpt_ray.training.stage import train
from cpt_ray.training.worker import work
from tests.local_cluster import ROOT
from tests.tiny_model import make_tiny_model
from tests.trainings import (
    NUM_HELD_OUT,
    NUM_PAIRS,
    NUM_STEPS,
    ROWS,
    another_node,
    assert_same_training,
    make_config,
    make_run,
    make_twins,
    run_file,
    samples,
    stdout_to,
    wait_for_slots,
    wait_for_step,
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy") / "tiny")


def work_with_a_log(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """`work`, which also writes down which rows each worker group ran in which step."""
    from ray.train.collective import broadcast_from_rank_zero

    from cpt_ray.training import trl_trainer

    log = settings["task"].run.path / "samples.jsonl"
    group = broadcast_from_rank_zero(os.getpid())
    plain_collate, plain_loss = trl_trainer.collate, trl_trainer.GridTrainer.compute_loss

    def collate(rows: Any, **kwargs: Any) -> Any:
        return plain_collate(rows, **kwargs) | {"names": [f"{one['cell_id']}, {one['level']}" for one in rows]}

    def compute_loss(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        names, step = inputs.pop("names"), trainer.state.global_step + 1
        with log.open("a") as file:
            file.write(json.dumps({"group": group, "step": step, "names": names}) + "\n")
        return plain_loss(trainer, model, inputs, *args, **kwargs)

    trl_trainer.collate, trl_trainer.GridTrainer.compute_loss = collate, compute_loss
    return work(settings)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray with two CPUs; the file where its stderr goes."""
    log = tmp_path_factory.mktemp("ray") / "stderr.log"
    log.touch()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["WANDB_MODE"] = "offline"  # for the workers, which get this environment now
    with connected(log=log), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "work", work_with_a_log)
        yield log
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


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


@pytest.fixture(scope="module")
def alone(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a preference set on which all weights were tuned by one worker, in the directory beside it."""
    path = tmp_path_factory.mktemp("alone")
    policy = make_tiny_model(path / "policy", dtype="bfloat16")
    (path / "run" / "adapter").mkdir(parents=True)  # of an earlier training by LoRA
    rows = [{"prompt": f"Tell me {at}:", "chosen": f" the sea and {at}", "rejected": " the town"} for at in range(24)]
    (path / "set.jsonl").write_text("\n".join(json.dumps(one) for one in rows), encoding="utf-8")
    settings = {"num_workers": 1, "batch_size": 8, "dtype": "bfloat16", "learning_rate": 1e-2, "lora": None}
    settings |= {"loss": {"ipo": 1.0, "sft": 0.1}, "resources_per_worker": {"CPU": 1}, "epochs": 5, "save_steps": 2}
    settings |= {"max_pairs": 20}
    config = {"name": "alone", "run_dir": str(path / "run"), "preferences": {"source": str(path / "set.jsonl")}}
    config |= {"policy": {"model": str(policy)}, "train": settings}
    (path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert main(["train", str(path / "run.yaml")]) == 0
    return path / "run.yaml"


def test_a_preference_set_trains_alone_and_again_at_once(alone: Path) -> None:
    run = RunDir(alone.parent / "run")
    made = run.read_json("model/cpt_ray.json")["summary"]
    assert (made["pairs"], made["steps"]) == (20, 10)
    assert abs(made["history"][0]["margin"]) < 1e-2 < made["history"][-1]["margin"]
    assert "twin_accuracy" not in made["held_out"][-1]
    assert f"`{alone.parent}/set.jsonl`" in (run.model / "README.md").read_text(encoding="utf-8")
    mark = (run.model / "cpt_ray.json").stat().st_mtime_ns
    assert main(["train", str(alone)]) == 0
    assert (run.model / "cpt_ray.json").stat().st_mtime_ns == mark
    assert main(["evaluate", str(alone)]) == 1


def test_full_tuning_keeps_the_stored_dtype_and_leaves_no_adapter(alone: Path) -> None:
    import torch
    from safetensors.torch import load_file

    run = RunDir(alone.parent / "run")
    tuned, untuned = (load_file(path / "model.safetensors") for path in (run.model, alone.parent / "policy"))
    assert tuned.keys() == untuned.keys()
    assert {one.dtype for one in tuned.values()} == {torch.bfloat16}
    assert any(not torch.equal(tuned[name], untuned[name]) for name in tuned)
    assert not run.adapter.exists()


@pytest.mark.slow
def test_after_kill_9_of_the_driver_the_same_command_goes_on_with_all_weights_tuned(
    alone: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run, undisturbed = RunDir(tmp_path / "run"), RunDir(alone.parent / "run")
    shutil.copytree(undisturbed.path / "reference", run.path / "reference")
    command = ["train", str(alone), f"run_dir={run.path}"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "cpt_ray", *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = wait_for_step(run, 5)
    os.kill(state["pid"], signal.SIGSTOP)  # or the training could end first
    driver.kill()
    driver.wait(timeout=30)
    os.kill(state["pid"], signal.SIGKILL)  # it cannot see that its node is gone
    assert not run.model.exists()
    assert main(command) == 0
    assert 1 < min(samples(run)) <= state["done"]
    found, wanted = (RunDir(one).read_json("model/cpt_ray.json") for one in (run.path, undisturbed.path))
    assert found["summary"]["history"] == wanted["summary"]["history"]
    tuned, expected = (load_file(one.model / "model.safetensors") for one in (run, undisturbed))
    assert all(tuned[name].equal(expected[name]) for name in expected)


def test_quantised_weights_are_trained_over_and_whole_ones_exported(
    cluster: Path, policy: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pytest.importorskip("bitsandbytes")
    run = make_run(tmp_path)
    settings = {"num_workers": 1, "lora": {"quantize": "nf4"}, "max_pairs": 40}
    summary = train(make_config(policy, **settings), run, ["a-0", "b-0"], "key-1")
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-3)  # its kernels without gradients are others
    assert summary["last_accuracy"] == 1.0
    ids, base = torch.tensor([[5, 6, 7, 8]]), AutoModelForCausalLM.from_pretrained(policy)
    merged = AutoModelForCausalLM.from_pretrained(run.model)
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, run.adapter)(ids).logits
        assert torch.allclose(merged(ids).logits, adapted, atol=1e-4)


# ---------------------------------------------------------------- trainings that did not go well


def test_a_training_of_one_step_learns(cluster: Path, policy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert main(["train", str(run_file(tmp_path, policy, ROWS, batch_size=32, learning_rate=1e-3))]) == 0
    run = RunDir(tmp_path / "run")
    summary = run.read_json("model/cpt_ray.json")["summary"]
    assert (summary["steps"], summary["unchanged"]) == (1, 0)
    assert summary["kept_share"] == pytest.approx(1, abs=1e-3)
    tuned, untuned = (load_file(folder / "model.safetensors") for folder in (run.model, policy))
    assert sum(not tuned[name].equal(untuned[name]) for name in tuned) == summary["trained"]


def test_a_training_that_diverged_ends_at_that_step_and_exports_nothing(
    cluster: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path, policy, ROWS, batch_size=4, lora=None, learning_rate=1e30, save_steps=1)
    assert main(["train", str(path)]) == 1
    told = capsys.readouterr().err
    assert re.search(r"error: train: step \d: .* is not a finite number .*diverged; lower train.learning_rate", told)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_training_that_has_begun_keeps_its_rows_whatever_the_time(
    cluster: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(policy, tmp_path / "policy")
    dated = "Today: {{ strftime_now('%H:%M:%S.%f') }}\n" + (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(dated, encoding="utf-8")
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [{name: [{"role": roles[name], "content": text}] for name, text in row.items()} for row in ROWS]
    path = run_file(tmp_path, folder, rows, batch_size=8)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_fit", stop)
        assert main(["train", str(path)]) == 130
    files = {file.name: file.read_bytes() for file in (tmp_path / "run" / "train_rows").glob("????????????????????*")}
    assert len(files) == 2
    assert main(["train", str(path)]) == 0
    assert {name: (tmp_path / "run" / "train_rows" / name).read_bytes() for name in files} == files
    assert capsys.readouterr().out.count("puts the present time into conversations") == 1


def test_a_policy_without_finite_probabilities_is_named_before_it_is_trained(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    model = make_tiny_model(tmp_path / "policy")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["train", str(run_file(tmp_path, model, ROWS, batch_size=8))]) == 1
    assert "the policy gives an answer no finite probability" in capsys.readouterr().err


def test_wandb_and_mlflow_get_every_number(cluster: Path, policy: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    run = make_run(tmp_path)
    settings = {"num_workers": 1, "max_pairs": 40, "report_to": ["wandb", "mlflow"]}
    summary = train(make_config(policy, **settings), run, ["a-0", "b-0"], "key-1")
    names = set(summary["held_out"][-1]) - {"step"}
    (written,) = (run.path / "wandb").glob("offline-run-*/run-key-1.wandb")
    assert [name for name in names if f"eval/{name}".encode() not in written.read_bytes()] == []
    client = mlflow.MlflowClient(f"sqlite:///{run.path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert {f"eval_{name}" for name in names} <= set(found.data.metrics)


# ---------------------------------------------------------------- before a training


@pytest.mark.parametrize(
    ("model", "settings", "problem"),
    [
        ("/no/such/model", {}, "policy.model"),
        (None, {"lora": {"target_modules": ["c_attn"]}}, "train.lora.target_modules: .*c_attn"),
        (None, {"lora": {"target_modules": ["q_proj", "lm_head"]}}, "vLLM serves no adapter on lm_head"),
        (None, {"lora": {"r": 1024}}, "adapters of rank 512 at most"),
        (None, {"report_to": ["wandb"]}, "train.report_to: wandb is not installed; pip install wandb"),
        (None, {"report_to": ["mlflow"]}, "train.report_to: mlflow is not installed; pip install mlflow"),
        (None, {"lora": {"quantize": "nf4"}}, "train.lora.quantize: bitsandbytes is not installed"),
        (None, {"sharding": "fsdp", "lora": None}, "train.sharding: .* train.lora: null has none; use ddp"),
        (None, {"sharding": "fsdp", "lora": {"quantize": "nf4"}}, "train.sharding: .* train.lora.quantize has none"),
        (
            None,
            {"num_workers": 7, "batch_size": 14},
            r"the training needs 7 x \{CPU: 1\}; there is room for [2-6]",
        ),
        (None, {"num_workers": 11}, "11 workers share 9 prompts per step of 8 pairs"),
        (None, {"max_length": 30}, r"no pairs; none of 42 is left: 42 too long \(.*raise train.max_length"),
    ],
)
def test_what_cannot_be_trained_is_said_before_any_worker_starts(
    cluster: Path, tmp_path: Path, policy: Path, model: str | None, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        train(make_config(Path(model or policy), **settings), make_run(tmp_path), ["a-0"], "key")
