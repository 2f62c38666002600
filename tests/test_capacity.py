"""What a stage needs, against what a cluster has and can have; what it waits for; where its actors come to be."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from cpt_ray import capacity, cluster
from cpt_ray.capacity import Growth, NodeType, NodeTypes
from cpt_ray.config import ModelConfig
from cpt_ray.engines import pool, waiting
from cpt_ray.engines.engine import FakeEngine
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.ray_train import WorkerGroup, run_workers
from cpt_ray.engines.step import Line, Step
from cpt_ray.engines.waiting import Waiting, explained
from cpt_ray.errors import UserError
from cpt_ray.tables.rundir import RunDir

HEAD = NodeType("head", {"object": 0}, 1)
GPU = NodeType("gpu", {"CPU": 16, "GPU": 2, "accelerator_type:L4": 1}, 3)
CPU = NodeType("cpu", {"CPU": 16, "no_gpu": 1}, 4)


# ---------------------------------------------------------------- what fits


def test_what_no_node_type_has_is_refused_with_all_types_named() -> None:
    types = NodeTypes([NodeType("head", {}, 1)], [NodeType("cpu", {"CPU": 16}, 4)], 4)
    with pytest.raises(UserError) as caught:
        types.check("the writer", {"CPU": 1, "GPU": 1}, 1, "lower writer.num_gpus")
    assert str(caught.value).startswith(
        "the writer needs {CPU: 1, GPU: 1} on one node; no node type of this cluster has that "
        "(head: {CPU: 0}, cpu: {CPU: 16}); lower writer.num_gpus, or "
    )


@pytest.mark.parametrize(
    ("each", "room"),
    [
        ({"GPU": 1}, 6),
        ({"GPU": 2}, 3),
        ({"GPU": 0.5}, 12),
        ({"GPU": 3}, 0),  # two nodes have as many, none alone
        ({"CPU": 16}, 5),  # of seven nodes that there could be, five may be there at a time
        ({"CPU": 0.1}, 800),
        ({"CPU": 1, "accelerator_type:L4": 0.001}, 48),
        ({"CPU": 1, "accelerator_type:H100": 0.001}, 0),
    ],
)
def test_needs_are_counted_node_by_node_and_within_the_clusters_limits(each: dict[str, float], room: float) -> None:
    assert NodeTypes([HEAD], [GPU, CPU], 5).room(each) == room


def test_memory_that_is_asked_for_is_counted_and_a_node_asked_for_by_its_address_is_not_refused() -> None:
    told = {"CPU": 16, "memory": 64e9, "object_store_memory": 1e9, "node:10.0.0.1": 1}
    types = NodeTypes([NodeType("node", capacity._plain(told), 2)])
    assert types.room({"CPU": 4, "memory": 30e9}) == 4
    assert types.room({"CPU": 4, "node:10.0.0.1": 0.01}) == 8
    with pytest.raises(UserError, match=r"no node here has that \(node: \{CPU: 16, memory: 6.4e\+10\}\)"):
        types.check("the training", {"CPU": 4, "memory": 65e9}, 1, "")
    with pytest.raises(UserError, match=r"no node here has that \(node: \{CPU: 16\}\)"):
        types.check("the training", {"CPU": 32}, 1, "")


def test_where_nodes_may_come_that_nobody_tells_of_nothing_is_refused() -> None:
    NodeTypes([HEAD], is_known=False).check("the writer", {"GPU": 8}, 4, "")
    NodeTypes([HEAD], [NodeType("any", {}, 2)], 2).check("the writer", {"GPU": 8}, 4, "")


def test_work_without_a_gpu_asks_for_nodes_without_gpus_where_there_can_be_enough() -> None:
    types = NodeTypes([HEAD], [GPU, CPU], 5)
    assert types.placed({"CPU": 4}) == {"CPU": 4, "no_gpu": 0.001}
    assert types.placed({"CPU": 4, "GPU": 1}) == {"CPU": 4, "GPU": 1}
    assert types.placed({"CPU": 4, "big": 1}) == {"CPU": 4, "big": 1}
    assert types.placed({"CPU": 16}, count=5) == {"CPU": 16}  # four nodes of that kind
    assert NodeTypes([HEAD], [GPU], 5).placed({"CPU": 4}) == {"CPU": 4}


def test_a_role_behind_an_endpoint_needs_no_gpu() -> None:
    endpoint = {"base_url": "http://127.0.0.1:1/v1"}
    role = {"model": "m", "num_gpus": 1, "resources": {"big": 1}}
    assert ModelConfig.model_validate(role).actor_resources == {"CPU": 1, "GPU": 1, "big": 1}
    assert ModelConfig.model_validate({**role, "endpoint": endpoint}).actor_resources == {"CPU": 1, "big": 1}


@pytest.mark.parametrize(
    ("num_actors", "shards", "room", "size"),
    [
        ([1, 4], 20, 9, 4),
        ([1, 4], 20, 3, 3),
        ([1, 4], 4, 9, 2),
        ([3, 3], 4, 9, 3),
        ([2, 8], 1, 9, 1),
    ],
)
def test_a_pool_asks_at_once_for_what_its_shards_keep_busy(
    num_actors: list[int], shards: int, room: int, size: int
) -> None:
    model = ModelConfig.model_validate({"model": "m", "num_actors": num_actors})
    assert pool._pool_size(model, room, shards) == size


# ---------------------------------------------------------------- waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, which pass when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(cluster, "_patience", 10.0)
    return now


@dataclass
class Told:
    """What a cluster tells."""

    growth: Growth
    notes: dict[str, str]


@pytest.fixture
def told(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told(Growth({}, [({"GPU": 1}, 2)]), {})
    monkeypatch.setattr(waiting, "growth", lambda: told.growth)
    monkeypatch.setattr(waiting, "read_notes", lambda prefix: dict(told.notes))
    return told


def note(phase: str, work: int) -> str:
    return json.dumps({"phase": phase, "work": work})


def let_pass(watch: Waiting, clock: list[float], minutes: float, done: object = 0) -> None:
    for _ in range(int(minutes * 6)):
        clock[0] += 10
        watch.look(done)


def test_a_wait_for_a_node_that_nobody_launches_ends_and_says_what_was_asked_for(
    clock: list[float], told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Waiting("write", {"CPU": 1, "GPU": 1}, 2, "lower writer.num_actors")
    told.notes["a"] = note("at work", 0)
    with pytest.raises(UserError) as caught:
        let_pass(watch, clock, 11)
    assert str(caught.value) == (
        "write: no progress for 10 minutes; engines: 1 at work, 1 not begun, of {CPU: 1, GPU: 1} each (no node is "
        "launching; waiting for a node: 2 x {GPU: 1}); lower writer.num_actors, or raise no_progress_minutes; "
        "what is finished is kept"
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20  # one each half-minute
    assert lines[0].split()[0] == "write"
    assert "1 of 2 engines begun, 1 x {CPU: 1, GPU: 1} asked for; no node is launching" in lines[0]


def test_a_node_that_launches_an_engine_that_loads_and_a_shard_that_is_done_are_progress(
    clock: list[float], told: Told
) -> None:
    watch = Waiting("write", {"GPU": 1}, 1, "")
    told.growth = Growth({"gpu": 1}, [])
    let_pass(watch, clock, 25)
    told.growth = Growth({}, [])
    for work in range(5):
        told.notes["a"] = note("starting", work)
        let_pass(watch, clock, 9)
    for done in range(1, 5):
        let_pass(watch, clock, 9, done)
    with pytest.raises(UserError, match=r"no progress for 10 minutes; engines: 1 starting; "):
        let_pass(watch, clock, 9, 4)


def test_nodes_that_launch_and_never_come_are_waited_for_within_a_bound(clock: list[float], told: Told) -> None:
    watch = Waiting("write", {"GPU": 1}, 1, "")
    told.growth = Growth({"gpu": 1}, [])
    with pytest.raises(UserError, match=r"no progress for 3 times 10 minutes, in which nodes launched and did not"):
        let_pass(watch, clock, 31)
    watch = Waiting("write", {"GPU": 1}, 1, "")
    with pytest.raises(UserError, match="did not come"):
        for minute in range(40):  # a pod that is refused again and again
            told.growth = Growth({"gpu": 1} if minute % 8 < 4 else {}, [])
            let_pass(watch, clock, 1)


def test_launching_nodes_that_hold_none_of_what_is_waited_for_are_no_progress(clock: list[float], told: Told) -> None:
    watch = Waiting("write", {"GPU": 1}, 1, "", types=NodeTypes([HEAD], [GPU, CPU], 5))
    told.growth = Growth({"gpu": 1}, [])
    let_pass(watch, clock, 20)
    told.growth = Growth({"cpu": 4}, [])
    with pytest.raises(UserError, match=r"no progress for 10 minutes; .*launching 4 x cpu"):
        let_pass(watch, clock, 10)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OutOfMemoryError("the node is low on memory"), "out of memory; lower x (the node is low on memory)"),
        (RuntimeEnvSetupError("in pip\nError: no numpy==9"), "the job's runtime environment could not be set up on a "),
        (ActorUnschedulableError("the node is gone"), "no node can hold an actor any more ("),
        (ActorUnschedulableError("worker startup repeatedly failed"), "a node could not start a process, overloaded"),
        (NodeDiedError("Node Id: ab"), "a node died (Node Id: ab)"),
        (RayActorError(), "an actor died, killed from outside or out of memory; lower x ("),
        (ExecutionTimeoutError("nothing moved"), "ExecutionTimeoutError: nothing moved"),
        (RayTaskError("f", "a traceback", KeyError("k")), "KeyError: 'k'"),
    ],
)
def test_what_rays_libraries_raise_becomes_one_line(error: Exception, words: str) -> None:
    line = explained(error, less_memory="x")
    assert line.startswith(words)
    assert "\n" not in line


# ---------------------------------------------------------------- real actors


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
    step = PlaceStep(model=ModelConfig.model_validate({"model": "m", **model}))
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
