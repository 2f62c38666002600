"""All stages by submitted jobs on a cluster whose nodes have nothing in common but a folder, while nodes die.

The tests are one story, in order: each goes on with the run of the one before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cpt_ray.cluster import unused_port
from cpt_ray.tables.rundir import TRAIN_PROGRESS_FILE, RunDir
from jobs.benchmarks.faults import compare
from tests.machines import Node, missing
from tests.nodes import QUICK_DEATHS, Job, Nodes

RUN_FILE = "tests/toy/run.yaml"
SETTINGS = (
    *("prompts.limit=24", "synthesis.shard_rows=20", "synthesis.paraphrases=6", "writer.num_actors=2"),
    *("train.max_pairs=400", "train.batch_size=16", "train.save_steps=5", "evaluate.prompts=3"),
    "policy.num_actors=2",
)
NUM_STEPS, SAVED_EVERY = 25, 5
KEY = "a-test-key"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head without CPUs and three workers of one CPU."""
    if why := missing():
        pytest.skip(why)
    with Nodes(env=QUICK_DEATHS) as cluster:
        cluster.add(3)
        yield cluster


@pytest.fixture(autouse=True)
def no_job_is_left(nodes: Nodes) -> Iterator[None]:
    """Ends what a test that failed has begun: it would hold the run's lock, and CPUs."""
    yield
    for job in nodes.jobs:
        if job.is_running:
            nodes.stop_job(job)
            job.wait()


def submit(nodes: Nodes, stage: str, *more: str, run: str = "run") -> Job:
    """A stage's job on a run in the shared folder."""
    env = {"VLLM_LOGGING_LEVEL": "ERROR", "CPT_API_KEY": KEY}
    return nodes.submit(f"jobs/{stage}.py", RUN_FILE, f"run_dir={nodes.shared}/{run}", *SETTINGS, *more, env=env)


def until(is_so: Callable[[], bool], job: Job, seconds: float = 240) -> None:
    """Waits for something that comes while the job runs."""
    deadline, looked = time.monotonic() + seconds, time.monotonic()
    while not is_so():
        assert time.monotonic() < deadline, f"not after {seconds:.0f} s: {job.output[-3000:]}"
        if time.monotonic() > looked + 2:
            assert job.is_running, f"the job ended before: {job.output[-3000:]}"
            looked = time.monotonic()
        time.sleep(0.01)


def holder(nodes: Nodes, process: str) -> Node:
    """A worker on which a process of this name runs."""
    return next(
        node
        for node in nodes.workers
        if any(process in " ".join(one.cmdline()) for one in node.processes() if one.is_running())
    )


def last_checkpoint(run: Path) -> int:
    """The step of the last one that Ray Train's controller knows of: it asks the workers every two seconds."""
    for path in run.glob("checkpoints/*/checkpoint_manager_snapshot.json"):
        with suppress(ValueError):  # being written just now
            return max(
                (each["metrics"]["step"] for each in json.loads(path.read_text())["checkpoint_results"]), default=0
            )
    return 0


def finished(job: Job) -> str:
    assert job.wait() == "SUCCEEDED", job.output[-3000:]
    return job.output


def test_a_node_killed_in_writing_loses_doubles_and_changes_no_row(nodes: Nodes) -> None:
    run = nodes.files("run")
    job = submit(nodes, "synthesize")
    until(lambda: any((run / "attempts").glob("write-*")), job)
    nodes.kill(holder(nodes, "StepActor"))
    assert "(raylet)" not in finished(job)
    finished(submit(nodes, "synthesize", run="undisturbed"))
    difference = compare(nodes.files("undisturbed"), run)
    assert difference.pop("rows") > 500
    assert set(difference.values()) == {0}, difference


def test_a_node_killed_in_training_costs_the_steps_since_the_last_checkpoint(nodes: Nodes) -> None:
    nodes.add()
    run = nodes.files("run")
    job = submit(nodes, "train")
    state, steps = run / TRAIN_PROGRESS_FILE, set[int]()

    def has_reached(step: int) -> bool:
        if state.exists():
            steps.add(json.loads(state.read_text())["done"])
        return max(steps, default=0) >= step

    until(lambda: last_checkpoint(run) >= SAVED_EVERY, job)
    nodes.kill(holder(nodes, "RayTrainWorker"))
    saved = last_checkpoint(run)
    state.unlink(missing_ok=True)  # where it is from before the kill, it would be taken for a step that is done again
    steps.clear()
    until(lambda: has_reached(NUM_STEPS), job)
    assert SAVED_EVERY <= saved < min(steps)
    assert f"({NUM_STEPS} steps on 400 pairs" in finished(job)
    history = RunDir(run).read_json("model/cpt_ray.json")["summary"]["history"]
    assert [step["step"] for step in history] == list(range(1, NUM_STEPS + 1))


def test_a_node_that_is_cut_off_for_seconds_goes_on(nodes: Nodes) -> None:
    if missing():
        pytest.skip(f"no cable to unplug where nodes are not real: {missing()}")
    run = nodes.files("run")
    job = submit(nodes, "evaluate")
    until(lambda: any((run / "attempts").glob("*-*")), job)
    node = holder(nodes, "StepActor")
    nodes.cut(node)
    time.sleep(5)
    nodes.mend(node)
    assert "tuned" in finished(job)
    assert (run / "report" / "results.json").exists()


def test_a_second_server_takes_over_and_the_first_ones_job_ends(nodes: Nodes) -> None:
    port = unused_port()
    url = f"http://{nodes.head.address}:{port}/toy/v1/models"

    def answers() -> bool:
        time.sleep(0.3)
        return nodes.get(url, {"Authorization": f"Bearer {KEY}"})[0] == 200

    first = submit(nodes, "serve", "serve.host=0.0.0.0", f"serve.port={port}")
    until(answers, first)
    second = submit(nodes, "serve", "serve.host=0.0.0.0", f"serve.port={port}")
    output = finished(first)
    assert "has taken over" in output
    assert f"serving      toy at http://{nodes.head.address}:{port}/toy (`ray job stop` stops it)\n" in output
    assert second.is_running
    assert answers()
    nodes.stop_job(second)
    second.wait()
    assert not answers()
