"""Pairs, run directories and run files of small trainings, and what is asked of a training that runs; for tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from cpt_ray.cluster import unused_port
from cpt_ray.config import RunConfig
from cpt_ray.tables.records import Message, Pair, content_id
from cpt_ray.tables.rundir import TRAIN_PROGRESS_FILE, RunDir
from cpt_ray.training.pairs import TokenPair
from tests.local_cluster import RAY

NUM_PAIRS = 92
NUM_HELD_OUT = 8
NUM_STEPS = 20
LONG = " very" * 600
TRAIN: dict[str, Any] = {
    "num_workers": 2,
    "batch_size": 8,
    "micro_batch_size": 2,
    "learning_rate": 1e-2,
    "epochs": 2,
    "max_length": 400,
    "dtype": "float32",
    "save_steps": 4,
}


def make_twins(cell: str, long: str = "") -> list[Pair]:
    """A pair and its twin; `long` lengthens the high answer and with it both rows."""
    answers = {"high": f"A high answer to {cell}, rich in words.{long}", "low": f"A low answer to {cell}, plain."}
    made = []
    for level, other in (("high", "low"), ("low", "high")):
        made.append(
            Pair(
                pair_id=content_id(cell, level),
                twin_id=content_id(cell, other),
                cell_id=cell,
                prompt_id=cell,
                rubric_id="ornament",
                level=level,
                rejected_level=other,
                directive_id=level,
                prompt=[
                    Message(role="system", content=f"Write in the {level} manner, please."),
                    Message(role="user", content=f"Tell me about {cell}."),
                ],
                chosen=[Message(role="assistant", content=answers[level])],
                rejected=[Message(role="assistant", content=answers[other])],
                chosen_score=90,
                rejected_score=10,
                chosen_is_cut=False,
                rejected_is_cut=False,
            )
        )
    return made


def make_config(policy: Path, template_kwargs: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    role = {"model": str(policy), "chat_template_kwargs": template_kwargs or {}}
    return RunConfig.model_validate(
        {
            "name": "test",
            "rubrics": ["rubrics"],
            "prompts": {"source": "prompts.jsonl"},
            "writer": role,
            "policy": role,
            "train": TRAIN | settings,
        }
    )


def make_tokens(cell: str, lengths: tuple[int, int, int] = (5, 5, 5), **changes: Any) -> list[TokenPair]:
    """`make_twins` as token pairs of the given lengths of prompt, chosen and rejected."""
    ids = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ((0,) * one for one in lengths), strict=True))
    names = ("pair_id", "twin_id", "cell_id", "prompt_id", "rubric_id", "level", "rejected_level")
    return [TokenPair(**{name: getattr(one, name) for name in names}, **ids | changes) for one in make_twins(cell)]


def make_run(path: Path, like: RunDir | None = None) -> RunDir:
    """A run directory with NUM_PAIRS pairs that fit, a pair (and its twin) that does not, another's reference table."""
    run = RunDir(path)
    if like:
        shutil.copytree(like.path / "reference", path / "reference")
    fitting = [pair for at in range(NUM_PAIRS // 2) for pair in make_twins(f"town {at}")]
    run.write("pairs", "a-0", fitting[:40] + make_twins("the sea", LONG))
    run.write("pairs", "b-0", fitting[40:])
    return run


def adapter_weights(run: RunDir) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(run.adapter / "adapter_model.safetensors"))


@contextmanager
def stdout_to(path: Path) -> Iterator[None]:
    """Sends file descriptor 1 to a file, and Python's sys.stdout with it."""
    kept = os.dup(1)
    with path.open("w") as file, redirect_stdout(file):
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def samples(run: RunDir) -> dict[int, list[str]]:
    """The rows of each step, as the last worker group that took it ran them."""
    steps: dict[int, dict[int, list[str]]] = {}
    for line in (run.path / "samples.jsonl").read_text().splitlines():
        one = json.loads(line)
        steps.setdefault(one["step"], {}).setdefault(one["group"], []).extend(one["names"])
    return {step: sorted(list(groups.values())[-1]) for step, groups in steps.items()}


@contextmanager
def another_node() -> Iterator[subprocess.Popen[bytes]]:
    """A node with a slot for one worker that joins the cluster; terminated at the end, if not before."""
    command = [str(RAY), "start", "--block", "--num-cpus=1", '--resources={"slot": 1}', "--disable-usage-stats"]
    command += [f"--address={ray.get_runtime_context().gcs_address}", f"--dashboard-agent-listen-port={unused_port()}"]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield node
    finally:
        node.terminate()
        node.wait(timeout=30)


def wait_for_slots(count: int) -> None:
    """Until the cluster has so many, and Ray Train knows."""
    deadline = time.monotonic() + 60
    while ray.cluster_resources().get("slot", 0) != count:
        assert time.monotonic() < deadline, f"{ray.cluster_resources()}, {count} slots wanted"
        time.sleep(0.1)
    ray.get(get_or_create_autoscaling_coordinator()._tick.remote())  # else it looks every 20 seconds


def wait_for_step(run: RunDir, step: int, other_than: int = 0) -> dict[str, Any]:
    """What the training reports once it has done so many steps, by another process than the one given."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state: dict[str, Any] | None = run.read_json(TRAIN_PROGRESS_FILE)
        if state and state["done"] >= step and state["pid"] != other_than:
            return state
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")


def assert_same_training(
    run: RunDir, summary: dict[str, Any], trained: tuple[RunDir, dict[str, Any]], within: float
) -> None:
    import torch

    undisturbed, expected = trained
    assert [one["step"] for one in summary["history"]] == [one["step"] for one in expected["history"]]
    assert [one["loss"] for one in summary["history"]] == pytest.approx(
        [one["loss"] for one in expected["history"]], abs=within
    )
    found, wanted = adapter_weights(run), adapter_weights(undisturbed)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=within) for name in wanted)


def run_file(path: Path, policy: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """The run file of a training on a preference set, in the directory beside it."""
    (path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {"name": "alone", "run_dir": str(path / "run"), "preferences": {"source": str(path / "set.jsonl")}}
    train = {"num_workers": 1, "dtype": "float32", "max_length": 400, "gradient_checkpointing": False} | settings
    (path / "run.yaml").write_text(json.dumps(config | {"policy": {"model": str(policy)}, "train": train}))
    return path / "run.yaml"


ROWS = [
    {"prompt": f"Tell me about town {at}:", "chosen": f" the sea and {at}", "rejected": " the town"} for at in range(24)
]
