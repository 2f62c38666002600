"""What a client meets: the key check, configurations, and vLLM's OpenAI app behind, in pure ASGI.

A body's `"configuration"` becomes the system message that the model was tuned on; everything else reaches vLLM as it
came, and streams pass unbuffered.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cpt_ray.configuration import Catalog, Resolved
from cpt_ray.errors import UserError
from cpt_ray.prompting import policy_messages

MAX_BODY_BYTES = 10 << 20
CHAT_PATHS = ("/v1/chat/completions", "/tokenize")
"""Where a body may name a configuration; anywhere else one is an error, never silently ignored."""
CONFIGURATIONS_PATH = "/v1/configurations"
OPEN_PATH = "/health"
APPLIED_HEADER = b"x-cpt-configuration"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]


def key_hash(key: str) -> str:
    """What is kept of an API key: the hex SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()


class Frontend:
    """Pure ASGI, so that streams pass unbuffered: key check, configurations, and vLLM's app behind."""

    def __init__(self, app: AsgiApp, catalog: Catalog, hashed_key: str):
        self._app, self._catalog, self._hashed_key = app, catalog, hashed_key

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == OPEN_PATH:
            await self._app(scope, receive, send)
        elif not self._has_key(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            text = "Incorrect or missing API key. Send it as 'Authorization: Bearer KEY'."
            await _send_error(send, 401, text, code="invalid_api_key")
        elif scope["type"] == "http" and scope["method"] == "POST":
            await self._post(scope, receive, send)
        elif scope["type"] == "http" and (scope["method"], scope["path"]) == ("GET", CONFIGURATIONS_PATH):
            await _send_json(send, 200, self._catalog.to_json())
        else:
            await self._app(scope, receive, send)

    def _has_key(self, scope: Message) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(key.strip()).hexdigest()
        return hmac.compare_digest(given, self._hashed_key) and scheme.lower() == b"bearer"

    async def _post(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(scope, receive)
        except OverflowError:
            await _send_error(send, 413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.")
            return
        if body is None:
            return
        try:
            body, resolved = configured_body(scope["path"], body, self._catalog)
        except UserError as error:
            await _send_error(send, 400, str(error), param=str(error).partition(":")[0])
            return
        if resolved is None:
            await self._app(scope, _replay(body, receive), send)
            return
        applied = json.dumps(resolved.applied).encode()

        async def send_applied(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (APPLIED_HEADER, applied)]}
            await send(message)

        await self._app(_with_length(scope, len(body)), _replay(body, receive), send_applied)


def configured_body(path: str, body: bytes, catalog: Catalog) -> tuple[bytes, Resolved | None]:
    """The body that vLLM is given: as it came if it names no configuration, else with the directive in its messages.

    What is no JSON object is vLLM's to refuse. UserError for a bad configuration, or one where none is understood.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return body, None
    if not isinstance(data, dict) or "configuration" not in data:
        return body, None
    if path not in CHAT_PATHS:
        raise UserError(f"configuration: not understood here; send it with messages to {CHAT_PATHS[0]}")
    resolved = catalog.resolve(data.pop("configuration"))
    data["messages"] = policy_messages(resolved.directive, _checked_messages(data.get("messages")))
    try:
        return json.dumps(data).encode(), resolved
    except RecursionError:
        raise UserError("body: nested too deeply") from None


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as they came, but the content of a leading system message as one text."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise UserError("messages: expected a list of messages, each with a role and a content")
    if not messages or messages[0].get("role") != "system":
        return messages
    parts = messages[0].get("content")
    if isinstance(parts, str):
        return messages
    texts = [one.get("text") if isinstance(one, dict) else None for one in parts] if isinstance(parts, list) else []
    text = "\n".join(one for one in texts if isinstance(one, str))  # as vLLM joins them
    if not text or not all(isinstance(one, str) for one in texts):
        raise UserError("messages[0].content: expected text (or a list of text parts) in a system message")
    return [{**messages[0], "content": text}, *messages[1:]]


async def _read_body(scope: Message, receive: Receive) -> bytes | None:
    """The whole body; None if the client went away; OverflowError above MAX_BODY_BYTES."""
    announced = dict(scope["headers"]).get(b"content-length", b"")
    if announced.isdigit() and int(announced[:20]) > MAX_BODY_BYTES:
        raise OverflowError
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise OverflowError
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body given once more; what comes after it (the client leaving) is still heard."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def _with_length(scope: Message, length: int) -> Message:
    dropped = (b"content-length", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


async def _send_json(send: Send, status: int, data: Any) -> None:
    body = json.dumps(data).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_error(send: Send, status: int, text: str, param: str | None = None, code: str | None = None) -> None:
    """OpenAI's error shape."""
    error = {"message": text, "type": "invalid_request_error", "param": param, "code": code}
    await _send_json(send, status, {"error": error})
