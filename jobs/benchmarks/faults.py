"""Synthesis under kill -9, and its tables against those of an undisturbed run: lost, duplicated and differing rows.

python jobs/benchmarks/faults.py --kills 30 --seed 0 [--stages write judge] [RUN_FILE [key=value ...]]

Kills are spread evenly over the stages. The victim is the driver (a node and its cluster go with it), the actor that
holds an engine, the raylet (a node that vanishes under its driver), or, where an engine has processes of its own
(writer.engine.distributed_executor_backend=mp), one of these. What ends is started again with the same command; a run
that is finished is compared, and another begins until there were enough kills. Beside it: how many rows were under way
at a kill, which is the most that it can make be done again. Exit status 1 if any table differs. Without a run file it
is the one of the tests' toy model, which goes through every stage, in seconds.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

TABLES = {
    "units": ("unit_id",),
    "directives": ("directive_id",),
    "generations": ("unit_id",),
    "grades": ("unit_id", "rubric_id", "judge"),
    "pairs": ("pair_id",),
    "rejects": ("stage", "subject_id", "reason", "detail"),
}
"""Each table's key: no two rows may share it."""
STAGES = ("plan", "start", "direct", "write", "judge", "pair")
INPUTS = {"write": "units", "judge": "generations"}
"""Where the rows of these stages' shards are."""
ACTOR, WORKER, NODE = "StepActor", "VLLM::Worker", "raylet"
"""What the victims' processes are called."""
LIMIT_SECONDS = 600


def rows_of(run: Path, table: str) -> dict[tuple[Any, ...], list[str]]:
    """A table's rows as canonical JSON, by key."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for path in sorted((run / table).glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            rows.setdefault(tuple(row[key] for key in TABLES[table]), []).append(json.dumps(row, sort_keys=True))
    return rows


def compare(reference: Path, disturbed: Path) -> Counter[str]:
    """Rows lost, added, duplicated and differing, over all tables."""
    found: Counter[str] = Counter(lost=0, added=0, duplicated=0, differing=0)
    for table in TABLES:
        expected, got = rows_of(reference, table), rows_of(disturbed, table)
        found["rows"] += len(expected)
        found["lost"] += len(expected.keys() - got.keys())
        found["added"] += len(got.keys() - expected.keys())
        # the director may write, and so reject, the same text twice
        found["duplicated"] += sum(max(0, len(rows) - len(expected.get(key, rows[:1]))) for key, rows in got.items())
        found["differing"] += sum(set(expected[key]) != set(got[key]) for key in expected.keys() & got.keys())
    return found


def started(command: list[str], run: Path) -> subprocess.Popen[bytes]:
    """The synthesis of one run directory."""
    log = (run.parent / f"{run.name}.log").open("ab")
    process = subprocess.Popen([*command, f"run_dir={run}"], stdout=log, stderr=subprocess.STDOUT)
    atexit.register(process.kill)  # where this program itself is stopped
    return process


def reached(run: Path, stage: str) -> bool:
    """Whether the stage is at work just now."""
    if stage == "plan":
        return any((run / "units").glob("*.parquet"))
    return any((run / "attempts").glob(f"{stage}-*"))


def under_way(run: Path) -> int:
    """Rows of the shards that engines have begun and not finished."""
    found = [path.name.partition("-") for path in (run / "attempts").glob("*")]
    shards = [run / INPUTS[stage] / f"{shard}.parquet" for stage, _, shard in found if stage in INPUTS]
    return sum(pq.read_metadata(path).num_rows for path in shards)


def victims(driver: psutil.Process, stage: str, rng: random.Random) -> Iterator[psutil.Process]:
    """What to kill, best first."""
    kinds = ["driver"] if stage == "plan" else ["driver", ACTOR, NODE]
    children = {one: " ".join([one.name(), *one.cmdline()]) for one in driver.children(recursive=True)}
    if any(WORKER in names for names in children.values()):
        kinds.append(WORKER)
    kind = rng.choice(kinds)
    yield from (one for one, names in children.items() if kind in names and kind != "driver")
    yield driver


def disturb(process: subprocess.Popen[bytes], run: Path, stage: str, rng: random.Random) -> tuple[str, int]:
    """Kills something while the process is at the stage: what ("" if it did not come), and the rows under way."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not reached(run, stage):
        if process.poll() is not None or time.monotonic() > deadline:
            return "", 0
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3) if stage in ("start", "write", "judge") else 0)
    try:
        driver = psutil.Process(process.pid)
        victim = next(victims(driver, stage, rng))
        names = " ".join([victim.name(), *victim.cmdline()])
        kind = "driver" if victim.pid == process.pid else next(one for one in (WORKER, ACTOR, NODE) if one in names)
        rows = under_way(run)
        victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return "", 0
    if kind in ("driver", NODE):
        try:
            process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit(f"the driver outlived its {kind} by {LIMIT_SECONDS} s") from None
    return kind, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("run_file", nargs="?", default="tests/toy/run.yaml")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    overrides = options.overrides or ["prompts.limit=60", "synthesis.shard_rows=40", "writer.num_actors=1"]
    command = [sys.executable, "-m", "cpt_ray", "synthesize", options.run_file, *overrides]
    rng, total, kinds, repeated = random.Random(options.seed), Counter[str](), Counter[str](), list[int]()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        start = time.monotonic()
        reference = Path(folder) / "reference"
        if started(command, reference).wait(LIMIT_SECONDS):
            raise SystemExit((Path(folder) / "reference.log").read_text())
        undisturbed = time.monotonic() - start
        print(f"undisturbed run: {undisturbed:.0f} s", flush=True)
        left, runs = options.kills, 0
        while left:
            run, runs = Path(folder) / f"run-{runs}", runs + 1
            stages = [stage for stage in options.stages for _ in range(1 + (left > len(options.stages)))]
            while True:
                process = started(command, run)
                while left and stages:
                    stage = stages.pop(0)
                    kind, rows = disturb(process, run, stage, rng)
                    if kind:
                        left -= 1
                        kinds[f"{kind} at {stage}"] += 1
                        repeated += [rows] if stage in INPUTS else []
                        print(f"kill -9 of the {kind} at {stage}, {rows} rows under way; {left} left", flush=True)
                    if process.poll() is not None:
                        break
                if process.wait(LIMIT_SECONDS) == 0:
                    break
                if not (left and stages) and process.returncode != -signal.SIGKILL:
                    print(f"ended with {process.returncode}; the same command again", flush=True)
            found = compare(reference, run)
            total += found
            print(f"run {runs}: {dict(found)}", flush=True)
    print("kills:", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    if repeated:
        mean = sum(repeated) / len(repeated)
        print(f"rows under way at a kill in {' or '.join(INPUTS)}: {mean:.0f} in the mean, {max(repeated)} at most")
    wrong = {key: total[key] for key in ("lost", "added", "duplicated", "differing")}
    print(f"{sum(kinds.values())} kills, {total['rows']} rows compared: {wrong}")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
