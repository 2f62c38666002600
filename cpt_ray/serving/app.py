"""What a client meets: keys, configurations, the playground, and vLLM's OpenAI app behind, in pure ASGI.

A body's `"configuration"`, or one in its model name (`cpt:ornament=high,warmth=30`), becomes the system message that
the model was tuned on; everything else reaches vLLM as it came, and streams pass unbuffered.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import Executor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from cpt_ray.chat.conversations import policy_messages
from cpt_ray.chat.templates import find_control_token
from cpt_ray.config import SamplingConfig
from cpt_ray.errors import UserError
from cpt_ray.rubrics.catalog import Catalog, Resolved
from cpt_ray.serving.keys import Counts, Key, Keyring, Refusal
from cpt_ray.texts import half_character, strings_in, unique_names

MAX_BODY_BYTES = 10 << 20
SMALL_BYTES = 8 << 10
"""Of a body that usually takes about a millisecond to render and to tokenise."""
AT_ONCE_SECONDS = 0.005
"""Of work on a request in the event loop, after which the rest of it is done in threads."""
CHAT_PATHS = ("/v1/chat/completions", "/tokenize")
"""Where a body may name a configuration; anywhere else one is an error, never silently ignored."""
RAW_PATHS = ("/v1/completions", "/tokenize", "/detokenize")
"""Where a text is the model's input as it is, control tokens and all."""
RENDERED = (
    "messages", "input", "system", "instructions", "tools", "documents", "chat_template_kwargs", "choices"
)  # fmt: skip
"""Fields of bodies whose texts become parts of conversations, at all other paths."""
CONFIGURATIONS_PATH = "/v1/configurations"
MODELS_PATH = "/v1/models"
PREFERENCES_PATH = "/v1/preferences"
OPEN_PATH = "/health"
CLIENT_PATHS = (
    "/v1/", "/tokenize", "/detokenize", "/health", "/ping", "/version", "/metrics", "/docs", "/redoc", "/openapi.json"
)  # fmt: skip
"""Of vLLM's routes, those for clients; it has others, to stop requests and to scale, that no key opens."""
PAGE_PATHS = ("/", "/playground")
PAGE = Path(__file__).parent / "playground.html"
PAGE_POLICY = (
    b"default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
APPLIED_HEADER = b"x-cpt-configuration"
SOURCE_HEADER = b"x-cpt-configuration-from"
"""Whether the configuration is the one that was asked for or that of the preferences named beside it."""
EXPOSED_HEADERS = [APPLIED_HEADER.decode(), SOURCE_HEADER.decode(), "retry-after", "x-request-id"]
"""What pages of other origins may read, if they may ask at all."""
CONFIGURED_PREFIX = "cpt:"
"""Begins a model name that carries a configuration."""
MAX_NAME = 60
"""Characters of a field's name that are looked at and repeated."""
NEAR = 0.87
"""How alike a name must be to that of one of our own fields to be taken for a slip."""
OTHER_NAMES = {
    "configuration": {"cpt", "conf", "config", "configs", "cfg", "rubric", "rubrics", "directive", "directives"},
    "preferences": {"pref", "prefs", "preferencesid", "preferenceid"},
}
"""Of the fields that are read here, what else they might be called (in letters alone)."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Call:
    """One request as the access log and the metrics have it; no word of what was said."""

    key: str
    method: str
    path: str
    request_id: str
    time: float
    """Unix seconds at which it came."""
    body_bytes: int = 0
    at_once_seconds: float = 0.0
    """Of its rendering and tokenising, what was done in the event loop."""
    status: int = 0
    """0 if the client left before there was one."""
    configuration: dict[str, str] = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 0
    tokens: int = 0
    """Tokens of the answers, also of one that was broken off."""
    first_byte_seconds: float | None = None
    seconds: float = 0.0
    adapter: UserAdapter | None = None
    """With which the engine answers it; not logged."""

    def to_json(self) -> dict[str, Any]:
        """A line of the access log."""
        return {name: getattr(self, name) for name in LOGGED}


class UserAdapter(Protocol):
    """What the engine is given for a user (conditioning.py)."""

    lora_request: Any


LOGGED = [field.name for field in dataclasses.fields(Call) if field.name != "adapter"]


CALL: ContextVar[Call | None] = ContextVar("call", default=None)
"""The request that the running task works for."""


def counting(
    generate: Callable[..., Any], scores: bool = True, sampling: SamplingConfig | None = None
) -> Callable[..., AsyncIterator[Any]]:
    """vLLM's `generate`, noting prompt and answer tokens in the request's `Call`; with the call's adapter.

    ValueError, which vLLM answers with 400, for what could end the engine.

    Args:
        scores: it can score prompts.
        sampling: the stop texts of requests for text that name none. vLLM's defaults for requests have no such field.
    """

    async def counted(prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        call, before = CALL.get(), [0] * (sampling_params.n or 1)
        is_delta = sampling_params.output_kind.name == "DELTA"
        is_text = sampling_params.detokenize and sampling_params.structured_outputs is None
        if sampling is not None and is_text and not sampling_params.stop:
            sampling_params.stop = list(sampling.stop)
            sampling_params.include_stop_str_in_output |= sampling.include_stop
        if sampling_params.prompt_logprobs is not None and not scores:
            raise ValueError("log-probabilities of the prompt are not given here")
        if call is not None and call.adapter is not None:
            options["lora_request"] = call.adapter.lora_request
        async with contextlib.aclosing(generate(prompt, sampling_params, request_id, **options)) as outputs:
            first = True
            async for output in outputs:
                if call is not None:
                    if first:
                        call.prompt_tokens += len(output.prompt_token_ids or ())
                    for one in output.outputs:
                        known = 0 if is_delta else before[one.index]
                        before[one.index] = len(one.token_ids)
                        call.tokens += len(one.token_ids) - known
                first = False
                yield output

    return counted


class Unwatched:
    """ASGI middleware of a replica's own port: Serve need not watch for clients that leave, vLLM does.

    Serve would do so in two tasks more for each request, and so two turns more of a busy event loop before it begins;
    and when it cancels what vLLM does for an answer that comes whole, vLLM's engine goes on with it. So clients cannot
    ask Serve for a timeout either. What is not vLLM's, Serve watches.
    """

    def __init__(self, app: AsgiApp):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if not _under_preferences(path):
            headers = [one for one in scope.get("headers", ()) if one[0] != b"x-request-timeout-seconds"]
            scope = {**scope, "headers": [*headers, (b"x-request-disconnect-disabled", b"?1")]}
        await self._app(scope, receive, send)


def replica_middlewares() -> list[Any]:
    """What Serve puts in front of a replica's own port; nothing in front of its proxies, which keep watching."""
    from ray import serve
    from starlette.middleware import Middleware

    try:
        serve.get_replica_context()
    except serve.exceptions.RayServeException:
        return []
    has_one_loop = os.environ.get("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD") == "0"
    return [Middleware(Unwatched)] if has_one_loop else []


class AtOnce(Executor):
    """In the place of the threads in which vLLM renders and tokenises: does so for a small request then and there.

    Each of the three times that it hands a request to a thread, this one waits for Python's lock, which a busy event
    loop gives up every 5 ms, and then for its turn in the loop: more than the work itself takes. A request whose work
    turns out to be more (a template can make a long text of a short body) goes on in the threads.
    """

    def __init__(self, threads: Executor):
        self._threads = threads

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        """A future, which the event loop takes as it is if it is one of its own."""
        call = CALL.get()
        if call is None or not 0 < call.body_bytes <= SMALL_BYTES or call.at_once_seconds >= AT_ONCE_SECONDS:
            return self._threads.submit(work, *arguments, **options)
        done, start = asyncio.get_running_loop().create_future(), time.perf_counter()
        try:
            done.set_result(work(*arguments, **options))
        except Exception as error:
            done.set_exception(error)
        call.at_once_seconds += time.perf_counter() - start
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Of the threads."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)


class Steerer(Protocol):
    """What the front asks about preferences (preferences.py); `owner` stands for the key."""

    async def answer(self, owner: str, method: str, name: str, data: Any) -> dict[str, Any] | Refusal:
        """To a request to PREFERENCES_PATH, or to `name` under it, with `data` as its body."""
        ...

    async def steer(self, owner: str, path: str, data: dict[str, Any], call: Call) -> str | Refusal:
        """Puts the configuration that its preferences come to into a body; what set it, "" if it names none.

        A user's adapter is put into `call`.
        """
        ...


class Frontend:
    """Pure ASGI, so that streams pass unbuffered. `keyring=None` lets everyone in."""

    def __init__(
        self,
        app: AsgiApp,
        catalogs: Mapping[str, Catalog],
        keyring: Keyring | None,
        counts: Counts,
        ended: Callable[[Call], None] = lambda call: None,
        listing: Mapping[str, Any] | None = None,
        preferences: Steerer | None = None,
        known: frozenset[str] = frozenset(),
        control: re.Pattern[str] | None = None,
    ):
        """`catalogs`: what each served model can be asked for, the default model first. `ended` hears of every request.

        `listing` is added to what `GET /v1/configurations` says. `known`: names of vLLM's own fields.
        `control`: finds a control token of the model in a text.
        """
        self._app, self._catalogs, self._keyring, self._counts, self._ended = app, catalogs, keyring, counts, ended
        self._listing, self._preferences, self._known = listing or {}, preferences, known
        self._control = control
        self._rubrics = frozenset(rubric.id for catalog in catalogs.values() for rubric in catalog.rubrics)
        self._page = PAGE.read_bytes()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        asked = method = scope.get("method", "")
        if method == "HEAD":
            method, send = "GET", _without_body(send)
            scope = {**scope, "method": method}
        if scope["type"] == "lifespan" or path == OPEN_PATH:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if method == "GET" and path in PAGE_PATHS:
            await _send(send, 200, self._page, b"text/html; charset=utf-8", [(b"content-security-policy", PAGE_POLICY)])
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
            method=asked,
            path=path,
            request_id=headers.get(b"x-request-id", b"").decode("latin-1"),
            time=time.time(),
        )
        start = time.perf_counter()
        receive_noted, send_noted = _noting(call, start, receive, send)
        token = CALL.set(call)
        try:
            if isinstance(key, Refusal):
                await _refuse(send_noted, key)
            elif not path.startswith(CLIENT_PATHS):
                await _send_error(send_noted, 404, f"there is nothing at {path[:100]}")
            elif method == "POST":
                await self._post(key, path, call, scope, receive_noted, send_noted)
            elif self._preferences is not None and _under_preferences(path):
                if not await self._refused(key, send_noted):
                    await self._answer(self._preferences, key, method, path, None, send_noted)
            elif (method, path) == ("GET", CONFIGURATIONS_PATH):
                default = next(iter(self._catalogs.values()))
                await _send_json(send_noted, 200, {**default.to_json(), **self._listing})
            elif (method, path) == ("GET", MODELS_PATH):
                await self._app(scope, receive, _edited(send_noted, self._with_saved))
            else:
                await self._app(scope, receive, send_noted)
        finally:
            CALL.reset(token)
            call.seconds = time.perf_counter() - start
            self._ended(call)
            if key is not None and isinstance(key, Key) and key.metered and call.prompt_tokens:
                await self._counts.charge(key, call.prompt_tokens + call.tokens)

    async def _post(self, key: Key | None, path: str, call: Call, scope: Message, receive: Receive, send: Send) -> None:
        if await self._refused(key, send):
            return
        try:
            body = await _read_body(scope, receive)
        except OverflowError:
            await _send_error(send, 413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.")
            return
        if body is None:
            return
        call.body_bytes, source, resolved = len(body), "", None
        try:
            self._check_address(scope)
            data = read_object(body)
            self._check_texts(path, data or {})
            if self._preferences is not None and _under_preferences(path):
                await self._answer(self._preferences, key, "POST", path, data, send)
                return
            if data is not None:
                self._check_fields(data)
                if self._preferences is not None:
                    steered = await self._preferences.steer(_owner(key), path, data, call)
                    if isinstance(steered, Refusal):
                        await _refuse(send, steered)
                        return
                    source = steered
                resolved = configure(path, data, self._catalogs)
                body = _written(data) if resolved else body
        except UserError as error:
            await _send_user_error(send, error)
            return
        if resolved is None:
            await self._app(scope, _replay(body, receive), send)
            return
        call.configuration = resolved.applied
        await self._app(_with_length(scope, len(body)), _replay(body, receive), _saying(resolved, source, send))

    async def _refused(self, key: Key | None, send: Send) -> bool:
        """Counts one request against a key's limits; True if they leave no room, which is answered."""
        refusal = await self._counts.admit(key) if key is not None and key.metered else None
        if refusal is not None:
            await _refuse(send, refusal)
        return refusal is not None

    def _check_fields(self, data: Mapping[str, Any]) -> None:
        """UserError for what would be passed over: a slip of the name of a field of ours, or one in the wrong place."""
        for name, value in data.items():
            if name in self._known or name in ("configuration", "preferences"):
                continue
            if name.lower() in ("extra_body", "extrabody") and value:
                raise UserError(
                    f"{name}: an argument of the openai client for Python, and no field of a body; "
                    "put what is in it beside `model` and `messages`"
                )
            if meant := _meant(name):
                raise UserError(f'{name[:MAX_NAME]}: no field is called so (did you mean "{meant}"?)')
            if name in self._rubrics:
                raise UserError(f'{name}: a rubric, not a field; put it into "configuration": {{"{name}": ...}}')
        if data.get("preferences") is not None and self._preferences is None:
            raise UserError("preferences: not offered by this server; name a configuration")
        messages = data.get("messages")
        for at, message in enumerate(messages if isinstance(messages, list) else ()):
            for name in ("configuration", "preferences"):
                if isinstance(message, dict) and name in message:
                    raise UserError(f"messages[{at}].{name}: not read here; put it beside `messages`")

    def _check_texts(self, path: str, data: Mapping[str, Any]) -> None:
        """UserError for a control token in what a chat template will render: it would end a turn and begin another."""
        for name in RENDERED if path not in RAW_PATHS else ():
            for text in strings_in(data.get(name)):
                if token := find_control_token(self._control, text):
                    raise UserError(
                        f"{name}: a text holds the control token {token!r}, which would end or begin a turn; "
                        "leave it out, or write it otherwise"
                    )

    def _check_address(self, scope: Message) -> None:
        """UserError for a configuration in the query or in a header."""
        for name, _ in parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True):
            if meant := _meant(name) or ("configuration" if name in self._rubrics else None):
                raise UserError(f'{name[:MAX_NAME]}: not read from the address; put "{meant}" into the body')
        for header, _ in scope["headers"]:
            if _meant(header.decode("latin-1").removeprefix("x-")):
                raise UserError(f"{header.decode('latin-1')[:MAX_NAME]}: not read from a header; put it into the body")

    async def _answer(
        self, preferences: Steerer, key: Key | None, method: str, path: str, body: Any, send: Send
    ) -> None:
        try:
            name = path.removeprefix(PREFERENCES_PATH).removeprefix("/")
            found = await preferences.answer(_owner(key), method, name, body)
        except UserError as error:
            await _send_user_error(send, error)
            return
        await (_refuse(send, found) if isinstance(found, Refusal) else _send_json(send, 200, found))

    def _with_saved(self, models: Any) -> Any:
        """vLLM's list of models, and every saved configuration as one more."""
        default, catalog = next(iter(self._catalogs.items()))
        found = next(one for one in models["data"] if one["id"] == default)
        models["data"] += [{**found, "id": CONFIGURED_PREFIX + name, "parent": default} for name in catalog.saved]
        return models


def open_to_pages(app: AsgiApp, arguments: Mapping[str, Any]) -> AsgiApp:
    """`app`, which pages of `allowed_origins` may ask and read; as it is if there are none.

    It is around all of it, not in vLLM's place behind the keys: a browser's preflight has no key, and a page that may
    not read a refusal cannot say why it was refused. The arguments are vLLM's.
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


def _under_preferences(path: str) -> bool:
    return path == PREFERENCES_PATH or path.startswith(f"{PREFERENCES_PATH}/")


def _owner(key: Key | None) -> str:
    """Of preferences; where there are no keys, all are everybody's."""
    return "everybody" if key is None else key.hash[:32]


# ---------------------------------------------------------------- bodies

_SURROGATES = (re.compile(rb"\\u[dD][89a-fA-F]"), re.compile(rb"\xed[\xa0-\xbf]"))
"""In UTF-8, as an escape (of a pair or not) and as such; two patterns, since a fixed beginning is searched for fast."""


def read_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that a body is; None for anything else, which is vLLM's to refuse.

    UserError for a name given twice, of which one value would be lost, and for half a character, which no tokenizer
    takes.
    """
    try:
        data = json.loads(body, object_pairs_hook=unique_names)
    except UserError:
        raise
    except (ValueError, RecursionError):
        return None
    is_wide = b"\0" in body[:4]  # UTF-16 or UTF-32
    may_have = is_wide or any(one.search(body) for one in _SURROGATES)
    if may_have and (where := _half_in(data) or _half_in_arguments(data)):
        raise UserError(f"{where}: holds half a character (a lone surrogate, like \\ud83d); send whole ones")
    return data if isinstance(data, dict) else None


def _half_in_arguments(data: Any) -> str | None:
    """The same, in the JSON texts of tool calls, which vLLM reads for the chat template."""
    messages = data.get("messages") if isinstance(data, dict) else None
    for at, message in enumerate(messages if isinstance(messages, list) else ()):
        with contextlib.suppress(AttributeError, KeyError, RecursionError, TypeError, ValueError):
            for call in message["tool_calls"]:
                if _half_in(json.loads(call["function"]["arguments"])) is not None:
                    return f"messages[{at}].tool_calls"
    return None


def _half_in(data: Any) -> str | None:
    """Where half a character is, like "messages[0].content"; None if there is none."""
    with contextlib.suppress(RecursionError):
        try:
            json.dumps(data, ensure_ascii=False).encode()
            return None
        except UnicodeEncodeError:
            pass
    left = [("", data)]
    while left:
        where, value = left.pop()
        if isinstance(value, str) and half_character(value):
            return where or "body"
        if isinstance(value, list):
            left += [(f"{where}[{at}]", one) for at, one in enumerate(value)]
        if isinstance(value, dict):
            if half_character(list(value)):
                return f"{where}.(a name)" if where else "(a name)"
            left += [(f"{where}.{name[:MAX_NAME]}".removeprefix("."), one) for name, one in value.items()]
    return None


@functools.lru_cache(1024)
def _meant(name: str) -> str | None:
    """The field of ours that a name looks like."""
    letters = re.sub("[^a-z]", "", name[:MAX_NAME].partition("[")[0].lower())
    for field, others in OTHER_NAMES.items():
        bare = letters.removeprefix("cpt") or letters
        is_near = bare[:1] == field[0] and difflib.SequenceMatcher(None, bare, field).ratio() >= NEAR
        if bare in others or is_near:
            return field
    return None


def configure(path: str, data: dict[str, Any], catalogs: Mapping[str, Catalog]) -> Resolved | None:
    """Puts the directive of the configuration that a body names into its messages; None if it names none.

    UserError for a bad configuration, or one where none is understood.
    """
    default, model = next(iter(catalogs)), data.get("model")
    named, text = _split_model(model, catalogs) if isinstance(model, str) else (None, "")
    if named is None and "configuration" not in data:
        return None
    if path not in CHAT_PATHS:
        raise UserError(f"configuration: not understood here; send it with messages to {CHAT_PATHS[0]}")
    if named is None:
        known = catalogs.get(model, catalogs[default]) if isinstance(model, str) else catalogs[default]
        resolved = known.resolve(data.pop("configuration"))
    elif "configuration" in data:
        raise UserError("configuration: given twice, also in the model's name; leave one out")
    else:
        try:
            resolved, data["model"] = catalogs[named].resolve_text(text), named
        except UserError as error:
            raise UserError(str(error).replace("configuration", "model", 1)) from None
    data["messages"] = policy_messages(resolved.directive, _checked_messages(data.get("messages")))
    return resolved


def _written(data: dict[str, Any]) -> bytes:
    try:
        return json.dumps(data).encode()
    except RecursionError:
        raise UserError("body: nested too deeply") from None


def _split_model(model: str, catalogs: Mapping[str, Catalog]) -> tuple[str | None, str]:
    """(served model, configuration) of a name like `cpt:ornament=high`, or `MODEL:ornament=high`; else (None, "")."""
    prefix, colon, text = model.partition(":")
    if not colon or model in catalogs:
        return None, ""
    if prefix == CONFIGURED_PREFIX[:-1]:
        return next(iter(catalogs)), text
    return (prefix, text) if prefix in catalogs else (None, "")


def _noting(call: Call, start: float, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """`receive` and `send`, noting in `call` the status, unless the client has left, and when the body began."""
    has_left = False

    async def receive_noted() -> Message:
        nonlocal has_left
        message = await receive()
        has_left = message["type"] == "http.disconnect"
        return message

    async def send_noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            call.status = 0 if has_left else message["status"]
        elif call.first_byte_seconds is None:
            call.first_byte_seconds = time.perf_counter() - start
        await send(message)

    return receive_noted, send_noted


def _saying(resolved: Resolved, source: str, send: Send) -> Send:
    """`send`, adding to a good answer what was applied: a header, and a field of the body (of a stream's first event).

    The field is spliced in behind the first brace, so that nothing is parsed and nothing held back.
    """
    said = {"applied": resolved.applied, "directive": resolved.directive} | ({"from": source} if source else {})
    added = f'"configuration": {json.dumps(said)}, '.encode()
    is_open = False

    async def send_applied(message: Message) -> None:
        nonlocal is_open
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (APPLIED_HEADER, json.dumps(resolved.applied).encode())]
            headers += [(SOURCE_HEADER, source.encode())] if source else []
            if message["status"] == 200:
                is_open = True
                headers = [
                    (name, str(int(value) + len(added)).encode() if name == b"content-length" else value)
                    for name, value in headers
                ]
            message = {**message, "headers": headers}
        elif is_open and b"{" in (body := message.get("body", b"")):  # a stream may begin with a comment
            is_open, brace = False, body.find(b"{") + 1
            message = {**message, "body": body[:brace] + added + body[brace:]}
        await send(message)

    return send_applied


def _edited(send: Send, edit: Callable[[Any], Any]) -> Send:
    """`send` for a small JSON answer that `edit` changes, if it is a good one."""
    start: Message = {}
    body = b""

    async def send_edited(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
            return
        body += message.get("body", b"")
        if not message.get("more_body", False):
            if start["status"] == 200:
                await _send_json(send, 200, edit(json.loads(body)))
            else:
                await send(start)
                await send({"type": "http.response.body", "body": body})

    return send_edited


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


def _without_body(send: Send) -> Send:
    """`send` for an answer to HEAD: the headers of GET's alone."""

    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head


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


async def _send(
    send: Send, status: int, body: bytes, content_type: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    known = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*known, *(headers or ())]})
    await send({"type": "http.response.body", "body": body})


async def _send_json(send: Send, status: int, data: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    await _send(send, status, json.dumps(data).encode(), b"application/json", headers)


async def _send_error(
    send: Send,
    status: int,
    text: str,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
) -> None:
    """OpenAI's error shape."""
    error = {"message": text, "type": "invalid_request_error", "param": param, "code": code}
    headers = [] if retry_after is None else [(b"retry-after", str(retry_after).encode())]
    await _send_json(send, status, {"error": error}, headers)


async def _send_user_error(send: Send, error: UserError) -> None:
    """Of a request: what is in front of the colon, if that is one word, is the field that is wrong."""
    param, colon, _ = str(error).partition(":")
    await _send_error(send, 400, str(error), param=param if colon and " " not in param else None)


async def _refuse(send: Send, refusal: Refusal) -> None:
    await _send_error(send, refusal.status, refusal.text, code=refusal.code, retry_after=refusal.retry_after)
