"""The names of shards: what a shard holds, and the hash of all that it was made from.

A step's output has the name of its input with another hash, which covers the input's name and everything the step
depends on. So a changed rubric, model or setting makes new names, and only those shards are made anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Self

from cpt_ray.tables.records import CONTROL, content_id

DIGITS = 12
"""Of a name's hash, in hex."""
_FORM = re.compile(
    r"(?:(?P<label>.+?)-)??"
    r"(?:(?P<number>[0-9]{5}|[1-9][0-9]{5,})(?:-(?P<model>[a-z]+))?-)?"
    rf"(?P<digest>[0-9a-f]{{{DIGITS}}})"
)


@dataclass(frozen=True)
class ShardName:
    """`ornament-00003-base-0123456789ab`, of which all but the hash can be missing."""

    label: str = ""
    """A rubric's id, "control", or what else a table's shards differ in; "" for the writer's answers."""
    number: int | None = None
    """Which of the shards with this label."""
    model: str = ""
    """"base" or "tuned", where both answer."""
    digest: str = ""
    """Missing only in what is not a name yet (`keyed`, `made_of`)."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """What `str` has written; ValueError for any other text."""
        match = _FORM.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not the name of a shard")
        label, number, model, digest = match.groups(default="")
        return cls(label, int(number) if number else None, model, digest)

    def __str__(self) -> str:
        number = "" if self.number is None else f"{self.number:05d}"
        return "-".join([*filter(None, (self.label, number, self.model)), self.digest])

    @property
    def is_control(self) -> bool:
        """Whether a shard of units or answers is the policy's own."""
        return self.label == CONTROL

    def keyed(self, key: str) -> str:
        """The name with the hash `key`."""
        return str(replace(self, digest=key[:DIGITS]))

    def made_of(self, *parts: Any) -> str:
        """The name of what is made of this shard, under the settings `parts`."""
        return self.keyed(content_id(str(self), *parts))


def rejects_of(stage: str, shard: str) -> str:
    """The shard of rejects beside a shard that a stage made."""
    return f"{stage}-{shard}"
