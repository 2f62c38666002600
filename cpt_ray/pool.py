"""Steps over shards: Ray Data maps engine actors over the shards that are not done yet.

What travels through Ray Data is the *name* of a shard, one per block. The actor reads the shard, calls its
engine, writes the output shard and renames it into place, so whatever dies, only shards in flight are lost.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cpt_ray.config import ModelConfig
from cpt_ray.console import progress
from cpt_ray.engine import Completion, Engine, VllmEngine, engine_env
from cpt_ray.errors import UserError
from cpt_ray.rundir import RunDir

Counts = dict[str, float]
OpenEngine = Callable[[ModelConfig], Any]
"""Makes what a step's first argument is: an `Engine` unless said otherwise."""


class Step(Protocol):
    """One stage's work on one shard."""

    @property
    def stage(self) -> str:
        """Its name in the ledger."""
        ...

    @property
    def table(self) -> str:
        """Where the output shard goes."""
        ...

    @property
    def model(self) -> ModelConfig:
        """The role whose engine it calls."""
        ...

    def output(self, shard: str) -> str:
        """Name of the output shard for an input shard's name."""
        ...

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Reads the input shard, writes the output shard last."""
        ...


@dataclass(frozen=True)
class Line:
    """Shards of one kind and the steps each of them goes through, in order."""

    shards: Sequence[str]
    steps: Sequence[Step]


class StepActor:
    """An engine and the steps it can do; made remote by Ray Data.

    A failure travels as a row: Ray Data would keep only the text of a stack trace, and try again for ever.
    """

    def __init__(self, run: RunDir, model: ModelConfig, steps: Sequence[Sequence[Step]], open_engine: OpenEngine):
        self._run, self._steps, self._error = run, steps, ""
        try:
            self._engine = open_engine(model)
        except Exception as error:
            self._error = _one_line(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        errors = [self._bring(int(line), str(shard)) for line, shard in zip(batch["line"], batch["shard"], strict=True)]
        return {"error": errors}

    def _bring(self, line: int, shard: str) -> str:
        """Takes one shard through this actor's steps; "" or what went wrong."""
        if self._error:
            return self._error
        try:
            for step in self._steps[line]:
                output = step.output(shard)
                if not self._run.has(step.table, output):
                    step(self._engine, self._run, shard)
                shard = output
        except Exception as error:
            return _one_line(error)
        return ""


def _one_line(error: Exception) -> str:
    """The error in one line; the class's name in front unless it is one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError):
        return lines[0]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:300]}"


def run_lines(run: RunDir, lines: Sequence[Line], open_engine: OpenEngine = VllmEngine) -> None:
    """Brings every shard of every line through its steps; steps that can share an engine share one pool.

    A pool's actors, and their GPUs, are gone before the next pool's start.
    """
    left = [line for line in lines if line.steps]
    while left:
        key = left[0].steps[0].model.engine_key
        now = [Line(line.shards, _leading(line.steps, key)) for line in left]
        _run_pool(run, now, open_engine)
        left = [
            Line([_final_name(done.steps, shard) for shard in line.shards], line.steps[len(done.steps) :])
            for line, done in zip(left, now, strict=True)
            if len(done.steps) < len(line.steps)
        ]


def _leading(steps: Sequence[Step], engine_key: str) -> Sequence[Step]:
    return list(itertools.takewhile(lambda step: step.model.engine_key == engine_key, steps))


def _final_name(steps: Sequence[Step], shard: str) -> str:
    for step in steps:
        shard = step.output(shard)
    return shard


def _run_pool(run: RunDir, lines: Sequence[Line], open_engine: OpenEngine) -> None:
    todo = [
        {"line": at, "shard": shard}
        for at, line in enumerate(lines)
        for shard in line.shards
        if not _complete(run, line.steps, shard)
    ]
    if not todo:
        return
    steps = [line.steps for line in lines]
    model = steps[0][0].model
    total = len(todo)
    title = "+".join(dict.fromkeys(step.stage for line in steps for step in line))
    with progress(title, total, "shards") as advance:
        advance(0, f"starting {_pool_text(model)}")
        for _ in _map_shards(run, model, steps, todo, open_engine):
            advance(1, "")


def _complete(run: RunDir, steps: Sequence[Step], name: str) -> bool:
    for step in steps:
        name = step.output(name)
        if not run.has(step.table, name):
            return False
    return True


def _pool_text(model: ModelConfig) -> str:
    count = model.num_actors if isinstance(model.num_actors, int) else f"{model.num_actors[0]}-{model.num_actors[1]}"
    return f"{count} x {model.model}"


def _map_shards(
    run: RunDir,
    model: ModelConfig,
    steps: Sequence[Sequence[Step]],
    todo: list[dict[str, Any]],
    open_engine: OpenEngine,
) -> Iterable[Any]:
    """Yields once per finished shard; UserError with the cause if one fails."""
    import ray.data

    size = model.num_actors if isinstance(model.num_actors, tuple) else (model.num_actors, model.num_actors)
    size = (min(size[0], len(todo)), min(size[1], len(todo)))
    shards = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        StepActor,
        fn_constructor_args=(run, model, steps, open_engine),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=size[0], max_size=size[1]),
        num_cpus=model.num_cpus,
        num_gpus=model.num_gpus,
        runtime_env={"env_vars": engine_env(model)},
    )
    for row in shards.iter_rows():
        if row["error"]:
            raise UserError(f"{model.model}: {row['error']}")
        yield row


# ---------------------------------------------------------------- counting


class Tally:
    """What one shard's work took: kept with the shard, summed into the ledger."""

    def __init__(self, rows_in: int):
        self.counts: Counter[str] = Counter({"rows_in": rows_in})
        self._start = time.monotonic()

    def add(self, completions: Sequence[Completion]) -> None:
        """Counts the tokens of what came back."""
        for one in completions:
            self.counts["prompt_tokens"] += one.num_prompt_tokens
            self.counts["cached_tokens"] += one.num_cached_tokens
            self.counts["generated_tokens"] += one.num_tokens

    def reject(self, reason: str) -> None:
        """Counts one row that is dropped."""
        self.counts[f"rejected: {reason}"] += 1

    def close(self, rows_out: int) -> Counts:
        """The counts to write with the shard."""
        seconds = round(time.monotonic() - self._start, 3)
        return {**self.counts, "rows_out": rows_out, "engine_seconds": seconds}


def ledger_entry(run: RunDir, table: str, names: Sequence[str]) -> dict[str, Any]:
    """The sum over a stage's shards, whichever process made them."""
    total: Counter[str] = Counter()
    for name in names:
        total.update(run.counts(table, name))
    entry: dict[str, Any] = {key: value for key, value in total.items() if not key.startswith("rejected: ")}
    entry["rejected"] = {
        key.removeprefix("rejected: "): int(value) for key, value in total.items() if key.startswith("rejected: ")
    }
    if entry.get("generated_tokens") and entry.get("engine_seconds"):
        entry["generated_tokens_per_second"] = round(entry["generated_tokens"] / entry["engine_seconds"], 1)
    return entry
