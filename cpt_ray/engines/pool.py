"""Steps over shards: Ray Data maps engine actors over the shards that are not done yet, or this process does them.

What travels through Ray Data is the *name* of a shard, one per block. The actor reads the shard, calls its
engine, writes the output shard and renames it into place, so whatever dies, only shards in flight are lost.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

from pydantic import SecretStr

from cpt_ray.config import JudgeConfig, ModelConfig, PriceConfig
from cpt_ray.console import progress
from cpt_ray.engines.engine import Completion, Engine, EngineDiedError, VllmEngine, check_schema_is_enforced, engine_env
from cpt_ray.engines.losses import REJECTED
from cpt_ray.errors import UserError, first_line
from cpt_ray.tables.rundir import RunDir, replacing

Counts = Mapping[str, float]
OpenEngine = Callable[[ModelConfig], Any]
"""Makes what a step's first argument is, where that is no `Engine`."""
MAX_DEATHS = 3
"""How often an engine's process may die on the same shard, or while starting, before the run gives up."""
SHARDS_IN_FLIGHT = 2
"""Shards an engine works on at a time: while one runs out, the next keeps it full."""
READER_THREAD, READER_SECONDS = "iter_threaded", 30.0
"""What Ray Data 2.60 calls its threads that read ahead, and how long one may take to end."""
APART = "apart: "
"""In front of a shard's counts that are not for the ledger."""
LIVE_SECONDS = 5.0
"""Between two writes of the ledger while a pool is at work."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage's work on one shard."""

    model: ModelConfig
    """The role whose engine it calls."""
    stage: str
    """Its name in the ledger."""
    table: str
    """Where the output shard goes."""

    def output(self, shard: str) -> str:
        """Name of the output shard: the input's, whose hash then covers all that the step depends on."""
        return shard

    def wait(self, run: RunDir) -> None:
        """Waits for what it needs of other shards: those of the pool's lines before its own, which begin earlier."""

    def __call__(self, engine: Any, run: RunDir, shard: str) -> None:
        """Reads the input shard, writes the output shard last; `engine` is what the pool's `open_engine` made."""
        raise NotImplementedError


@dataclass(frozen=True)
class Line:
    """Shards of one kind and the steps each of them goes through, in order."""

    shards: Sequence[str]
    steps: Sequence[Step]


class Worker:
    """An engine and the steps it can do; called by several threads."""

    def __init__(
        self,
        run: RunDir,
        model: ModelConfig,
        steps: Sequence[Sequence[Step]],
        open_engine: OpenEngine,
        name: str = "here",
        meter: Callable[[str, Counts], None] = lambda stage, counts: None,
    ):
        """Opens the engine; if that fails, the first shard that needs it has the error.

        Args:
            steps: by line.
            name: kept by the worker that takes the place of one whose process died.
            meter: called with the stage and the counts of each finished step.
        """
        self._steps, self._run, self._meter = steps, run, meter
        self._attempts = Attempts(run.attempts)
        self._turns, self._now, self._is_alone = threading.Condition(), 0, False
        start = f"start-{name}"
        self._error = ""
        try:
            self._attempts.begin(start, "while it started")
            self._engine = open_engine(model)
            if judges := [step.model for line in steps for step in line if needs_schema(step.model)]:
                check_schema_is_enforced(self._engine, f"judge {model.model}", judges[0].sampling.max_tokens)
            self._attempts.end(start)
        except Exception as error:
            self._error = _told(error)

    def bring(self, line: int, shard: str) -> tuple[str, Mapping[str, Counts]]:
        """Takes one shard through its line's steps; "" or what went wrong (`_told`), and what each stage did.

        Raises:
            EngineDiedError: counted; a new worker may try again.
        """
        done: dict[str, Counter[str]] = defaultdict(Counter)
        for step in self._steps[line]:
            output = step.output(shard)
            if not self._run.has(step.table, output):
                error = self._error or self._try(step, shard)
                if error:
                    return error, done
                counts = self._run.counts(step.table, output)
                done[step.stage].update(counts)  # a stage may come again, in another pass
                self._meter(step.stage, counts)
            shard = output
        return "", done

    def _try(self, step: Step, shard: str) -> str:
        name = f"{step.stage}-{shard}"
        try:
            step.wait(self._run)
            with self._turn(alone=bool(self._attempts.causes(name))):
                self._attempts.begin(name, f"on {step.stage} of shard {shard}")
                step(self._engine, self._run, shard)
                self._attempts.end(name)
        except EngineDiedError as died:
            self._attempts.note(name, _one_line(died))
            raise
        except Exception as failed:
            return _told(failed, f" ({step.stage} of shard {shard})")
        return ""

    @contextmanager
    def _turn(self, alone: bool) -> Iterator[None]:
        """Shards side by side, but one on which an engine died before by itself: so no other is taken for the cause."""
        with self._turns:
            self._turns.wait_for(lambda: not self._now or not (alone or self._is_alone))
            self._now, self._is_alone = self._now + 1, alone
        try:
            yield
        finally:
            with self._turns:
                self._now -= 1
                self._turns.notify_all()


class StepActor:
    """A worker made remote by Ray Data.

    A failure travels as a row: Ray Data would keep only the text of a stack trace. The death of a process, which Ray
    answers with a new one without end, is counted in files.
    """

    def __init__(self, run: RunDir, model: ModelConfig, steps: Sequence[Sequence[Step]], open_engine: OpenEngine):
        import ray

        name = ray.get_runtime_context().get_actor_id()
        self._worker = Worker(run, model, steps, open_engine, name, Meters().add)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            done = [
                self._worker.bring(int(line), str(shard))
                for line, shard in zip(batch["line"], batch["shard"], strict=True)
            ]
        except EngineDiedError:
            os._exit(1)  # Ray makes this actor, and so the engine, anew
        return {"error": [error for error, _ in done], "counts": [json.dumps(counts) for _, counts in done]}


class Attempts:
    """How often something was begun without an end: in files, since what it counts kills whoever could remember."""

    def __init__(self, folder: Path):
        self._folder = folder

    def begin(self, name: str, what: str) -> None:
        """Counts one attempt; UserError if there were too many."""
        causes = self.causes(name)
        if len(causes) >= MAX_DEATHS:
            raise UserError(f"the engine's process died {len(causes)} times {what} (the last time: {causes[-1]})")
        self._keep(name, [*causes, "killed, perhaps out of memory"])

    def causes(self, name: str) -> list[str]:
        """What each attempt so far died of."""
        path = self._folder / name
        return path.read_text().splitlines() if path.exists() else []

    def note(self, name: str, cause: str) -> None:
        """Puts a better-known cause on the present attempt."""
        self._keep(name, [*self.causes(name)[:-1], cause])

    def end(self, name: str) -> None:
        """It came to an end, good or bad."""
        (self._folder / name).unlink(missing_ok=True)

    def _keep(self, name: str, causes: Sequence[str]) -> None:
        with replacing(self._folder / name) as file:
            file.write("\n".join(causes).encode())


class Meters:
    """The ledger's counts as Prometheus metrics of the Ray cluster, by stage."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter as Meter

        self._rows = Meter("cpt_rows", "Rows that a stage was done with", tag_keys=("stage", "outcome"))
        self._tokens = Meter("cpt_tokens", "Tokens of a stage", tag_keys=("stage", "kind"))
        self._seconds = Meter("cpt_engine_seconds", "Seconds that shards were with an engine", tag_keys=("stage",))

    def add(self, stage: str, counts: Counts) -> None:
        """Adds one shard's counts."""
        for key, value in counts.items():
            if value <= 0:  # which a Prometheus counter refuses
                continue
            if key == "rows_out":
                self._rows.inc(value, {"stage": stage, "outcome": "kept"})
            elif key.startswith(REJECTED):
                self._rows.inc(value, {"stage": stage, "outcome": key})
            elif key.endswith("_tokens"):
                self._tokens.inc(value, {"stage": stage, "kind": key.removesuffix("_tokens")})
            elif key == "engine_seconds":
                self._seconds.inc(value, {"stage": stage})


def make_engine(model: ModelConfig, key: SecretStr | None) -> Engine:
    """The engine of a role; `key` is its endpoint's, if it has one."""
    if model.endpoint is None:
        return VllmEngine(model)
    from cpt_ray.engines.openai import OpenAIEngine

    assert key is not None
    return OpenAIEngine(model, key)


def endpoint_key(model: ModelConfig) -> SecretStr | None:
    """The key of a role's endpoint, from this process's environment; UserError if it is not there or can be none."""
    if model.endpoint is None:
        return None
    name = model.endpoint.api_key_env
    key = os.environ.get(name, "").strip()  # of a file's last newline, most often
    if not key:
        raise UserError(f"{model.model}: no key for {model.endpoint.base_url}; set the environment variable {name}")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"{model.model}: what is in the environment variable {name} cannot be a key (a space, a line break or a "
            "letter that is not ASCII is in it); set it anew"
        )
    return SecretStr(key)


def needs_schema(model: ModelConfig) -> bool:
    """Whether a role's engine must be able to force JSON of a schema."""
    return isinstance(model, JudgeConfig) and model.mode == "rationale"


def _one_line(error: BaseException) -> str:
    """The error in one line; the class's name in front unless it is one of ours."""
    return first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def _told(error: Exception, place: str = "") -> str:
    """The error in one line, with its place unless it is one of ours, which say what is wrong; then its trace."""
    return f"{_one_line(error)}{'' if isinstance(error, UserError) else place}\n{traceback.format_exc()}"


class Runner(Protocol):
    """Brings every shard of every line through its steps: `run_lines` on Ray, a `LocalRunner` in this process."""

    def __call__(self, run: RunDir, lines: Sequence[Line], open_engine: OpenEngine | None = None) -> None:
        """Does what is not there yet; UserError with the cause if a shard fails.

        Args:
            open_engine: where the steps' engine is not the one that their role's settings describe.
        """
        ...


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


def _run_pool(run: RunDir, lines: Sequence[Line], open_engine: OpenEngine | None, map_shards: MapShards) -> None:
    steps = [line.steps for line in lines]
    flat = {step.stage: step for line in steps for step in line}
    complete = {step.table: run.names(step.table) for step in flat.values()}
    todo = [
        {"line": at, "shard": shard}
        for at, line in enumerate(lines)
        for shard in line.shards
        if not _complete(complete, line.steps, shard)
    ]
    if not todo:
        return
    shutil.rmtree(run.attempts, ignore_errors=True)
    model = steps[0][0].model
    open_engine = open_engine or functools.partial(make_engine, key=endpoint_key(model))
    live = Live(run, {stage: step.model for stage, step in flat.items()})
    with progress("+".join(flat), len(todo), "shards") as advance:
        advance(0, f"starting {model.num_actors} x {model.model}")
        for counts in map_shards(run, model, steps, todo, open_engine):
            advance(1, live.add(counts))
    shutil.rmtree(run.attempts, ignore_errors=True)


class Live:
    """What this command has done so far: into ledger.json every few seconds, for `cpt status`, and beside the bar.

    The stage replaces it at its end by the sum over all its shards, whoever made them.
    """

    def __init__(self, run: RunDir, models: dict[str, ModelConfig]):
        self._run, self._models = run, models
        self._totals: dict[str, Counter[str]] = {stage: Counter() for stage in models}
        self._start = self._written = time.monotonic()

    def add(self, counts: Mapping[str, Counts]) -> str:
        """Adds what one shard came to; a note on the speed."""
        now = time.monotonic()
        for stage, more in counts.items():
            self._totals[stage].update(more)
        if now - self._written > LIVE_SECONDS:
            self._written = now
            for stage, total in self._totals.items():
                if total:
                    entry = _entry(total, self._models[stage].price)
                    self._run.add_to_ledger(stage, {**entry, "so far": "this command"})
        tokens = sum(total["generated_tokens"] for total in self._totals.values())
        return f"{tokens / (now - self._start):.0f} tokens/s" if tokens else ""


def _complete(done: dict[str, set[str]], steps: Sequence[Step], name: str) -> bool:
    for step in steps:
        name = step.output(name)
        if name not in done[step.table]:
            return False
    return True


@contextmanager
def _ended(rows: Any) -> Iterator[Any]:
    """Rows of Ray Data, whose threads are gone afterwards also where not all were read.

    One that meets a Ray which was shut down meanwhile ends the process, before it could say what was wrong.
    """
    try:
        yield rows
    finally:
        rows.close()
        for thread in threading.enumerate():
            if thread.name == READER_THREAD:
                thread.join(READER_SECONDS)


MapShards = Callable[
    [RunDir, ModelConfig, Sequence[Sequence[Step]], list[dict[str, Any]], OpenEngine], Iterator[Mapping[str, Counts]]
]
"""Brings the shards of one pool, {line, shard} each, through the steps of their lines.

Yields what each stage did, once per finished shard, in any order; UserError with the cause if one fails.
"""


def _raise_failure(model: ModelConfig, error: str) -> None:
    """UserError of what a worker says went wrong, if anything did."""
    line, _, trace = error.partition("\n")
    if line:
        raise UserError(f"{model.model}: {line}; what is finished is kept") from RuntimeError(trace)


def _map_here(
    run: RunDir,
    model: ModelConfig,
    steps: Sequence[Sequence[Step]],
    todo: list[dict[str, Any]],
    open_engine: OpenEngine,
) -> Iterator[Mapping[str, Counts]]:
    worker: Worker | None = None
    for item in todo:
        result: tuple[str, Mapping[str, Counts]] | None = None
        while result is None:
            worker = worker or Worker(run, model, steps, open_engine)
            try:
                result = worker.bring(**item)
            except EngineDiedError:
                worker = None
        error, counts = result
        _raise_failure(model, error)
        yield counts


def _map_on_ray(
    run: RunDir,
    model: ModelConfig,
    steps: Sequence[Sequence[Step]],
    todo: list[dict[str, Any]],
    open_engine: OpenEngine,
) -> Iterator[Mapping[str, Counts]]:
    import ray.data
    from ray.exceptions import RayError

    shards = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        StepActor,
        fn_constructor_args=(run, model, steps, open_engine),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(model.num_actors.least, len(todo)),
            max_size=min(model.num_actors.most, len(todo)),
            max_concurrent_calls_per_actor=SHARDS_IN_FLIGHT,
            max_tasks_in_flight_per_actor=2 * SHARDS_IN_FLIGHT,
            enable_true_multi_threading=True,
        ),
        num_cpus=model.num_cpus,
        num_gpus=model.num_gpus,
        runtime_env={"env_vars": engine_env(model)},
    )
    try:
        with _ended(iter(shards.iter_rows())) as rows:
            for row in rows:
                _raise_failure(model, row["error"])
                yield json.loads(row["counts"])
    except RayError as error:
        cause: BaseException = getattr(error, "cause", None) or error
        cause = cause.__cause__ or cause  # Ray Data wraps what an actor raises
        raise UserError(f"{model.model}: Ray gave up ({_one_line(cause)}); what is finished is kept") from error


# ---------------------------------------------------------------- counting


class Tally:
    """What one shard's work took: kept with the shard, summed into the ledger."""

    _lock = threading.Lock()
    _open: ClassVar[WeakSet[Tally]] = WeakSet()
    _shared_at = 0.0

    def __init__(self, rows_in: int):
        self.counts: Counter[str] = Counter({"rows_in": rows_in})
        self._seconds = 0.0
        with Tally._lock:
            Tally._share_time()
            Tally._open.add(self)

    @classmethod
    def _share_time(cls) -> None:
        """Time that several shards of this process spend together is split evenly between them."""
        now = time.monotonic()
        for one in cls._open:
            one._seconds += (now - cls._shared_at) / len(cls._open)
        cls._shared_at = now

    def add(self, completions: Sequence[Completion]) -> None:
        """Counts the tokens of what came back."""
        for one in completions:
            self.counts["prompt_tokens"] += one.num_prompt_tokens
            self.counts["cached_tokens"] += one.num_cached_tokens
            self.counts["generated_tokens"] += one.num_tokens
            if one.had_thoughts:
                self.counts["with_thoughts"] += 1
                self.counts["thought_tokens"] += one.thought_tokens

    def reject(self, reason: str) -> None:
        """Counts one row that is dropped."""
        self.counts[f"{REJECTED}{reason}"] += 1

    def close(self, rows_out: int) -> Counts:
        """The counts to write with the shard."""
        with Tally._lock:
            Tally._share_time()
            Tally._open.discard(self)
        return {**self.counts, "rows_out": rows_out, "engine_seconds": round(self._seconds, 3)}


def ledger_entry(run: RunDir, table: str, names: Iterable[str], price: PriceConfig | None = None) -> dict[str, Any]:
    """The sum over a stage's shards, whichever process made them."""
    total: Counter[str] = Counter()
    for name in names:
        total.update(run.counts(table, name))
    return _entry(total, price)


def thoughts_note(entry: Mapping[str, Any]) -> str:
    """What a stage's line says of answers that came with thoughts, if there were any."""
    if not entry.get("with_thoughts"):
        return ""
    thought, generated = entry.get("thought_tokens", 0), entry.get("generated_tokens", 0)
    share = f" ({thought / generated:.0%} of the tokens)" if thought and generated else ""
    return f"; {entry['with_thoughts']:.0f} came with thoughts, which were cut{share}"


def _entry(total: Counts, price: PriceConfig | None) -> dict[str, Any]:
    entry: dict[str, Any] = {key: value for key, value in total.items() if not key.startswith((REJECTED, APART))}
    entry["rejected"] = {
        key.removeprefix(REJECTED): int(value) for key, value in total.items() if key.startswith(REJECTED)
    }
    if entry.get("generated_tokens") and entry.get("engine_seconds"):
        entry["generated_tokens_per_second"] = round(entry["generated_tokens"] / entry["engine_seconds"], 1)
    if price and price != PriceConfig():
        entry["cost"] = round(_cost(total, price), 6)
    return entry


def _cost(total: Counts, price: PriceConfig) -> float:
    prompt, cached, generated, seconds = (
        total.get(key, 0) for key in ("prompt_tokens", "cached_tokens", "generated_tokens", "engine_seconds")
    )
    tokens = (prompt - cached) * price.prompt + cached * price.cached + generated * price.generated
    return tokens / 1e6 + seconds / 3600 * price.engine_hour
