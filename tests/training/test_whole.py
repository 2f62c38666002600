"""A preference set of one's own, all weights tuned by one worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cpt_ray.cli import main
from cpt_ray.tables.rundir import RunDir
from tests.local_cluster import ROOT
from tests.tiny_model import make_tiny_model
from tests.trainings import (
    samples,
    wait_for_step,
)


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
