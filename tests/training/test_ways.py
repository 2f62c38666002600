"""Trainings that take another way, end early or cannot begin."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.cli import main
from cpt_ray.errors import UserError
from cpt_ray.tables.rundir import RunDir
from cpt_ray.training import stage as training
from cpt_ray.training.stage import train
from tests.tiny_model import make_tiny_model
from tests.trainings import (
    ROWS,
    make_config,
    make_run,
    run_file,
)


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
