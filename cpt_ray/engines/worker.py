"""An engine with the steps that it can do, in this process or a Ray actor; and how often its process may die."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from cpt_ray.config import JudgeConfig, ModelConfig
from cpt_ray.engines.engine import Engine, EngineDiedError, check_schema_is_enforced
from cpt_ray.engines.ledger import Meters, Tally
from cpt_ray.engines.step import Counts, OpenEngine, Step
from cpt_ray.engines.vllm import VllmEngine
from cpt_ray.engines.waiting import AT_WORK, STARTING, Pulse
from cpt_ray.errors import UserError, first_line
from cpt_ray.tables.files import replacing
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.store_path import AnyPath

SHARDS_IN_FLIGHT = 2
"""Shards an engine works on at a time: while one runs out, the next keeps it full."""
SHARDS_IN_HAND = 2 * SHARDS_IN_FLIGHT
"""Shards that an actor on Ray is given at a time, with those that it works on."""
MAX_DEATHS = 3
"""How often an engine's process may die on the same shard, or while starting, before the run gives up."""


@dataclass(frozen=True)
class Job:
    """What every worker of a pool is given."""

    run: RunDir
    model: ModelConfig
    steps: Sequence[Sequence[Step]]
    """By line."""
    open_engine: OpenEngine
    pulse: Pulse | None = None
    """Where remote workers say that they get on."""
    is_backup: bool = False
    """Whether others are perhaps at the same shards."""


class Worker:
    """An engine and the steps it can do; called by several threads."""

    def __init__(self, job: Job, name: str = "here", meter: Callable[[str, Counts], None] = lambda stage, counts: None):
        """Opens the engine; if that fails, the first shard that needs it has the error.

        Args:
            name: kept by the worker that takes the place of one whose process died.
            meter: called with the stage and the counts of each finished step.
        """
        self._steps, self._run, self._meter = job.steps, job.run, meter
        # what another has begun is no death of this one's
        self._attempts = Attempts(job.run.attempts / "backup" if job.is_backup else job.run.attempts)
        self._turns, self._num_running, self._is_alone = threading.Condition(), 0, False
        start = f"start-{name}"
        self._error = ""
        try:
            self._attempts.begin(start, "while it started")
            self._engine = job.open_engine(job.model)
            if judges := [step.model for line in job.steps for step in line if needs_schema(step.model)]:
                check_schema_is_enforced(self._engine, f"judge {job.model.model}", judges[0].sampling.max_tokens)
            self._attempts.end(start)
        except Exception as error:  # of any kind: Ray would start an actor that failed here again, without end
            self._error = _described(error)

    def process(self, line: int, shard: str) -> tuple[str, Mapping[str, Counts]]:
        """Takes one shard through its line's steps. Returns the error ("" if there is none) and each stage's counts.

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
                if self._run.has(step.table, step.output(shard)):  # made by another while this one waited
                    return ""
                self._attempts.begin(name, f"on {step.stage} of shard {shard}")
                step(self._engine, self._run, shard)
                self._attempts.end(name)
        except EngineDiedError as died:
            self._attempts.note(name, one_line(died))
            raise
        except Exception as failed:  # of any kind: the caller ends the run with it, on Ray or here
            return _described(failed, f" ({step.stage} of shard {shard})")
        finally:
            Tally.abandon()
        return ""

    @contextmanager
    def _turn(self, alone: bool) -> Iterator[None]:
        """Runs shards side by side, but a shard on which an engine died alone, so that the cause is certain."""
        with self._turns:
            self._turns.wait_for(lambda: not self._num_running or not (alone or self._is_alone))
            self._num_running, self._is_alone = self._num_running + 1, alone
        try:
            yield
        finally:
            with self._turns:
                self._num_running -= 1
                self._turns.notify_all()


class StepActor:
    """A worker made remote by Ray Data.

    A failure is returned as a row, because Ray Data would keep only the text of a stack trace. Deaths of the process
    are counted in files, because Ray would start a new one each time, without end.
    """

    def __init__(self, job: Job):
        import ray

        name = ray.get_runtime_context().get_actor_id()
        beats = job.pulse.start(name, STARTING) if job.pulse else None
        self._worker = Worker(job, name, Meters().add)
        if beats:
            beats.at(AT_WORK)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            error, counts = self._worker.process(int(batch["line"][0]), str(batch["shard"][0]))
        except EngineDiedError:
            os._exit(1)  # Ray makes this actor, and so the engine, anew
        return {**batch, "error": [error], "counts": [json.dumps(counts)]}


class Attempts:
    """Counts attempts that did not finish.

    Kept in files, because the crash being counted also kills the process that could remember it.
    """

    def __init__(self, folder: AnyPath):
        self._folder = folder

    def begin(self, name: str, what: str) -> None:
        """Counts one attempt; UserError if there were too many."""
        causes = self.causes(name)
        if len(causes) >= MAX_DEATHS:
            raise UserError(f"the engine's process died {len(causes)} times {what} (the last time: {causes[-1]})")
        self._keep(name, [*causes, "killed, perhaps out of memory"])

    def causes(self, name: str) -> list[str]:
        """The cause of death of each attempt so far."""
        path = self._folder / name
        return path.read_text().splitlines() if path.exists() else []

    def note(self, name: str, cause: str) -> None:
        """Replaces the assumed cause of the present attempt by a known one."""
        self._keep(name, [*self.causes(name)[:-1], cause])

    def end(self, name: str) -> None:
        """Forgets the attempts: the work was finished."""
        (self._folder / name).unlink(missing_ok=True)

    def _keep(self, name: str, causes: Sequence[str]) -> None:
        with replacing(self._folder / name) as file:
            file.write("\n".join(causes).encode())


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
    key = os.environ.get(name, "").strip()  # a key read from a file often ends with a newline
    if not key:
        raise UserError(f"{model.model}: no key for {model.endpoint.base_url}; set the environment variable {name}")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"{model.model}: what is in the environment variable {name} cannot be a key (a space, a line break or a "
            "letter that is not ASCII is in it); set it anew"
        )
    return SecretStr(key)


def needs_schema(model: ModelConfig) -> bool:
    """Whether a role needs an engine that enforces a JSON schema."""
    return isinstance(model, JudgeConfig) and model.mode == "rationale"


def one_line(error: BaseException) -> str:
    """The error in one line; the class's name in front unless it is one of ours."""
    return first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def _described(error: Exception, place: str = "") -> str:
    """One line, then the stack trace; the place is added to errors that are not ours, which do not name it."""
    return f"{one_line(error)}{'' if isinstance(error, UserError) else place}\n{traceback.format_exc()}"
