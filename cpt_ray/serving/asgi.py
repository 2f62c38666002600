"""ASGI messages: whole bodies in, small answers out, and `send`s that record or change what passes, without holding a
stream back."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from cpt_ray.errors import UserError
from cpt_ray.serving.call import Call

MAX_BODY_BYTES = 10 << 20
EXPOSED_HEADERS = ["x-cpt-configuration", "x-cpt-configuration-from", "retry-after", "x-request-id"]
"""What pages of other origins may read, if they may ask at all."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


def with_cors(app: AsgiApp, arguments: Mapping[str, Any]) -> AsgiApp:
    """`app` with CORS for the pages of `allowed_origins`; as it is if there are none.

    It is the outermost layer, not where vLLM puts it, behind the keys: a browser's preflight has no key, and a page
    that may not read a refusal cannot say why it was refused. The arguments are vLLM's.
    """
    from starlette.middleware.cors import CORSMiddleware

    if not arguments.get("allowed_origins"):
        return app
    return CORSMiddleware(
        app,
        allow_origins=arguments["allowed_origins"],
        allow_methods=arguments.get("allowed_methods", ["*"]),
        allow_headers=arguments.get("allowed_headers", ["*"]),
        allow_credentials=arguments.get("allow_credentials", False),
        expose_headers=EXPOSED_HEADERS,
    )


# ---------------------------------------------------------------- requests


async def read_body(scope: Message, receive: Receive) -> bytes | None:
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


def with_body(app: AsgiApp, body: bytes) -> AsgiApp:
    """`app`, to which the request's body is this one; what comes after it (the client leaving) still arrives."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        async def replay() -> Message:
            return left.pop() if left else await receive()

        dropped = (b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
        await app({**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}, replay, send)

    return answer


# ---------------------------------------------------------------- answers


class Json(Response):
    """In ASCII, whatever is in it: a text that a client sent and that is repeated may not be UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body; called by Starlette's `Response`."""
        return json.dumps(content).encode()


def error(
    status: int, text: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> Json:
    """In OpenAI's shape."""
    body = {"message": text, "type": "invalid_request_error", "param": param, "code": code}
    return Json({"error": body}, status, headers)


def bad_request(problem: UserError) -> Json:
    """What is in front of the colon, if that is one word, is the field that is wrong."""
    param, colon, _ = str(problem).partition(":")
    return error(400, str(problem), param=param if colon and " " not in param else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request is refused, as an HTTP answer."""

    status: int
    code: str
    text: str
    retry_after: int | None = None
    """Whole seconds after which it may be tried again."""


def refused(refusal: Refusal) -> Json:
    """A refusal as a response."""
    wait = refusal.retry_after
    headers = None if wait is None else {"retry-after": str(wait)}
    return error(refusal.status, refusal.text, code=refusal.code, headers=headers)


# ---------------------------------------------------------------- what passes


def recording(call: Call, start: float, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """`receive` and `send` that record in `call` the status, unless the client has left, and when the body began."""

    async def receive_recorded() -> Message:
        message = await receive()
        call.is_left = call.is_left or message["type"] == "http.disconnect"
        return message

    async def send_recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            call.status = 0 if call.is_left else message["status"]
        elif call.first_byte_seconds is None:
            call.first_byte_seconds = time.perf_counter() - start
        await send(message)

    return receive_recorded, send_recorded


def without_body(send: Send) -> Send:
    """`send` for an answer to HEAD: the headers of GET's alone."""

    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head


def with_field(app: AsgiApp, name: str, value: Any, headers: Headers) -> AsgiApp:
    """`app`, whose answers have these headers too and, if they are good, one more field (in a stream's first event).

    The field is spliced in behind the first brace, so that nothing is parsed and nothing held back.
    """
    added = f"{json.dumps(name)}: {json.dumps(value)}, ".encode()

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        is_open = False

        async def send_more(message: Message) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                is_open = message["status"] == 200
                more = len(added) if is_open else 0
                kept = [
                    (key, str(int(text) + more).encode() if key == b"content-length" else text)
                    for key, text in message.get("headers", ())
                ]
                message = {**message, "headers": [*kept, *headers]}
            elif is_open and b"{" in (body := message.get("body", b"")):  # a stream may begin with a comment
                is_open, brace = False, body.find(b"{") + 1
                message = {**message, "body": body[:brace] + added + body[brace:]}
            await send(message)

        await app(scope, receive, send_more)

    return answer


def with_edited_answer(app: AsgiApp, edit: Callable[[Any], Any]) -> AsgiApp:
    """`app`, whose small JSON answer `edit` changes, if it is a good one."""

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await app(scope, receive, keep)
        if messages and messages[0]["status"] == 200:
            body = b"".join(message.get("body", b"") for message in messages)
            await Json(edit(json.loads(body)))(scope, receive, send)
        else:
            for message in messages:
                await send(message)

    return answer
