"""Waiting for nodes, engines and shards: what is pending is said, and where nothing is, the wait ends.

Also the one home of what Ray's libraries raise, in words.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from cpt_ray.capacity import NodeTypes, growth, shown_resources
from cpt_ray.cluster import leave_note, patience_minutes, read_notes, remove_notes
from cpt_ray.console import say
from cpt_ray.errors import UserError, first_line

LINE_SECONDS = 30.0
"""Between two lines on what is waited for."""
WATCH_SECONDS = 0.5
"""Between two calls of `look` by a thread of its own."""
LOOK_SECONDS = 5.0
"""Between two looks at the cluster."""
LAUNCHING_TIMES = 3
"""Times the patience that launching nodes are waited for without any progress: of a pod that no machine can take, the
autoscaler says for ever that it is launching."""
LAST_LOOK_SECONDS = 10.0
"""How long a look that has begun may take to end: Ray, which it asks, must not be shut down meanwhile."""
STUCK_SECONDS = 10.0
"""How long the block of `watched` may go on after its error, before it is interrupted."""
STARTING, AT_WORK = "starting", "at work"
"""Phases of an actor that has begun."""
BEAT_SECONDS = 10.0
"""Between two looks of an actor at itself."""
BUSY_SHARE, BUSY_BYTES = 0.05, 1 << 20
"""Of a CPU, or read and written, between two looks: an actor that uses as much is getting on (it downloads, loads,
compiles or answers). What hangs uses less."""


# ---------------------------------------------------------------- in an actor


@dataclass(frozen=True)
class Pulse:
    """Where the actors of a pool or worker group say that they get on, and at what; its driver reads it."""

    key: str = field(default_factory=lambda: f"{uuid.uuid4().hex}/")
    seconds: float = BEAT_SECONDS

    def start(self, name: str, phase: str) -> Beats:
        """Of this process, until it ends."""
        return Beats(self, name, phase)


_answers = Counter[str]()


def count_answer() -> None:
    """Counts an answer from elsewhere: an engine that waits for a server uses nothing that could be seen."""
    _answers["all"] += 1


class Beats:
    """What one process says."""

    def __init__(self, pulse: Pulse, name: str, phase: str):
        self._pulse, self._key = pulse, pulse.key + name
        self._work, self._last, self._answers = 0, _used(), _answers["all"]
        self._ended = threading.Event()
        self.at(phase)
        threading.Thread(target=self._beat, daemon=True).start()

    def at(self, phase: str) -> None:
        """What the process does now."""
        self._phase = phase
        leave_note(self._key, json.dumps({"phase": phase, "work": self._work}))

    def end(self, phase: str) -> None:
        """The last thing that it says."""
        self._ended.set()
        self.at(phase)

    def _beat(self) -> None:
        while not self._ended.wait(self._pulse.seconds):
            now, answers = _used(), _answers["all"]
            seconds, num_bytes = (after - before for after, before in zip(now, self._last, strict=True))
            is_busy = seconds >= BUSY_SHARE * self._pulse.seconds or num_bytes >= BUSY_BYTES
            if is_busy or answers > self._answers:
                self._work += 1
                with contextlib.suppress(Exception):  # of any kind: the head may be away for a moment
                    self.at(self._phase)
            self._last, self._answers = now, answers


def _used() -> tuple[float, float]:
    """CPU seconds, and bytes read and written, of this process and those that it started."""
    own, seconds, num_bytes = psutil.Process(), 0.0, 0.0
    family = [own]
    with contextlib.suppress(psutil.Error, OSError):
        family += own.children(recursive=True)
    for process in family:
        # it has ended (a file in /proc may then be empty), or this system counts no bytes
        with contextlib.suppress(psutil.Error, OSError, ValueError, RuntimeError, AttributeError):
            seconds += sum(process.cpu_times()[:2])
            moved = process.io_counters()
            num_bytes += moved.read_chars + moved.write_chars + moved.read_bytes
    return seconds, num_bytes


# ---------------------------------------------------------------- in the driver


class Waiting:
    """Watches a pool or worker group.

    `look` is called often, and looks every few seconds; who may be kept from calling it has it called by `watched`.
    """

    def __init__(
        self,
        what: str,
        each: Mapping[str, float],
        count: int,
        remedy: str,
        unit: str = "engines",
        types: NodeTypes | None = None,
    ):
        """
        Args:
            what: the stage, for the lines. each: resources of an actor. count: actors that were asked for.
            remedy: what a person could change. unit: what the actors are called.
            types: if given, launching nodes of a type that holds no actor are not waited for.
        """
        minutes = patience_minutes()
        self.pulse = Pulse(seconds=min(BEAT_SECONDS, minutes * 60 / 6))
        self._what, self._each, self.count, self._remedy, self._unit = what, each, count, remedy, unit
        self._types = types or NodeTypes(())
        self._patience = minutes * 60
        self._state: object = None
        self._error: BaseException | None = None
        self._moved = self._progress = self._looked = time.monotonic()
        self._said = self._looked - LINE_SECONDS / 2  # the first line comes within half a minute

    @contextmanager
    def watched(self, done: Callable[[], object]) -> Iterator[None]:
        """Looks from a thread of its own, as long as the block runs; what a look raised, `check` raises in the block,
        or else the block's end does.

        Args:
            done: returns what `look` is given.
        """
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done, ended), name="waiting", daemon=True)
        thread.start()
        try:
            yield
        except KeyboardInterrupt:
            self.check()  # of `_watch`, not of a person
            raise
        finally:
            ended.set()
            thread.join(LAST_LOOK_SECONDS)
        self.check()

    def _watch(self, done: Callable[[], object], ended: threading.Event) -> None:
        try:
            while not ended.wait(WATCH_SECONDS):
                self.look(done())
        except BaseException as error:  # of any kind: `say` raises SystemExit where nobody reads
            self._error = error
            if not ended.wait(STUCK_SECONDS):  # where nothing calls `check`
                os.kill(os.getpid(), signal.SIGINT)

    def check(self) -> None:
        """Raises what ended the thread of `watched`."""
        if self._error is not None:
            raise self._error

    def look(self, done: object) -> None:
        """Says what is waited for, if actors are missing or starting; UserError if nothing gets on and nothing is
        pending.

        Args:
            done: changes whenever something was done.
        """
        from ray.exceptions import RpcError

        now = time.monotonic()
        if now - self._looked < min(LOOK_SECONDS, self._patience / 6):
            return
        self._looked = now
        # the head may not answer for a moment; where it is gone, Ray's own errors end the stage
        with contextlib.suppress(RpcError):
            self._look(done, now)

    def _look(self, done: object, now: float) -> None:
        notes = read_notes(self.pulse.key)
        if (state := (done, notes)) != self._state:
            self._state, self._progress, self._moved = state, now, now
        phases = Counter(json.loads(note)["phase"] for note in notes.values() if note)
        missing, is_idle = max(0, self.count - len(notes)), not phases[AT_WORK]
        if not missing and now - self._progress < LINE_SECONDS:
            if is_idle:
                self._say(now, phases, missing)
            return
        coming = growth()
        if any(self._types.may_hold(name, self._each) for name in coming.launching):
            self._progress = now
        if missing and (is_idle or coming.launching or now - self._progress >= LINE_SECONDS):
            asked = f", {missing} x {shown_resources(self._each)} asked for"
            self._say(now, phases, missing, asked if coming.is_nothing else f"{asked}; {coming}")
        if now - self._progress >= self._patience:
            raise UserError(self._why(f"{self._patience / 60:g} minutes", phases, missing, str(coming)))
        if now - self._moved >= LAUNCHING_TIMES * self._patience:
            bound = f"{LAUNCHING_TIMES} times {self._patience / 60:g} minutes, in which nodes launched and did not come"
            raise UserError(self._why(bound, phases, missing, str(coming)))

    def _say(self, now: float, phases: Counter[str], missing: int, asked: str = "") -> None:
        """A line each half-minute."""
        if now - self._said >= LINE_SECONDS:
            self._said = now
            starting = f" ({phases[STARTING]} still {STARTING})" if phases[STARTING] else ""
            say(f"{self._what:<12} {self.count - missing} of {self.count} {self._unit} begun{starting}{asked}")

    def _why(self, bound: str, phases: Counter[str], missing: int, coming: str) -> str:
        states = [f"{count} {phase}" for phase, count in phases.items()]
        states += [f"{missing} not begun, of {shown_resources(self._each)} each ({coming})"] if missing else []
        return (
            f"{self._what}: no progress for {bound}; {self._unit}: {', '.join(states)}; "
            f"{self._remedy}, or raise no_progress_minutes; what is finished is kept"
        )

    def close(self) -> None:
        """Removes what the actors said."""
        with contextlib.suppress(Exception):  # of any kind: what ended the stage is not to be hidden by it
            remove_notes(self.pulse.key)


# ---------------------------------------------------------------- what Ray's libraries raise


def explained(error: BaseException, less_memory: str = "") -> str:
    """What an exception of Ray, or of one of its libraries, means: one line.

    Args:
        less_memory: the settings to lower where memory is short.
    """
    cause = first_cause(error)
    name, text = type(cause).__name__, first_line(cause)
    lower = f"; lower {less_memory}" if less_memory else ""
    match name:
        case "OutOfMemoryError":
            return f"out of memory{lower} ({text})"
        case "RuntimeEnvSetupError":
            return f"the job's runtime environment could not be set up on a node ({_last_words(cause)})"
        case "ActorUnschedulableError" if "startup repeatedly failed" in text:
            return f"a node could not start a process, overloaded or without this Python; see its raylet.err ({text})"
        case "ActorUnschedulableError" | "TaskUnschedulableError":
            return f"no node can hold an actor any more ({text})"
        case "NodeDiedError":
            return f"a node died ({text})"
        case "ActorDiedError" | "RayActorError" | "ActorUnavailableError" | "WorkerCrashedError":
            return f"an actor died, killed from outside or out of memory{lower} ({_last_words(cause)})"
        case "ObjectStoreFullError" | "OutOfDiskError":
            return f"a node's object store or disk is full ({text})"
    return text if isinstance(cause, UserError) else f"{name}: {text}"


def first_cause(error: BaseException) -> BaseException:
    """The innermost of Ray's wrappers: of a worker that did not answer, of a task that raised, of Ray Data."""
    for name in ("health_check_failure", "cause"):
        inner: Any = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return first_cause(inner)
    is_wrapper = type(error).__name__ in ("UserCodeException", "SystemException", "RayTaskError")
    return first_cause(error.__cause__) if is_wrapper and error.__cause__ else error


def _last_words(error: BaseException) -> str:
    """Ray's messages on deaths begin with ids; the line that says why is the last with a colon, or the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    saying = [line for line in lines if "rror" in line or "cause" in line.lower() or "reason" in line.lower()]
    return (saying or lines or ["no message"])[-1 if saying else 0][:300]
