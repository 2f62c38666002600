"""Backup actors: the shards that a slow node still has when the rest is done are given to others as well.

Nothing is taken from the first actor. Of two that make the same shard that counts which is there first, whole
(`RunDir.write`), so that a backup is never wrong, only sometimes for nothing. These are the backup tasks of MapReduce
(Dean and Ghemawat 2004, section 3.6).
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cpt_ray.console import say
from cpt_ray.engines.step import Counts
from cpt_ray.engines.worker import SHARDS_IN_FLIGHT

LEAST_SECONDS = 60.0
SLOW_TIMES = 2.0
"""No shard was finished for so many times the time that one took, and for `LEAST_SECONDS`: what is left is slow."""
LOOK_SECONDS = 1.0


class BackupActors:
    """Of one pool; its driver tells it what is finished."""

    def __init__(
        self,
        what: str,
        todo: Sequence[Mapping[str, Any]],
        size: int,
        open_actor: Callable[[], Any],
        stop_pool: Callable[[], None],
    ):
        """
        Args:
            what: the stage, for the lines.
            todo: the pool's shards, {line, shard} each.
            size: actors of the pool.
            open_actor: starts one more; Ray has room for it once the pool's own are idle.
            stop_pool: ends the pool's own actors, whatever they do, and what its driver reads; called if all is done.
        """
        self._what, self._size, self._open_actor, self._stop_pool = what, size, open_actor, stop_pool
        self._left = {_key(item): item for item in todo}
        self._done: dict[tuple[int, str], dict[str, Counts]] = {}
        self._num_finished, self._begun = 0, time.monotonic()
        self._last = self._begun

    def finish(self, item: Mapping[str, Any]) -> None:
        """One of the pool's own actors has finished this shard."""
        del self._left[_key(item)]
        self._num_finished, self._last = self._num_finished + 1, time.monotonic()

    @property
    def num_done(self) -> int:
        """Shards that backup actors finished."""
        return len(self._done)

    def rest(self) -> Iterator[dict[str, Counts]]:
        """By stage, the counts of each shard that the pool's own actors did not finish."""
        return (self._done[key] for key in list(self._left))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Looks from a thread of its own whether backups are due, as long as the block runs; then they are gone."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="backup", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(LOOK_SECONDS):
            if self._size > 1 and self._num_finished and time.monotonic() - self._last > self._bound():
                self._run(ended)
                return

    def _bound(self) -> float:
        """In seconds: by Little's law a shard takes what all of them took, by how many are in flight at a time."""
        seconds = self._size * SHARDS_IN_FLIGHT * (self._last - self._begun) / self._num_finished
        return max(LEAST_SECONDS, SLOW_TIMES * seconds)

    def _run(self, ended: threading.Event) -> None:
        import ray
        from ray.exceptions import RayError

        items = list(self._left.values())
        count = min(self._size - 1, math.ceil(len(items) / SHARDS_IN_FLIGHT))
        say(
            f"{self._what:<12} nothing was finished for {time.monotonic() - self._last:.0f} s; engines besides those "
            f"that are at what is left (shards: {len(items)}): {count}"
        )
        actors = [self._open_actor() for _ in range(count)]
        try:
            calls = {
                actors[at % len(actors)].__call__.remote({name: [value] for name, value in item.items()}): _key(item)
                for at, item in enumerate(items)
            }
            while calls and not ended.is_set():
                ready, _ = ray.wait(list(calls), timeout=LOOK_SECONDS)
                for call in ready:
                    key = calls.pop(call)
                    with contextlib.suppress(RayError):  # the first actor is still at what a backup failed at
                        row = ray.get(call)
                        if not row["error"][0]:
                            self._done[key] = json.loads(row["counts"][0])
                if self._left.keys() <= self._done.keys():
                    self._stop_pool()
                    return
        finally:
            for actor in actors:
                ray.kill(actor)


def _key(item: Mapping[str, Any]) -> tuple[int, str]:
    return int(item["line"]), str(item["shard"])
