"""What a stage needs, against what a cluster has and can have; and what it waits for."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
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
from cpt_ray.engines.waiting import Waiting, explained
from cpt_ray.errors import UserError

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


def test_what_starts_is_said_within_half_a_minute_and_then_each_half_minute(
    clock: list[float], told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Waiting("write", {"CPU": 1}, 2, "")
    told.growth = Growth({}, [])  # there is room, so nothing is said about nodes
    let_pass(watch, clock, 0.4)
    assert capsys.readouterr().out == "write        0 of 2 engines begun, 2 x {CPU: 1} asked for\n"
    for work in range(6):
        told.notes |= {"a": note("starting", work), "b": note("starting", work)}
        let_pass(watch, clock, 0.5)
    assert capsys.readouterr().out.splitlines() == ["write        2 of 2 engines begun (2 still starting)"] * 6
    for work in range(6):
        told.notes["a"] = note("at work", work)
        let_pass(watch, clock, 0.5)
    assert capsys.readouterr().out == ""  # from now on the progress line says how far it is


def looks_in_vain(watch: Waiting, clock: list[float]) -> None:
    """Until the thread that looks has something to raise."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        clock[0] += 10
        time.sleep(0.01)
        watch.check()


@pytest.fixture
def busy_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WATCH_SECONDS", 0.001)


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "waiting"]


def test_who_waits_is_told_though_it_never_looks_and_has_the_error_in_its_block(
    clock: list[float], told: Told, busy_look: None, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Waiting("write", {"GPU": 1}, 1, "")
    with pytest.raises(UserError, match="write: no progress for 10 minutes"), watch.watched(lambda: 0):
        assert len(watchers()) == 1
        looks_in_vain(watch, clock)
    assert capsys.readouterr().out.count("0 of 1 engines begun") > 5
    assert not watchers()


def test_what_a_look_raised_is_raised_at_the_blocks_end_and_hides_no_other_error(
    told: Told, busy_look: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(line: str) -> None:
        raise SystemExit("nobody reads")

    monkeypatch.setattr(waiting, "say", closed)
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.0)
    watch = Waiting("write", {"GPU": 1}, 1, "")
    watch._said -= 60
    with pytest.raises(SystemExit, match="nobody reads"), watch.watched(lambda: 0):
        watchers()[0].join(2)
    with pytest.raises(KeyboardInterrupt), Waiting("write", {"GPU": 1}, 1, "").watched(lambda: 0):
        raise KeyboardInterrupt
    assert not watchers()


def test_a_block_that_never_checks_is_interrupted_with_the_error_of_the_look(
    clock: list[float], told: Told, busy_look: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "STUCK_SECONDS", 0.1)
    watch, start = Waiting("write", {"GPU": 1}, 1, ""), time.monotonic()
    with pytest.raises(UserError, match="write: no progress for 10 minutes"), watch.watched(lambda: 0):
        for _ in range(2000):
            clock[0] += 10
            time.sleep(0.01)
    assert time.monotonic() - start < 20
    assert not watchers()


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
