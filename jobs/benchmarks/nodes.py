"""What jobs make of dying, cut off, full and slow nodes, on a cluster whose nodes are real to each other.

python -m jobs.benchmarks.nodes [--undisturbed FOLDER] [SCENARIO ...]

The cluster is the one of the tests (tests/nodes.py: namespaces of this machine, so it needs root): a head without CPUs
and three workers of one CPU, and one shared folder. Each scenario starts a new one, submits a stage, does what it is
named after, and compares the tables (or the weights) with those of a run that nothing happened to. One row of a
Markdown table each; what is printed last by the job that was disturbed is below it. Without a scenario: all of them.
FOLDER keeps the undisturbed run for another time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from cpt_ray.tables.rundir import TRAIN_PROGRESS_FILE
from jobs.benchmarks.faults import compare
from tests.machines import Node, missing
from tests.nodes import ROOT, Job, Nodes

RUN_FILE = "tests/toy/run.yaml"
SETTINGS = (
    *("prompts.limit=40", "synthesis.shard_rows=20", "synthesis.paraphrases=8", "writer.num_actors=2"),
    *("train.max_pairs=640", "train.batch_size=16", "train.save_steps=5", "serve.host=0.0.0.0", "serve.replicas=2"),
)
KEY = "a-benchmark-key"
ENGINE, TRAINER = "StepActor", "RayTrainWorker"
"""What the processes are called that hold an engine, or train."""
LIMIT_SECONDS = 600.0
LAST_LINES = 3
"""How many of a job's last lines are shown."""


@dataclass
class Outcome:
    """One scenario's row."""

    what: str
    rows: str = ""
    """Lost, doubled and different ones; or what is compared instead."""
    next_seconds: float | None = None
    """From what was done to the first shard or step that was finished afterwards."""
    pause_seconds: float | None = None
    """The longest time without one."""
    job_seconds: float = 0.0
    last_lines: list[str] = field(default_factory=list)


class Progress(threading.Thread):
    """When shards or steps were finished, as the shared folder shows it."""

    def __init__(self, run: Path, stage: str):
        super().__init__(daemon=True)
        self._run, self._stage, self.times = run, stage, list[float]()
        self._is_over = threading.Event()

    def run(self) -> None:
        most = 0
        while not self._is_over.wait(0.1):
            if (now := self._finished()) > most:
                most = now
                self.times.append(time.monotonic())

    def _finished(self) -> int:
        with contextlib.suppress(OSError, ValueError):  # being replaced just now
            if self._stage == "train":
                return int(json.loads((self._run / TRAIN_PROGRESS_FILE).read_text()).get("done", 0))
            return sum(1 for _ in self._run.glob("*/[!.]*.parquet"))
        return 0

    def since(self, start: float) -> tuple[float | None, float | None]:
        """Seconds to the next one, and the longest pause."""
        self._is_over.set()
        later = [at for at in self.times if at > start]
        return (
            (later[0] - start, max(b - a for a, b in zip([start, *later], later, strict=False)))
            if later
            else (
                None,
                None,
            )
        )


@dataclass
class Disturbed:
    """A stage under way, for the scenarios."""

    nodes: Nodes
    job: Job
    run: Path

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not is_so():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the job was not disturbed in time: {self.job.output[-3000:]}")
            time.sleep(0.005)

    def holder(self, process: str) -> Node:
        """A worker that has such a process."""
        return next(node for node in self.nodes.workers if list(running(node, process)))


def running(node: Node, process: str) -> Iterator[psutil.Process]:
    """A node's processes of this name."""
    for each in node.processes():
        with contextlib.suppress(psutil.Error):
            if process in " ".join(each.cmdline()):
                yield each


# ---------------------------------------------------------------- what is done to a cluster


def kill_node(process: str) -> Callable[[Disturbed], None]:
    return lambda at: at.nodes.kill(at.holder(process))


def lose_power(at: Disturbed) -> None:
    """Nothing tells the others that it is gone: its connections stay open."""
    node = at.holder(ENGINE)
    at.nodes.cut(node)
    at.nodes.kill(node)


def cut_for(seconds: float, process: str) -> Callable[[Disturbed], None]:
    def cut(at: Disturbed) -> None:
        node = at.holder(process)
        at.nodes.cut(node)
        time.sleep(seconds)
        at.nodes.mend(node)

    return cut


def kill_driver(at: Disturbed) -> None:
    for process in running(at.nodes.head, f"jobs/{at.job.name.partition('-')[0]}.py"):  # and the shell around it
        process.kill()


def lose_head(at: Disturbed) -> None:
    """And with it all that it knew; so the workers are started anew, too."""
    for node in [at.nodes.head, *at.nodes.workers]:
        at.nodes.kill(node)
    at.nodes.start_head()
    at.nodes.add(3)


def restart_head(at: Disturbed) -> None:
    """At its old address; the workers stay."""
    at.nodes.kill(at.nodes.head)
    at.nodes.start_head(at.nodes.head.address)


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    path = folder / "full"
    with path.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    return path


def slow_down(at: Disturbed, share: float = 0.05) -> None:
    """A node whose processes run for a small share of the time only, as long as the job runs."""
    node = at.holder(ENGINE)

    def turns() -> None:
        while at.job.is_running:
            for number, seconds in ((signal.SIGSTOP, 1 - share), (signal.SIGCONT, share)):
                for process in running(node, "ray::"):
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(number)
                time.sleep(seconds)

    threading.Thread(target=turns, daemon=True).start()


# ---------------------------------------------------------------- stages


class Bench:
    """The undisturbed run, and stages that are disturbed."""

    def __init__(self, undisturbed: Path):
        self._undisturbed = undisturbed

    @cached_property
    def written(self) -> Path:
        """The undisturbed synthesis."""
        return self._run_here("synthesize", self._undisturbed / "written")

    @cached_property
    def trained(self) -> Path:
        """The undisturbed training on it."""
        run = self._undisturbed / "trained"
        shutil.copytree(self.written, run, dirs_exist_ok=True)
        return self._run_here("train", run)

    def _run_here(self, stage: str, run: Path) -> Path:
        """On this machine alone; at once, if it is there already."""
        command = [sys.executable, "-m", "cpt_ray", stage, RUN_FILE, *SETTINGS, f"run_dir={run}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT_SECONDS)
        return run

    def submit(self, nodes: Nodes, stage: str, cpus: int = 0) -> Job:
        env = {"VLLM_LOGGING_LEVEL": "ERROR", "CPT_API_KEY": KEY}
        run = f"run_dir={nodes.shared}/run"
        return nodes.submit(f"jobs/{stage}.py", RUN_FILE, run, *SETTINGS, env=env, cpus=cpus)

    def has_begun(self, run: Path, marker: str) -> bool:
        if marker == "train":
            with contextlib.suppress(OSError, ValueError):
                return int(json.loads((run / TRAIN_PROGRESS_FILE).read_text()).get("done", 0)) > 7
            return False
        return any((run / "attempts").glob(f"{marker}-*"))

    def stage(
        self,
        what: str,
        marker: str,
        disturb: Callable[[Disturbed], None],
        cpus: int = 0,
        tmp_bytes: int | None = None,
        **options: Any,
    ) -> Outcome:
        """A stage that is disturbed once it is at `marker`; if it fails, the same command again."""
        stage = "train" if marker == "train" else "synthesize"
        with Nodes(**options) as nodes:
            nodes.add(3, tmp_bytes=tmp_bytes)
            run = nodes.files("run")
            if stage == "train":
                shutil.copytree(self.written, run)
            head, progress, start = nodes.head, Progress(run, stage), time.monotonic()
            progress.start()
            job = self.submit(nodes, stage, cpus)
            at = Disturbed(nodes, job, run)
            at.until(lambda: self.has_begun(run, marker))
            disturbed = time.monotonic()
            disturb(at)
            status, first = "LOST" if nodes.head is not head and not job.status else job.wait(LIMIT_SECONDS), job
            if status != "SUCCEEDED":
                what += f" ({status}; the same command again)"
                job = self.submit(nodes, stage)
                if job.wait(LIMIT_SECONDS) != "SUCCEEDED":
                    raise RuntimeError(job.output[-3000:])
            outcome = Outcome(what, self.difference(run, stage), *progress.since(disturbed))
            outcome.job_seconds = time.monotonic() - start
            outcome.last_lines = last_lines(first)
            return outcome

    def difference(self, run: Path, stage: str) -> str:
        if stage == "train":
            name = Path("model") / "model.safetensors"
            same = (run / name).read_bytes() == (self.trained / name).read_bytes()
            return "the same weights" if same else "other weights"
        found = compare(self.written, run)
        return f"{found['lost']}, {found['duplicated'] + found['added']}, {found['differing']} of {found['rows']}"

    def serving(self, what: str, disturb: Callable[[Disturbed], None], seconds: float = 45, **options: Any) -> Outcome:
        """Two replicas under load, also for some seconds after what was done."""
        with Nodes(**options) as nodes:
            nodes.add(3)
            run = nodes.files("run")
            shutil.copytree(self.trained, run)
            start, job = time.monotonic(), self.submit(nodes, "serve")
            at, address = Disturbed(nodes, job, run), re.compile(r"serving +\S+ at http://[^/:]+(\S+)")
            at.until(lambda: address.search(job.output) is not None)
            found = address.search(job.output)
            assert found
            with asked(nodes, f"http://{nodes.head.address}{found[1]}") as answers:
                time.sleep(10)
                before, disturbed = len(answers), time.monotonic()
                disturb(at)
                time.sleep(seconds)
            later = [(at_time, status) for at_time, status in answers[before:] if at_time > disturbed]
            failed = Counter(status for _, status in later if status != 200)
            good = [disturbed, *(at_time for at_time, status in later if status == 200)]
            outcome = Outcome(what, f"{sum(failed.values())} of {len(later)} requests failed {dict(failed) or ''}")
            outcome.next_seconds = good[1] - disturbed if len(good) > 1 else None
            outcome.pause_seconds = max((b - a for a, b in itertools.pairwise(good)), default=None)
            outcome.job_seconds = time.monotonic() - start
            outcome.last_lines = last_lines(job)
            return outcome


@contextmanager
def asked(nodes: Nodes, url: str, clients: int = 3) -> Iterator[list[tuple[float, int]]]:
    """Requests one after the other from each client: when each was answered, and how."""
    body = {"model": "toy", "messages": [{"role": "user", "content": "Write about the harbor."}], "max_tokens": 16}
    answers, is_over = list[tuple[float, int]](), threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            status, _ = nodes.get(f"{url}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}, body)
            answers.append((time.monotonic(), status))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    yield answers
    is_over.set()
    for thread in threads:
        thread.join()


def last_lines(job: Job) -> list[str]:
    """What was said to the user last, without what `ray job submit` itself adds."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in job.output.splitlines()]
    own = [line for line in lines if line and not re.match(r"\d{4}-\d\d-\d\d ", line)]
    return own[-LAST_LINES:]


# ---------------------------------------------------------------- scenarios


def full_shared_folder(bench: Bench) -> Outcome:
    def disturb(at: Disturbed) -> None:
        path = fill(at.nodes.files())
        at.job.wait(LIMIT_SECONDS)
        path.unlink()

    what = "the shared folder full while writing, then room again"
    return bench.stage(what, "write", disturb, shared_bytes=60 << 20)


def full_node(bench: Bench) -> Outcome:
    def disturb(at: Disturbed) -> None:
        fill(at.nodes.temporary(at.holder(ENGINE)))

    return bench.stage("a worker's own /tmp full while writing", "write", disturb, tmp_bytes=200 << 20)


def scenarios(redis: str) -> dict[str, Callable[[Bench], Outcome]]:
    """By name, in the table's order."""

    def stage(*arguments: Any, **options: Any) -> Callable[[Bench], Outcome]:
        return lambda bench: bench.stage(*arguments, **options)

    def serving(*arguments: Any, **options: Any) -> Callable[[Bench], Outcome]:
        return lambda bench: bench.serving(*arguments, **options)

    kill = kill_node(ENGINE)
    found: dict[str, Callable[[Bench], Outcome]] = {
        "nothing": stage("nothing, for comparison", "write", lambda at: None),
        "write-kill": stage("a node killed while writing", "write", kill),
        "write-power": stage("a node without power while writing", "write", lose_power),
        "judge-kill": stage("a node killed while judging", "judge", kill),
        "pair-kill": stage("a node killed while pairing", "pair", kill),
        "train-kill": stage("a node killed in training", "train", kill_node(TRAINER)),
        "serve-kill": serving("a node killed in serving", kill_node("ServeReplica")),
        **{
            f"write-cut-{seconds}": stage(
                f"a node cut off for {seconds} s while writing", "write", cut_for(seconds, ENGINE)
            )
            for seconds in (5, 30, 120)
        },
        **{
            f"train-cut-{seconds}": stage(
                f"a node cut off for {seconds} s in training", "train", cut_for(seconds, TRAINER)
            )
            for seconds in (5, 30, 120)
        },
        "serve-cut-30": serving("a node cut off for 30 s in serving", cut_for(30, "ServeReplica")),
        "write-driver": stage("the driver killed while writing", "write", kill_driver),
        "train-driver": stage("the driver killed in training", "train", kill_driver),
        "write-head": stage("the head lost while writing, all started anew", "write", lose_head),
        "full-shared": full_shared_folder,
        "full-node": full_node,
        "write-slow": stage("a node at a twentieth of its speed while writing", "write", slow_down),
    }
    if redis:
        again = "the head killed and started again, its state in Redis"
        found["write-head-redis"] = stage(f"{again}, while writing", "write", restart_head, cpus=1, redis=redis)
        found["serve-head-redis"] = serving(f"{again}, in serving", restart_head, seconds=60, redis=redis)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--undisturbed", type=Path, help="where the undisturbed run is kept")
    parser.add_argument("--redis", default=shutil.which("redis-server") or "", help="path of a redis-server")
    parser.add_argument("scenarios", nargs="*")
    options = parser.parse_args()
    if missing():
        raise SystemExit(f"this machine cannot have such nodes: {missing()}")
    known = scenarios(options.redis)
    if unknown := set(options.scenarios) - known.keys():
        raise SystemExit(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="undisturbed-") as folder:
        bench = Bench((options.undisturbed or Path(folder) / "run").absolute())
        print("| scenario | lost, doubled, different | next progress, s | longest pause, s | job, s |")
        print("|---|---|---|---|---|", flush=True)
        for name in options.scenarios or known:
            try:
                outcome = known[name](bench)
            except Exception as error:  # of any kind: the other scenarios are still worth a look
                traceback.print_exc()
                print(f"| {name} | {type(error).__name__} | | | |", flush=True)
                continue
            times = (outcome.next_seconds, outcome.pause_seconds, outcome.job_seconds)
            shown = " | ".join("-" if seconds is None else f"{seconds:.0f}" for seconds in times)
            print(f"| {outcome.what} | {outcome.rows} | {shown} |")
            print("".join(f"#   {name}: {line}\n" for line in outcome.last_lines), end="", flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
