"""The front around a toy app, and requests to it, for tests of what a client meets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.serving.app import ConfiguredApp
from cpt_ray.serving.call import Call
from cpt_ray.serving.keys import Key, Keyring, Meter, key_hash
from cpt_ray.tables.rundir import SPENT_FILE
from tests.builders import make_directives, make_rubric

KEY = "a-test-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
CATALOG = Catalog.build([make_rubric()], make_directives()).with_saved({"poet": {"ornament": 88}})
CATALOGS = {"m": CATALOG}
HIGH = "Write in the high manner, please (a)."
USER: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]
SYSTEM: list[Any] = [{"role": "system", "content": "Be brief."}, *USER]
CHAT = "/v1/chat/completions"


def make_key(**changes: Any) -> Key:
    return Key(**{"name": "tests", "hash": key_hash(KEY), "created": 0.0, **changes})


def make_front(app: Any, *keys: Key, meter: Meter | None = None, calls: list[Call] | None = None) -> ConfiguredApp:
    nowhere = Path("/nonexistent")
    keyring = Keyring(nowhere / "keys.json", keys or (make_key(),))
    noted: list[Call] = [] if calls is None else calls
    return ConfiguredApp(app, CATALOGS, keyring, meter or Meter(nowhere / SPENT_FILE), noted.append)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it was sent."""
    assert scope["type"] == "http"
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    seen = json.dumps({"path": scope["path"], "headers": headers, "body": body.decode("latin-1")}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(seen))]})
    await send({"type": "http.response.body", "body": seen})


def ask(
    method: str, path: str, headers: dict[str, str] | None = None, front: Any = None, **given: Any
) -> httpx.Response:
    """One request to the front; the key is sent unless `headers` are given."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(front or make_front(echo))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.request(method, path, headers=AUTHORIZED if headers is None else headers, **given)

    return asyncio.run(go())
