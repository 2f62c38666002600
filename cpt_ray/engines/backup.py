"""Backup actors: the shards that a slow node still has when the rest is done are given to others as well.

Nothing is taken from the first actor. Of two that make the same shard that counts which is there first, whole
(`RunDir.write`), so that a backup is never wrong, only sometimes for nothing. These are the backup tasks of MapReduce
(Dean and Ghemawat 2004, section 3.6).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cpt_ray.console import say
from cpt_ray.engines.step import Counts
from cpt_ray.engines.waiting import explained
from cpt_ray.engines.worker import SHARDS_IN_FLIGHT, SHARDS_IN_HAND

LEAST_SECONDS = 60.0
SLOW_TIMES = 2.0
"""No shard was finished for so many times the time that one took, and for `LEAST_SECONDS`: what is left is slow."""
MAX_ROUNDS = 3
"""How often backups are opened; a second time only if those of the first failed."""
LOOK_SECONDS = 1.0

Key = tuple[int, str]
"""Line and shard."""


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
        self._done: dict[Key, dict[str, Counts]] = {}
        self._num_finished, self._begun = 0, time.monotonic()
        self._last = self._begun

    def finish(self, item: Mapping[str, Any]) -> dict[str, Counts] | None:
        """One of the pool's own actors is through with this shard. Returns what a backup made of it, if one did."""
        del self._left[_key(item)]
        self._num_finished, self._last = self._num_finished + 1, time.monotonic()
        return self._done.pop(_key(item), None)

    @property
    def num_done(self) -> int:
        """Shards that backups finished and the pool's own actors did not."""
        return len(self._done)

    @property
    def are_all_done(self) -> bool:
        """Whether backups finished all that is left, so that nothing of the pool's own needs to be waited for."""
        return self._left.keys() <= self._done.keys()

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
        num_rounds = 0
        while not ended.wait(LOOK_SECONDS):
            if num_rounds < MAX_ROUNDS and self._are_due():
                num_rounds += 1
                self._run(ended)
            if self._left and self.are_all_done:
                self._stop_pool()
                return

    def _are_due(self) -> bool:
        """Whether others are idle, and what is left takes long.

        A shard takes, by Little's law, the time that all of them took by how many are in flight at a time.
        """
        if not self._num_finished or not 0 < len(self._left) <= SHARDS_IN_HAND * (self._size - 1):
            return False
        seconds = self._size * SHARDS_IN_FLIGHT * (self._last - self._begun) / self._num_finished
        return time.monotonic() - self._last > max(LEAST_SECONDS, SLOW_TIMES * seconds)

    def _run(self, ended: threading.Event) -> None:
        """Until backups are through with what is left, or have failed at it, or it is done otherwise."""
        import ray
        from ray.exceptions import RayError

        items = [item for key, item in list(self._left.items()) if key not in self._done]
        count = min(self._size - 1, math.ceil(len(items) / SHARDS_IN_FLIGHT))
        say(
            f"{self._what:<12} nothing was finished for {time.monotonic() - self._last:.0f} s; engines besides those "
            f"that are at what is left (shards: {len(items)}): {count}"
        )
        actors = [self._open_actor() for _ in range(count)]
        try:
            calls = {
                actors[at % count].__call__.remote({name: [value] for name, value in item.items()}): _key(item)
                for at, item in enumerate(items)
            }
            while calls and not ended.is_set() and not self.are_all_done:
                ready, _ = ray.wait(list(calls), timeout=LOOK_SECONDS)
                for call in ready:
                    key = calls.pop(call)
                    try:
                        row = ray.get(call)
                        error = row["error"][0].partition("\n")[0]
                    except RayError as died:
                        error = explained(died)
                    if error:  # it ends nothing: the first actor is still at it
                        say(f"{self._what:<12} not done by the engine besides: {error}")
                    elif key in self._left:
                        self._done[key] = json.loads(row["counts"][0])
        finally:
            for actor in actors:
                ray.kill(actor)


def _key(item: Mapping[str, Any]) -> Key:
    return int(item["line"]), str(item["shard"])
