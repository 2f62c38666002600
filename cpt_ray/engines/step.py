"""What stages are made of: a step does one thing to a shard, a line takes shards through steps, a runner does lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cpt_ray.config import ModelConfig
from cpt_ray.tables.rundir import RunDir

Counts = Mapping[str, float]
OpenEngine = Callable[[ModelConfig], Any]
"""Makes the engine that a pool's steps are called with: an `Engine`, or what else a stage needs in its place."""


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
    """A production line: shards of one kind, and the steps that each of them goes through, in order.

    Never a line of text.
    """

    shards: Sequence[str]
    steps: Sequence[Step]

    def outputs(self, shard: str) -> Iterator[tuple[Step, str]]:
        """Each step, with the name of the shard that it makes of this one."""
        for step in self.steps:
            shard = step.output(shard)
            yield step, shard


class Runner(Protocol):
    """Brings every shard of every line through its steps: `run_lines` on Ray, a `LocalRunner` in this process."""

    def __call__(self, run: RunDir, lines: Sequence[Line], open_engine: OpenEngine | None = None) -> None:
        """Does what is not there yet; UserError with the cause if a shard fails.

        Args:
            open_engine: makes the engine; if not given, the role's settings decide (`make_engine`).
        """
        ...
