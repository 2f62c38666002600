"""Failures of a Ray Train worker group, in words that say what to change."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RuntimeEnvSetupError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cpt_ray.capacity import NodeType, NodeTypes
from cpt_ray.config import Range
from cpt_ray.engines import ray_train
from cpt_ray.engines.ray_train import WATCHER, WorkerGroup, explain_failure, read_progress, run_workers

GROUP = WorkerGroup(
    stage="steer",
    num_workers=Range(2, 4),
    use_gpu=False,
    resources={"CPU": 1},
    max_failures=3,
    resumes_from="from the last checkpoint",
    less_memory="steer.batch_users",
)


def of_workers(*failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("workers failed", dict(enumerate(failures)))


def test_a_failure_is_explained_by_its_cause_and_not_by_what_the_other_ranks_saw() -> None:
    lost = RuntimeError("[gloo] Connection closed by peer")
    assert explain_failure(of_workers(lost, ValueError("the cause\nand a traceback")), GROUP) == "ValueError: the cause"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ControllerError(RuntimeEnvSetupError("pip failed")), "the job's runtime environment could not be set up on"),
        (of_workers(OutOfMemoryError("the node is low on memory")), "out of memory; lower steer.batch_users (the node"),
        (
            of_workers(WorkerHealthCheckFailedError("no answer", RayActorError())),
            "a worker died more than 3 times (killed from outside, or out of memory); the same command goes on from",
        ),
    ],
)
def test_what_ray_train_reports_becomes_what_to_change(error: Exception, words: str) -> None:
    assert explain_failure(error, GROUP).startswith(words)


@pytest.mark.parametrize("content", [None, "", '{"done": 3'])
def test_progress_that_is_not_there_or_half_there_ends_no_training(content: str | None, tmp_path: Path) -> None:
    state = tmp_path / "progress.json"
    if content is not None:
        state.write_text(content)
    assert read_progress(state) == {}


@pytest.mark.parametrize(
    ("resources", "nodes", "watcher"),
    [({"CPU": 1}, {"CPU": 2, "no_gpu": 1}, "0"), ({"CPU": 1}, {"CPU": 2}, None), ({"GPU": 1}, {"GPU": 2}, None)],
)
def test_a_training_kept_off_gpu_nodes_starts_no_actor_that_may_be_put_there(
    resources: dict[str, float],
    nodes: dict[str, float],
    watcher: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(WATCHER, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(ray_train, "node_types", lambda: NodeTypes([NodeType("node", nodes, 2)]))
    seen = SimpleNamespace(fit=lambda: SimpleNamespace(return_value=os.environ.get(WATCHER)))
    monkeypatch.setattr(ray_train, "_trainer", lambda *_: seen)
    group = replace(GROUP, resources=resources)
    places: dict[str, Any] = {"name": "n", "storage": "", "state": tmp_path / "state"}
    assert run_workers(print, {}, group, **places, title="t", steps=1) == watcher
