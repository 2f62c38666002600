"""What a client meets: keys, configurations, preferences, the playground, and vLLM's OpenAI app behind, in pure ASGI.

The directive of the configuration that a request names becomes the system message that the model was tuned on;
everything else reaches vLLM as it came, and streams pass unbuffered.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import HTMLResponse, RedirectResponse

from cpt_ray.errors import UserError
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.serving.asgi import (
    MAX_BODY_BYTES,
    AsgiApp,
    Json,
    Message,
    Receive,
    Refusal,
    Send,
    bad_request,
    error,
    read_body,
    recording,
    refused,
    with_body,
    with_edited_answer,
    with_field,
    without_body,
)
from cpt_ray.serving.call import CALL, Call
from cpt_ray.serving.keys import Key, Keyring, MeterClient
from cpt_ray.serving.request import CONFIGURED_PREFIX, RequestParser

if TYPE_CHECKING:
    from cpt_ray.serving.preferences import PreferenceStore

CONFIGURATIONS_PATH = "/v1/configurations"
MODELS_PATH = "/v1/models"
PREFERENCES_PATH = "/v1/preferences"
HEALTH_PATH = "/health"
CLIENT_PATHS = (
    "/v1/", "/tokenize", "/detokenize", "/health", "/ping", "/version", "/metrics", "/docs", "/redoc", "/openapi.json"
)  # fmt: skip
"""Of vLLM's routes, those for clients; it has others, to stop requests and to scale, that no key opens."""
PAGE_PATHS = ("/", "/playground")
PAGE = Path(__file__).parent / "playground.html"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
APPLIED_HEADER = b"x-cpt-configuration"
SOURCE_HEADER = b"x-cpt-configuration-from"
"""Whether the configuration is the one that was asked for or that of the preferences named beside it."""


class ConfiguredApp:
    """This server's ASGI app around vLLM's: streams pass unbuffered. `keyring=None` lets everyone in."""

    def __init__(
        self,
        app: AsgiApp,
        catalogs: Mapping[str, Catalog],
        keyring: Keyring | None,
        meter: MeterClient,
        on_end: Callable[[Call], None] = lambda call: None,
        listing_extras: Mapping[str, Any] | None = None,
        preferences: PreferenceStore | None = None,
        vllm_fields: frozenset[str] = frozenset(),
        control_token_pattern: re.Pattern[str] | None = None,
    ):
        """`catalogs`: what each served model can be asked for, the default model first. `on_end` gets every request.

        `listing_extras` is added to what `GET /v1/configurations` says. `vllm_fields`: names of vLLM's own fields.
        `control_token_pattern`: finds a control token of the model in a text.
        """
        self._app, self._catalogs, self._keyring, self._meter, self._on_end = app, catalogs, keyring, meter, on_end
        self._listing_extras, self._preferences = listing_extras or {}, preferences
        self._parser = RequestParser(catalogs, preferences is not None, vllm_fields, control_token_pattern)
        self._page = HTMLResponse(PAGE.read_bytes(), headers={"content-security-policy": CONTENT_SECURITY_POLICY})

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        method = sent_method = scope.get("method", "")
        if method == "HEAD":
            method, send = "GET", without_body(send)
            scope = {**scope, "method": method}
        if scope["type"] == "lifespan" or path == HEALTH_PATH:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if method == "GET" and path in PAGE_PATHS:
            await self._page(scope, receive, send)
            return
        if method == "GET" and not path:  # the page asks for what is beside it
            await RedirectResponse(f"{scope['root_path']}/playground")(scope, receive, send)
            return
        key = self._keyring.check(headers.get(b"authorization", b"")) if self._keyring else None
        if scope["type"] == "websocket":
            if isinstance(key, Refusal):
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        call = Call(
            key="" if key is None else key.name if isinstance(key, Key) else "-",
            method=sent_method,
            path=path,
            request_id=headers.get(b"x-request-id", b"").decode("latin-1"),
            time=time.time(),
        )
        await self._answer_and_record(call, key, method, scope, receive, send)

    async def _answer_and_record(
        self, call: Call, key: Key | Refusal | None, method: str, scope: Message, receive: Receive, send: Send
    ) -> None:
        """Answers, logs, and charges the key with what vLLM counted."""
        start = time.perf_counter()
        receive, send = recording(call, start, receive, send)
        token = CALL.set(call)
        try:
            response = (
                refused(key) if isinstance(key, Refusal) else await self._route(call, key, method, scope, receive)
            )
            await response(scope, receive, send)
        except asyncio.CancelledError:
            # Serve cancels this when the client leaves; vLLM 0.32 then waits no more for the task that makes an answer
            # which comes whole, but leaves it running (`with_cancellation`), perhaps before it has reached the engine
            call.is_left = True
            for task in call.engine_tasks:
                task.cancel()
            raise
        except Exception:  # of any kind: Serve answers it, where no answer has begun
            if not call.is_left:
                call.status = call.status or 500
            raise
        finally:
            CALL.reset(token)
            call.seconds = time.perf_counter() - start
            self._on_end(call)
            if isinstance(key, Key) and key.metered and call.prompt_tokens:
                await self._meter.charge(key, call.prompt_tokens + call.tokens)

    async def _route(self, call: Call, key: Key | None, method: str, scope: Message, receive: Receive) -> AsgiApp:
        """What answers: vLLM's app, or an answer of our own."""
        path = call.path
        is_preferences = self._preferences is not None and f"{path}/".startswith(f"{PREFERENCES_PATH}/")
        if not path.startswith(CLIENT_PATHS):
            return error(404, f"there is nothing at {path[:100]}")
        if method == "POST" or is_preferences:  # work, which counts against a key's limits
            refusal = await self._meter.admit(key) if key is not None and key.metered else None
            if refusal is not None:
                return refused(refusal)
        try:
            if method == "POST":
                return await self._post(call, key, is_preferences, scope, receive)
            if is_preferences:
                return await self._answer(call, key, method, None)
        except UserError as problem:
            return bad_request(problem)
        if (method, path) == ("GET", CONFIGURATIONS_PATH):
            return Json({**next(iter(self._catalogs.values())).to_json(), **self._listing_extras})
        return with_edited_answer(self._app, self._with_saved) if (method, path) == ("GET", MODELS_PATH) else self._app

    async def _post(
        self, call: Call, key: Key | None, is_preferences: bool, scope: Message, receive: Receive
    ) -> AsgiApp:
        try:
            body = await read_body(scope, receive)
        except OverflowError:
            return error(413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.")
        if body is None:
            return _no_answer
        call.body_bytes = len(body)
        data = self._parser.read(scope, call.path, body)
        if is_preferences:
            return await self._answer(call, key, "POST", data)
        response = None if data is None else await self._configured(call, key, data)
        return response or with_body(self._app, body)

    async def _configured(self, call: Call, key: Key | None, data: Mapping[str, Any]) -> AsgiApp | None:
        """vLLM's app, with the configuration that a body asks for in its messages; None if it asks for nothing."""
        request, source = self._parser.parse(call.path, data), ""
        configuration = request.configuration
        if request.preferences is not None and self._preferences is not None:
            state, source = await self._preferences.find(_owner(key), request.preferences), "configuration"
            if isinstance(state, Refusal):
                return refused(state)
            if configuration is None:  # one that the request names itself takes precedence
                levels, source, call.adapter = await self._preferences.steer(state, call.path)
                configuration = request.catalog.resolve(levels)
        if configuration is None:
            return None
        call.configuration = configuration.applied
        headers = [(APPLIED_HEADER, json.dumps(configuration.applied).encode())]
        field = {"applied": configuration.applied, "directive": configuration.directive}
        if source:
            headers, field = [*headers, (SOURCE_HEADER, source.encode())], field | {"from": source}
        app = with_body(self._app, request.body(configuration))
        return with_field(app, "configuration", field, headers)

    async def _answer(self, call: Call, key: Key | None, method: str, body: Any) -> Json:
        """The response to a request about preferences."""
        assert self._preferences is not None
        name = call.path.removeprefix(PREFERENCES_PATH).removeprefix("/")
        answer = await self._preferences.answer(_owner(key), method, name, body)
        return refused(answer) if isinstance(answer, Refusal) else Json(answer)

    def _with_saved(self, models: Any) -> Any:
        """vLLM's list of models, and every saved configuration as one more."""
        default, catalog = next(iter(self._catalogs.items()))
        entry = next(model for model in models["data"] if model["id"] == default)
        models["data"] += [{**entry, "id": CONFIGURED_PREFIX + name, "parent": default} for name in catalog.saved]
        return models


async def _no_answer(scope: Message, receive: Receive, send: Send) -> None:
    """Sends nothing: the client left while it sent its request."""


def _owner(key: Key | None) -> str:
    """Who owns the preferences of a request; without keys, everybody shares all of them."""
    return "everybody" if key is None else key.hash[:32]
