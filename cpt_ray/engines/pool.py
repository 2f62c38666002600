"""Steps over shards: Ray Data maps engine actors over the shards that are not done yet, or this process does them.

Ray Data carries only the *names* of shards, one per block. The actor reads the shard, calls its engine, writes the
output shard and renames it into place, so that a crash loses only the shards in flight.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from cpt_ray.capacity import actor_options, node_types
from cpt_ray.config import ModelConfig
from cpt_ray.console import progress
from cpt_ray.engines.backup import BackupActors
from cpt_ray.engines.engine import EngineDiedError
from cpt_ray.engines.ledger import LiveLedger
from cpt_ray.engines.step import Counts, Line, OpenEngine, Step
from cpt_ray.engines.vllm import engine_env
from cpt_ray.engines.waiting import Waiting, explained
from cpt_ray.engines.worker import (
    SHARDS_IN_FLIGHT,
    SHARDS_IN_HAND,
    Job,
    StepActor,
    Worker,
    endpoint_key,
    make_engine,
)
from cpt_ray.errors import UserError
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.store_path import remove_tree

READER_THREAD, READER_SECONDS = "iter_threaded", 30.0
"""What Ray Data 2.60 calls its threads that read ahead, and how long one may take to end."""


def run_lines(run: RunDir, lines: Sequence[Line], open_engine: OpenEngine | None = None) -> None:
    """The runner on Ray: a pool of actors for all steps that can share an engine.

    A pool's actors, and their GPUs, are gone before the next pool's start.
    """
    _run_pools(run, lines, open_engine, _map_on_ray)


@dataclass(frozen=True)
class LocalRunner:
    """The runner in this process, without Ray: one engine at a time, one shard after the other.

    An engine that died is opened anew, as often as Ray would make a new actor.
    """

    open_engine: OpenEngine
    """Makes the engine of a role; for a real one, `engine_env` must be in this process's environment before."""

    def __call__(self, run: RunDir, lines: Sequence[Line], open_engine: OpenEngine | None = None) -> None:
        """As `run_lines`."""
        _run_pools(run, lines, open_engine or self.open_engine, _map_here)


def _run_pools(run: RunDir, lines: Sequence[Line], open_engine: OpenEngine | None, map_shards: MapShards) -> None:
    left = [line for line in lines if line.steps and line.shards]
    while left:
        key = left[0].steps[0].model.engine_key
        now = [Line(line.shards, _leading(line.steps, key)) for line in left]
        _run_pool(run, now, open_engine, map_shards)
        left = [
            Line([[shard, *(name for _, name in done.outputs(shard))][-1] for shard in line.shards], steps)
            for line, done in zip(left, now, strict=True)
            if (steps := line.steps[len(done.steps) :])
        ]


def _leading(steps: Sequence[Step], engine_key: str) -> Sequence[Step]:
    return list(itertools.takewhile(lambda step: step.model.engine_key == engine_key, steps))


def _run_pool(run: RunDir, lines: Sequence[Line], open_engine: OpenEngine | None, map_shards: MapShards) -> None:
    steps = {step.stage: step for line in lines for step in line.steps}
    complete = {step.table: run.names(step.table) for step in steps.values()}
    todo = [
        {"line": at, "shard": shard}
        for at, line in enumerate(lines)
        for shard in line.shards
        if not all(name in complete[step.table] for step, name in line.outputs(shard))
    ]
    if not todo:
        return
    remove_tree(run.attempts)
    model = lines[0].steps[0].model
    open_engine = open_engine or functools.partial(make_engine, key=endpoint_key(model))
    job = Job(run, model, [line.steps for line in lines], open_engine)
    live = LiveLedger(run, {stage: step.model for stage, step in steps.items()})
    with progress("+".join(steps), len(todo), "shards") as advance:
        advance(0, f"starting {model.num_actors} x {model.model}")
        for counts in map_shards(job, todo):
            advance(1, live.add(counts))
    remove_tree(run.attempts)


@contextmanager
def _ended(rows: Any) -> Iterator[Any]:
    """Rows of Ray Data, whose reader threads have ended afterwards, even if not all rows were read.

    A reader thread that outlives `ray.shutdown` aborts the process before the error is shown.
    """
    try:
        yield rows
    finally:
        rows.close()
        for thread in threading.enumerate():
            if thread.name == READER_THREAD:
                thread.join(READER_SECONDS)


MapShards = Callable[[Job, list[dict[str, Any]]], Iterator[Mapping[str, Counts]]]
"""Brings the shards of one pool, {line, shard} each, through the steps of their lines.

Yields what each stage did, once per finished shard, in any order; UserError with the cause if one fails.
"""


def _raise_failure(model: ModelConfig, error: str) -> None:
    """UserError with a worker's description of its failure, if it has one."""
    line, _, trace = error.partition("\n")
    if line:
        raise UserError(f"{model.model}: {line}; what is finished is kept") from RuntimeError(trace)


def _map_here(job: Job, todo: list[dict[str, Any]]) -> Iterator[Mapping[str, Counts]]:
    worker: Worker | None = None
    for item in todo:
        result: tuple[str, Mapping[str, Counts]] | None = None
        while result is None:
            worker = worker or Worker(job)
            try:
                result = worker.process(**item)
            except EngineDiedError:
                worker = None
        error, counts = result
        _raise_failure(job.model, error)
        yield counts


class _Pool:
    """Actors of one kind: Ray Data's own, and those that are opened besides."""

    def __init__(self, job: Job, size: int, each: Mapping[str, float], check: Callable[[], None]):
        """
        Args:
            size: actors of Ray Data. each: resources of an actor.
            check: called several times a second, but not while Ray Data waits for something that starts; what it raises
                ends the pool.
        """
        self._job, self._size, self._check = job, size, check
        self._options = {**actor_options(each), "runtime_env": {"env_vars": engine_env(job.model)}}
        self._executors: list[Any] = []

    def results(self, todo: list[dict[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """A batch of one row, as `StepActor` returns it, for each shard that is finished."""
        import ray.data
        from ray.data._internal.execution.execution_callback import ExecutionCallback  # 2.60: test_contracts.py

        pool = self

        class Seen(ExecutionCallback):  # type: ignore[misc]
            """Of an execution."""

            def before_execution_starts(self, executor: object) -> None:
                """What can be stopped."""
                pool._executors.append(executor)

            def on_execution_step(self, executor: object) -> None:
                """See `check`."""
                pool._check()

        shards = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            StepActor,
            fn_constructor_args=(self._job,),
            batch_size=1,
            # all at once, so that their nodes start together; those that never get one cost nothing
            compute=ray.data.ActorPoolStrategy(
                size=self._size,
                max_concurrent_calls_per_actor=SHARDS_IN_FLIGHT,
                max_tasks_in_flight_per_actor=SHARDS_IN_HAND,
                enable_true_multi_threading=True,
            ),
            **self._options,
        )
        shards.context.execution_no_progress_timeout_s = -1  # `Waiting` knows what is pending
        shards.context.custom_execution_callback_classes = [Seen]
        # without prefetching, which would keep a finished row until the next one is there
        return iter(shards.iter_batches(batch_size=1, prefetch_batches=0))

    def open_backup(self) -> Any:
        """One more actor."""
        import ray

        options = {**self._options, "max_concurrency": SHARDS_IN_FLIGHT, "scheduling_strategy": "SPREAD"}
        return ray.remote(StepActor).options(**options).remote(replace(self._job, is_backup=True))

    def stop(self) -> None:
        """Ends Ray Data's actors at once; without force, one keeps its GPU until all that it has in hand is done."""
        for executor in self._executors:
            executor.shutdown(force=True)


def _map_on_ray(job: Job, todo: list[dict[str, Any]]) -> Iterator[Mapping[str, Counts]]:
    model, stages = job.model, "+".join(dict.fromkeys(step.stage for line in job.steps for step in line))
    types, least, remedy = node_types(), min(model.num_actors.least, len(todo)), _remedy(model)
    types.check(f"{stages} ({model.model})", model.actor_resources, least, remedy)
    each = types.placed(model.actor_resources, least)
    size = _pool_size(model, types.room(each), len(todo))
    waiting = Waiting(stages, each, size, remedy, types=types)
    pool = _Pool(replace(job, pulse=waiting.pulse), size, each, waiting.check)
    backup = BackupActors(stages, todo, size, pool.open_backup, pool.stop)
    num_done = 0
    try:
        # where the engine is elsewhere, no node makes it slow
        helped = backup.watched() if model.endpoint is None else nullcontext()
        looking = waiting.watched(lambda: (num_done, backup.num_done))
        with looking, helped, _ended(pool.results(todo)) as batches:
            for batch in batches:
                row = {name: values[0] for name, values in batch.items()}
                of_backup = backup.finish(row)
                if of_backup is None:
                    _raise_failure(model, row["error"])
                num_done += 1
                yield {**(of_backup or {}), **json.loads(row["counts"])}
    except UserError:
        raise
    except Exception as error:  # of any kind: what Ray and Ray Data raise has no class in common
        if not backup.are_all_done:
            raise UserError(f"{stages} ({model.model}): {explained(error)}; what is finished is kept") from error
    finally:
        waiting.close()
    yield from backup.rest()


def _pool_size(model: ModelConfig, room: float, num_shards: int) -> int:
    """Actors to ask for: as many as the shards keep busy and the cluster can have, within `num_actors`."""
    least, most = model.num_actors
    return int(max(min(least, num_shards), min(most, math.ceil(num_shards / SHARDS_IN_FLIGHT), room)))


def _remedy(model: ModelConfig) -> str:
    return f"lower num_actors, num_cpus or num_gpus of {model.model}"
