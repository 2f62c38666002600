"""Plan, write, judge, pair and card of 10 thousand to a million units, with an engine that answers by a function.

python jobs/benchmarks/scale.py --units 10000 --folder /tmp/scale
python jobs/benchmarks/scale.py --units 10000 --folder /tmp/scale-ray --ray --shard-rows 40

What is measured is everything but a model: time and memory of the driver, files and bytes. Without --ray the shards are
worked on in the driver's process (`LocalRunner`), so that its memory is that of a worker too. After the run the same
command is given again twice: with nothing to do, and with one shard of a hundred of each stage removed (from `grades`
and `pairs`; a pair's shard is removed where what it was made of was). The folder is kept, so that a run that --seconds
stopped goes on with the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cpt_ray.cluster import connected
from cpt_ray.config import load_config
from cpt_ray.engines.engine import Completion, FakeEngine, Request
from cpt_ray.engines.pool import LocalRunner, run_lines
from cpt_ray.engines.step import Runner
from cpt_ray.plan import make_plan
from cpt_ray.synthesis.stage import synthesize
from cpt_ray.tables.rundir import CARD_FILE, RunDir

LEVELS = ("low", "mid", "high")
RUBRICS = ("ornament", "warmth", "pace")
HELD_OUT = 0.05
WORDS = tuple(
    f"{first}{second}" for first in ("ba", "ce", "di", "fo", "gu", "ha", "ki") for second in ("lo", "ner", "t")
)
ANSWER_WORDS = 60
TABLES = ("units", "generations", "grades", "pairs", "rejects")


# ---------------------------------------------------------------- the run


def write_inputs(folder: Path, units: int, shard_rows: int) -> Path:
    """Run file, rubrics and prompts of about so many units in the first pass."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUBRICS:
        levels = [
            {"name": level, "score": score, "directives": [f"{way} {mood} things." for way in ("Say", "Write", "Tell")]}
            for level, score, mood in zip(LEVELS, (10, 50, 90), ("plain", "fair", "grand"), strict=True)
        ]
        descriptors = {level: f"{level} {name}" for level in LEVELS}
        rubric = {"id": name, "version": 1, "title": name.title(), "objective": f"How much {name}."}
        rubric |= {"principles": ["Look at the words."], "levels": levels}
        rubric |= {"criteria": [{"name": name, "weight": 100, "descriptors": descriptors}]}
        (folder / f"{name}.yaml").write_text(json.dumps(rubric), encoding="utf-8")
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for at in range(round(units / (len(RUBRICS) * len(LEVELS)) / (1 - HELD_OUT))):
            file.write(json.dumps({"prompt": f"Write {text_of(f'prompt {at}', 12)} about thing number {at}."}) + "\n")
    model = {"model": "fake", "num_actors": 2, "engine": {"dtype": "float32"}, "sampling": {"max_tokens": 200}}
    run_file = {
        "name": "scale",
        "run_dir": str(folder / "run"),
        "rubrics": [str(folder / f"{name}.yaml") for name in RUBRICS],
        "prompts": {"source": str(folder / "prompts.jsonl"), "held_out": HELD_OUT},
        "synthesis": {"shard_rows": shard_rows},
        "writer": model,
        "policy": model,
    }
    (folder / "run.yaml").write_text(json.dumps(run_file), encoding="utf-8")
    return folder / "run.yaml"


def text_of(seed: str, count: int) -> str:
    """So many words, by hash."""
    digest = hashlib.shake_128(seed.encode()).digest(count)
    return " ".join(WORDS[byte % len(WORDS)] for byte in digest)


def answer(request: Request) -> Completion:
    """Writes the level that it is asked for in front of some words; judges by the level it finds."""
    asked = request.messages[-1]["content"]
    if request.labels:
        found = next(at for at, level in enumerate(LEVELS) if f"Answer:\n{level} " in asked)
        logprobs = tuple(-0.05 if at == found else -4.0 for at in range(len(LEVELS)))
        return Completion(label_logprobs=logprobs, num_prompt_tokens=len(asked) // 4, num_tokens=1)
    level = next(level for level in LEVELS if f" of 3, {level} (" in asked)
    return Completion(
        text=f"{level} {text_of(f'{request.seed}', ANSWER_WORDS)}.",
        num_prompt_tokens=len(asked) // 4,
        num_tokens=2 * ANSWER_WORDS,
    )


def fake_engine(_model: Any) -> FakeEngine:
    """The engine of every role."""
    return FakeEngine(answer)


@contextlib.contextmanager
def runner(on_ray: bool, log: Path) -> Iterator[Runner]:
    """What takes the shards through their steps."""
    if not on_ray:
        yield LocalRunner(fake_engine)
        return
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors have another main module than this process
    with connected(verbose=False, log=log):
        yield lambda run, lines, open_engine=None: run_lines(run, lines, open_engine or fake_engine)


# ---------------------------------------------------------------- measuring


class Usage:
    """This process's resident set in MiB and its CPU seconds, every 50 ms."""

    def __init__(self) -> None:
        self._seen = [(time.time(), 0, time.process_time())]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        page = resource.getpagesize()
        while True:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self._seen.append((time.time(), pages * page >> 20, time.process_time()))
            time.sleep(0.05)

    def between(self, start: float, end: float) -> tuple[int, float]:
        """(highest MiB, CPU seconds) between two times."""
        seen = list(self._seen)
        before = max((seconds for when, _, seconds in seen if when <= start), default=0.0)
        return (
            max((size for when, size, _ in seen if start <= when <= end), default=0),
            max((seconds for when, _, seconds in seen if when <= end), default=before) - before,
        )


PARTS = {"plan": "units", "write and judge": "grades", "pair": "pairs"}
"""What is timed, by the table that it fills last."""


def files_of(run: RunDir, table: str) -> list[Path]:
    """A table's shards, in a folder of this machine."""
    return [Path(str(path)) for path in run.table(table).glob("*.parquet")]


@dataclass
class Clock:
    """When each part of a command ended, read off the files, so that nothing has to be built into the stages."""

    run: RunDir
    usage: Usage
    start: float

    def results(self, planned: float, end: float) -> dict[str, Any]:
        """Of the command so far: seconds, peak MiB; of each part (seconds, peak MiB, CPU seconds, new rows)."""
        written = [path.stat().st_mtime for path in files_of(self.run, "generations")]
        first = min((when for when in written if when >= self.start), default=end)
        parts, last = {"read": (planned - self.start, *self.usage.between(self.start, planned), 0)}, planned
        for part, table in PARTS.items():
            new = [path for path in files_of(self.run, table) if path.stat().st_mtime >= self.start]
            if part == "plan":  # later passes plan as well
                new = [path for path in new if path.stat().st_mtime <= first]
            until = max([last, *(path.stat().st_mtime for path in new)])
            rows = sum(pq.read_metadata(path).num_rows for path in new)
            parts[part] = (until - last, *self.usage.between(last, until), rows)
            last = until
        parts["ledger and card"] = (end - last, *self.usage.between(last, end), 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        return {"parts": parts, "seconds": end - self.start, "first_row": first - self.start, "peak": peak}


def one_run(run_file: Path, on_ray: bool, limit: float, results: Any) -> None:
    """One command, in a process of its own, which ends it after `limit` seconds."""
    clock = Clock(RunDir(run_file.parent / "run"), Usage(), time.time())
    plan = make_plan(load_config(run_file))
    planned = time.time()

    def stop() -> None:
        results.update(clock.results(planned, time.time()), stopped=True)
        os._exit(0)

    timer = threading.Timer(limit, stop)
    timer.daemon = True
    timer.start()
    with clock.run.locked(), runner(on_ray, Path(str(clock.run.ray_log))) as take:
        synthesize(plan, clock.run, take)
        end = time.time()
    timer.cancel()
    results.update(clock.results(planned, end), stopped=False)


def measured(run_file: Path, on_ray: bool, limit: float) -> Mapping[str, Any]:
    """What `one_run` measured, in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        process = context.Process(target=one_run, args=(run_file, on_ray, limit, results))
        process.start()
        process.join()
        if process.exitcode or not results:
            raise SystemExit(process.exitcode or 1)
        return dict(results)


def remove_one_of_a_hundred(run: RunDir) -> int:
    """Removes shards as a run that was stopped at 99% lacks them; returns how many files."""
    gone = 0
    for table in ("generations", "grades", "pairs"):
        for path in sorted(files_of(run, table))[::100]:
            path.unlink()
            gone += 1
    return gone


def report(title: str, results: Mapping[str, Any]) -> None:
    stopped = ", stopped" if results["stopped"] else ""
    print(f"{title}: {results['seconds']:.1f} s{stopped}, peak {results['peak']} MiB, first row after "
          f"{results['first_row']:.1f} s")  # fmt: skip
    for part, (seconds, peak, cpu, rows) in results["parts"].items():
        rate = f", {rows:,} rows, {rows / cpu:,.0f} per CPU second" if rows and cpu else ""
        print(f"  {part:<16} {seconds:6.1f} s, {cpu:6.1f} s of CPU, peak {peak} MiB{rate}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shard-rows", type=int, default=1024)
    parser.add_argument("--ray", action="store_true", help="on a cluster of this machine, with two actors")
    parser.add_argument(
        "--seconds", type=float, default=230, help="after which a run is stopped; the next call goes on"
    )
    options = parser.parse_args()
    run_file = options.folder / "run.yaml"
    if not run_file.exists():
        write_inputs(options.folder, options.units, options.shard_rows)
    run = RunDir(options.folder / "run")
    take = functools.partial(measured, run_file, options.ray, options.seconds)
    if not (run.path / CARD_FILE).exists():
        results = take()
        report("first run", results)
        if results["stopped"]:
            raise SystemExit("the same command goes on")
    report("nothing to do", take())
    gone = remove_one_of_a_hundred(run)
    report(f"99% done ({gone} files removed)", take())
    for table in TABLES:
        sizes = [path.stat().st_size for path in files_of(run, table)]
        print(f"  {table}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
