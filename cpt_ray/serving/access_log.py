"""The access log and the metrics: how finished requests are written and counted."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import os
import socket
from collections import Counter

from cpt_ray.serving.call import Call
from cpt_ray.tables.rundir import RunDir

MAX_LOG_BYTES = 50 << 20
"""Size at which an access log begins a new file; four older ones are kept."""
WRITE_SECONDS = 0.25
"""How long finished requests are held, so that many are written and counted at once."""


class AccessLog:
    """Writes every request to the access log, one JSON object a line, and counts it for Prometheus.

    Requests that ended within a quarter of a second are written together; that many are lost if the process is killed.
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
        path = run.access / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = logging.Logger("cpt_ray.access")
        self._log.addHandler(logging.handlers.RotatingFileHandler(path, maxBytes=MAX_LOG_BYTES, backupCount=4))
        self._ended: list[Call] = []

    def __call__(self, call: Call) -> None:
        self._ended.append(call)
        if len(self._ended) == 1:
            asyncio.get_running_loop().call_later(WRITE_SECONDS, self.write)

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
