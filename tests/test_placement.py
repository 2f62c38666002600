"""Real actors come to the nodes that have what they ask for, and work without room ends within its bound."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from cpt_ray import cluster
from cpt_ray.config import ModelConfig
from cpt_ray.engines.engine import FakeEngine
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.ray_train import WorkerGroup, run_workers
from cpt_ray.engines.step import Line, Step
from cpt_ray.errors import UserError
from cpt_ray.tables.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class PlaceStep(Step):
    """Notes the node that it runs on, once `nodes` are there."""

    nodes: int = 0
    stage: str = "place"
    table: str = "units"

    def output(self, shard: str) -> str:
        return f"{shard}-done"

    def __call__(self, engine: Any, run: RunDir, shard: str) -> None:
        deadline = time.monotonic() + 120
        while sum(node["Alive"] for node in ray.nodes()) < self.nodes and time.monotonic() < deadline:
            time.sleep(0.2)
        resources = next(
            node["Resources"] for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id()
        )
        seen = {"nodes": sum(node["Alive"] for node in ray.nodes()), "resources": resources}
        (run.path / f"{self.model.model}-{shard}.json").write_text(json.dumps(seen), encoding="utf-8")
        run.write(self.table, self.output(shard), [], {"rows_out": 0})


def seen(run: RunDir, model: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run.path.glob(f"{model}-*.json"))]


def open_none(model: ModelConfig) -> None:
    """Of steps that ask no engine."""


@pytest.fixture(scope="module")
def by_value() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def three_nodes(by_value: None) -> Iterator[None]:
    """A head without CPUs, a node with two GPUs, one with one, and one without; all by name alone."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    started.add_node(num_cpus=4, num_gpus=2, resources={"big": 1})
    started.add_node(num_cpus=4, num_gpus=1, resources={"small": 1})
    started.add_node(num_cpus=4, resources={"no_gpu": 1})
    ray.init(started.address, log_to_driver=False)
    yield
    ray.shutdown()
    started.shutdown()


def place(run: RunDir, shards: int, **model: Any) -> list[dict[str, Any]]:
    """Where the shards of a pool were done."""
    parts = {"tensor_parallel_size": max(1, int(model.get("num_gpus", 0)))}
    step = PlaceStep(model=ModelConfig.model_validate({"model": "m", "engine": parts, **model}))
    run_lines(run, [Line([f"{step.model.model}{at}" for at in range(shards)], [step])], open_none)
    return [shard["resources"] for shard in seen(run, step.model.model)]


def test_engines_come_to_the_nodes_that_have_what_they_ask_for(three_nodes: None, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert all(on["GPU"] == 2 for on in place(run, 2, model="over-two", num_gpus=2))
    assert all(on.get("no_gpu") for on in place(run, 2, model="large", resources={"memory": 2**20}))
    assert all(
        on.get("small") for on in place(run, 4, model="judge", num_gpus=0.5, num_actors=2, resources={"small": 0.5})
    )
    assert all(on.get("big") for on in place(run, 2, model="writer", num_gpus=1, resources={"big": 0.1}))
    assert all("GPU" not in on for on in place(run, 4, model="pairing", num_actors=[1, 64]))


def test_what_fits_on_no_node_is_refused_before_an_actor_is_made(three_nodes: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"place \(m\) needs \{CPU: 1, GPU: 3\} on one node; no node here has that \("):
        place(RunDir(tmp_path), 1, num_gpus=3)
    with pytest.raises(UserError, match=r"needs 4 x \{CPU: 1, GPU: 1\}; there is room for 3 \("):
        place(RunDir(tmp_path), 9, num_gpus=1, num_actors=4)


def test_a_pool_whose_node_is_held_by_others_ends_within_its_bound(
    three_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_patience", 0.1)
    neighbour = ray.remote(num_gpus=2)(FakeEngine).remote(print)
    ray.get(neighbour.run.remote([]))
    with pytest.raises(UserError, match=r"place: no progress for 0.1 minutes; engines: 1 not begun, of .*GPU: 2"):
        place(RunDir(tmp_path), 1, num_gpus=2)
    ray.kill(neighbour)


def busy_for(seconds: float, model: ModelConfig) -> None:
    """An engine that takes long to start, as one that compiles."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_an_engine_that_starts_for_longer_than_the_bound_is_waited_for(
    three_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_patience", 0.2)
    step = PlaceStep(model=ModelConfig(model="m"))
    run_lines(RunDir(tmp_path), [Line(["a"], [step])], lambda model: busy_for(15, model))
    assert seen(RunDir(tmp_path), "m")


def test_a_training_that_finds_no_room_ends_within_the_bound(
    three_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_patience", 0.1)
    neighbour = ray.remote(num_gpus=2)(FakeEngine).remote(print)
    ray.get(neighbour.run.remote([]))
    group = WorkerGroup(
        stage="train",
        num_workers=ModelConfig.model_validate({"model": "m", "num_actors": 2}).num_actors,
        use_gpu=True,
        resources={"GPU": 1},
        max_failures=0,
        resumes_from="",
        less_memory="",
    )
    with pytest.raises(UserError, match=r"^train: no progress for 0.1 minutes; workers: 2 not begun, of .*GPU: 1"):
        run_workers(print, {}, group, name="n", storage=str(tmp_path), state=tmp_path / "state", title="train", steps=1)
    ray.kill(neighbour)
