"""One request while it is answered: what the log, the meter and the engine need to know of it."""

from __future__ import annotations

import asyncio
import dataclasses
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, kw_only=True)
class Call:
    """One request; no word of what was said."""

    key: str
    method: str
    path: str
    request_id: str
    time: float
    """Unix seconds at which it came."""
    body_bytes: int = 0
    status: int = 0
    """0 if the client left before there was one."""
    configuration: dict[str, str] = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 0
    tokens: int = 0
    """Tokens of the answers, also of one that was broken off."""
    first_byte_seconds: float | None = None
    seconds: float = 0.0
    adapter: Any = None
    """The user's adapter (conditioning.py) that the engine answers with; not logged. Kept here, since its folder is
    removed once nothing refers to it."""
    engine_tasks: set[asyncio.Task[Any]] = dataclasses.field(default_factory=set)
    """Tasks that wait for the engine; not logged."""
    is_left: bool = False
    """The client has left, so the engine is to begin nothing more for it; not logged."""

    def to_json(self) -> dict[str, Any]:
        """A line of the access log."""
        return {name: getattr(self, name) for name in LOGGED}


LOGGED = [field.name for field in dataclasses.fields(Call) if field.name not in ("adapter", "engine_tasks", "is_left")]
CALL: ContextVar[Call | None] = ContextVar("call", default=None)
"""The request that the running task works for: vLLM's code is between the middleware that makes a `Call` and the
engine that adds to it."""
