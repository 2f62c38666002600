"""The access log and the metrics: how finished requests are written and counted."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import os
import socket
import threading
import time
from collections import Counter

from cpt_ray.serving.call import Call
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.store_path import StorePath

MAX_LOG_BYTES = 50 << 20
"""Size at which an access log begins a new file; four older ones are kept."""
WRITE_SECONDS = 0.25
"""How long finished requests are held, so that many are written and counted at once."""
PART_SECONDS = 10.0
"""The same for an object store, where nothing can be added to an object: each time is an object of its own."""
MAX_HELD = 100_000
"""Lines that wait for a store that does not answer; older ones are dropped, and counted in the next part."""


class _Parts(logging.Handler):
    """Puts the lines of a log into an object store, in parts."""

    def __init__(self, folder: StorePath, name: str):
        super().__init__()
        self._folder, self._name = folder, f"{name}-{time.time_ns() // 10**6}"
        self._lines: list[str] = []
        self._turn = threading.Lock()
        self._num_parts, self._num_dropped = 0, 0
        self._ended = threading.Event()
        self._putting = threading.Thread(target=self._put_parts, name="access log", daemon=True)
        self._putting.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Holds the lines of a record."""
        with self._turn:
            self._lines += self.format(record).splitlines()
            if (too_many := len(self._lines) - MAX_HELD) > 0:
                del self._lines[:too_many]
                self._num_dropped += too_many

    def _put_parts(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(PART_SECONDS)
            with self._turn:
                lines, self._lines = self._lines, []
                dropped, self._num_dropped = self._num_dropped, 0
            if not lines:
                continue
            note = [json.dumps({"dropped": dropped})] if dropped else []
            try:
                part = self._folder / f"{self._name}-{self._num_parts:06d}.jsonl"
                part.put("\n".join([*note, *lines, ""]).encode())
                self._num_parts += 1
            except OSError:  # the next part has them too, in an object of the same name
                with self._turn:
                    self._lines, self._num_dropped = lines + self._lines, self._num_dropped + dropped

    def close(self) -> None:
        """Puts what is held."""
        self._ended.set()
        self._putting.join()
        super().close()


class AccessLog:
    """Writes every request to the access log, one JSON object a line, and counts it for Prometheus.

    Requests that ended within a quarter of a second (PART_SECONDS in an object store) are written together; that many
    are lost if the process is killed.
    """

    def __init__(self, run: RunDir, application: str):
        """`application`: Serve's name of it, a tag of every metric, since a cluster has one set for all servers."""
        from ray.util import metrics

        tags = ("application", "key", "status")
        self._requests = metrics.Counter("cpt_requests", "Requests, by key and status.", tags)
        tags = ("application", "key", "kind")
        self._tokens = metrics.Counter("cpt_tokens", "Prompt and answer tokens, by key.", tags)
        tags = ("application", "rubric", "level")
        self._configured = metrics.Counter("cpt_configured", "Requests that asked for a level.", tags)
        bounds = [0.005 * 2**power for power in range(16)]
        self._first = metrics.Histogram("cpt_first_byte_seconds", "Until the answer begins.", bounds, ("application",))
        self._whole = metrics.Histogram("cpt_request_seconds", "Until the answer ends.", bounds, ("application",))
        for metric in (self._requests, self._tokens, self._configured, self._first, self._whole):
            metric.set_default_tags({"application": application})
        name, folder = f"{socket.gethostname()}-{os.getpid()}", run.access
        self._log = logging.Logger("cpt_ray.access")
        if isinstance(folder, StorePath):
            self._handler: logging.Handler = _Parts(folder, name)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._handler = logging.handlers.RotatingFileHandler(
                folder / f"{name}.jsonl", maxBytes=MAX_LOG_BYTES, backupCount=4
            )
        self._log.addHandler(self._handler)
        self._ended: list[Call] = []

    def __call__(self, call: Call) -> None:
        self._ended.append(call)
        if len(self._ended) == 1:
            asyncio.get_running_loop().call_later(WRITE_SECONDS, self.write)

    def close(self) -> None:
        """Writes what is held, for good."""
        self.write()
        self._handler.close()

    def write(self) -> None:
        """Writes and counts the requests that are held."""
        calls, self._ended = self._ended, []
        if not calls:
            return
        self._log.info("\n".join(json.dumps(call.to_json()) for call in calls))
        tokens: Counter[tuple[str, str]] = Counter()
        for call in calls:
            tokens[call.key, "prompt"] += call.prompt_tokens
            tokens[call.key, "answer"] += call.tokens
            if call.first_byte_seconds is not None and call.tokens:
                self._first.observe(call.first_byte_seconds)
                self._whole.observe(call.seconds)
        for (key, status), count in Counter((call.key, str(call.status)) for call in calls).items():
            self._requests.inc(count, tags={"key": key, "status": status})
        for (key, kind), count in tokens.items():
            if count:
                self._tokens.inc(count, tags={"key": key, "kind": kind})
        levels = Counter(level for call in calls for level in call.configuration.items())
        for (rubric, level), count in levels.items():
            self._configured.inc(count, tags={"rubric": rubric, "level": level})
