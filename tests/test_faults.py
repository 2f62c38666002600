"""What dies, and what is left of it: on real processes, with real kills."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from cpt_ray.cluster import unused_port
from cpt_ray.config import ModelConfig, Range
from cpt_ray.engines.engine import Completion, Engine, EngineDiedError, FakeEngine, Request
from cpt_ray.engines.ledger import Tally
from cpt_ray.engines.pool import LocalRunner, run_lines
from cpt_ray.engines.step import Line, OpenEngine, Runner, Step
from cpt_ray.engines.worker import MAX_DEATHS, Attempts, make_engine
from cpt_ray.errors import UserError
from cpt_ray.plan import plan_units
from cpt_ray.synthesis.stage import Steps, name_shards
from cpt_ray.tables.rundir import RunDir
from tests import toy
from tests.fake_runs import GIVEN, answer, make_run
from tests.local_cluster import ROOT

ENDPOINT = {"base_url": "http://127.0.0.1:1/v1", "api_key_env": "CPT_TEST_KEY"}
"""Never asked: it makes an engine that starts at once."""


@pytest.mark.slow
def test_kill_9_loses_repeats_and_changes_nothing() -> None:
    small = ["prompts.limit=20", "synthesis.shard_rows=20", "writer.num_actors=1"]
    command = [sys.executable, "jobs/benchmarks/faults.py", str(toy.RUN_FILE), *small]
    command += ["--kills=3", "--stages", "plan", "write", "judge"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout
    assert "'lost': 0, 'added': 0, 'duplicated': 0, 'differing': 0" in done.stdout


@pytest.fixture(scope="module")
def metrics_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ray in this process, and where its metrics are."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    port = unused_port()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _metrics_export_port=port)
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True, kw_only=True)
class MarkStep(Step):
    """Writes an empty shard; the names of some shards say what happens on the way."""

    stage: str = "mark"
    table: str = "units"

    def output(self, shard: str) -> str:
        return f"{shard}-done"

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        if shard == "poison":
            with (run.path / "deaths").open("a") as file:
                file.write("x")
            if (run.path / "deaths").stat().st_size == MAX_DEATHS:  # an engine in a process of its own, which is gone
                raise EngineDiedError("core dumped")
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == "broken":
            raise KeyError("no such row")
        tally = Tally(1)
        tally.add([Completion(num_prompt_tokens=7, num_tokens=3)])
        tally.reject("cut off")
        with full_disk() if shard == "full" else nullcontext():
            run.write(self.table, self.output(shard), [], tally.close(0))


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
def test_what_kills_every_engine_ends_the_run_within_a_bound_and_the_rest_is_kept(
    metrics_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPT_TEST_KEY", "k")
    run, free = RunDir(tmp_path), ray.available_resources()
    step = MarkStep(model=ModelConfig(model="m", endpoint=ENDPOINT))
    names = [f"good-{at}" for at in range(6)]
    run_lines(run, [Line(names[:3], [step])])
    with pytest.raises(UserError, match=r"full-done.parquet: cannot be written \(File too large\); free some space"):
        run_lines(run, [Line(["full"], [step])])
    expected = rf"died {MAX_DEATHS} times on mark of shard poison \(the last time: EngineDiedError: core dumped\)"
    with pytest.raises(UserError, match=f"m: the engine's process {expected}"):
        run_lines(run, [Line([*names, "poison"], [step])])
    assert len((tmp_path / "deaths").read_text()) == MAX_DEATHS
    assert run.names("units") == {f"{name}-done" for name in names}
    assert not list((tmp_path / "units").glob(".full*"))
    assert_given_back(free)
    assert_metric(metrics_url, "ray_cpt_stage_tokens", 'kind="generated"')
    assert_metric(metrics_url, "ray_cpt_stage_rows", 'outcome="rejected: cut off"')


@dataclass(frozen=True, kw_only=True)
class SlowStep(MarkStep):
    """The processes of a pool differ in how long a shard takes them."""

    seconds: tuple[float, ...]
    """Of the first process to begin, the second, ...; -1: it dies. The pool's own two do their first shard at once."""

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        mine = run.path / f"process-{os.getpid()}"
        is_first = not mine.exists()
        if is_first:
            mine.touch()
        at = sorted(run.path.glob("process-*"), key=lambda path: path.stat().st_mtime_ns).index(mine)
        if self.seconds[at] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0 if is_first and at < 2 else self.seconds[at])
        super().__call__(engine, run, shard)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param((3600, 0, 0), id="to the end"),
        pytest.param((15, 0, 3600), id="for a while"),
        pytest.param((3600, 0, -1, 0), id="to the end, and the other dies"),
    ],
)
def test_what_a_slow_actor_still_has_when_the_rest_is_done_is_given_to_another_as_well(
    seconds: tuple[float, ...],
    metrics_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cpt_ray.engines.backup.LEAST_SECONDS", 3.0)
    monkeypatch.setattr("cpt_ray.engines.backup.SLOW_TIMES", 0.0)  # seconds of a start are nothing to judge by
    run, free = RunDir(tmp_path), ray.available_resources()
    model = ModelConfig(model="m", num_actors=Range(2, 2), num_cpus=1)
    names = [f"good-{at}" for at in range(8)]
    run_lines(run, [Line(names, [SlowStep(model=model, seconds=seconds)])], open_none)
    assert run.names("units") == {f"{name}-done" for name in names}
    assert re.search(r"mark +nothing was finished for .* what is left \(shards: [1-4]\): 1", capsys.readouterr().out)
    assert_given_back(free)


def open_none(model: ModelConfig) -> None:
    """Of steps that ask no engine."""


def test_an_engine_that_cannot_start_ends_the_run_with_its_cause(metrics_url: str, tmp_path: Path) -> None:
    free = ray.available_resources()
    step = MarkStep(model=ModelConfig(model=str(tmp_path / "no-model")))
    with pytest.raises(UserError, match=r"no-model.*what is finished is kept") as caught:
        run_lines(RunDir(tmp_path), [Line(["good"], [step])])
    assert "\n" not in str(caught.value)
    assert "in make_engine" in str(caught.value.__cause__)
    with pytest.raises(UserError, match=r"m: .*what is finished is kept"):
        run_lines(RunDir(tmp_path), [Line(["good"], [MarkStep(model=ModelConfig(model="m"))])], killed_while_it_loads)
    assert_given_back(free)


def test_no_answer_is_judged_before_it_is_written(metrics_url: str, tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    units = plan_units(plan)
    for name, rows in units.items():
        run.write("units", name, rows)
    shards = name_shards(plan, units)
    run_lines(run, Steps.of(plan, units).pass_lines(shards), slow_engine)
    assert run.names("grades") == set(shards.grades)


def slow_engine(model: ModelConfig) -> FakeEngine:
    """One that is still writing when it could judge."""

    def later(request: Request) -> Completion:
        time.sleep(0.0 if request.labels else 0.1)
        return answer(request)

    return FakeEngine(later)


def test_the_runner_of_this_process_ends_on_the_same_words_as_ray(metrics_url: str, tmp_path: Path) -> None:
    def not_needed(model: ModelConfig) -> None:
        """Of steps that ask no engine."""

    def not_opened(model: ModelConfig) -> Engine:
        return make_engine(model, None)

    def last_words(runner: Runner, model: str, open_engine: OpenEngine) -> str:
        with pytest.raises(UserError) as caught:
            runner(RunDir(tmp_path), [Line(["broken"], [MarkStep(model=ModelConfig(model=model))])], open_engine)
        assert "Traceback" in str(caught.value.__cause__)
        return str(caught.value)

    local = LocalRunner(not_needed)
    for model, open_engine in (("m", not_needed), (str(tmp_path / "no-model"), not_opened)):
        assert last_words(local, model, open_engine) == last_words(run_lines, model, open_engine)
    assert last_words(local, "m", not_needed) == (
        "m: KeyError: 'no such row' (mark of shard broken); what is finished is kept"
    )


def killed_while_it_loads(model: ModelConfig) -> None:
    """As by a node that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def assert_given_back(free: dict[str, float]) -> None:
    """The pool's logical resources are free again, and no placement group is left."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != free["CPU"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == free["CPU"]
    assert all(one["state"] == "REMOVED" for one in ray.util.placement_group_table().values())


def assert_metric(url: str, name: str, tag: str) -> None:
    """The node exports the metric with this tag."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = urllib.request.urlopen(url).read().decode().splitlines()
        found = [line for line in lines if line.startswith(name) and tag in line]
        if found:
            return
        time.sleep(0.5)
    pytest.fail(f"no {name} with {tag} among {[line for line in lines if 'cpt' in line]}")


def test_the_death_of_an_engine_is_forgiven_a_bounded_number_of_times(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for _ in range(MAX_DEATHS):
        attempts.begin("write-x", "on write of shard x")
    attempts.note("write-x", "EngineDiedError: core dumped")
    expected = r"died 3 times on write of shard x \(the last time: EngineDiedError: core dumped\)"
    with pytest.raises(UserError, match=expected):
        attempts.begin("write-x", "on write of shard x")
    attempts.end("write-x")
    attempts.begin("write-x", "on write of shard x")
