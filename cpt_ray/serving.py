"""The tuned model on Ray Serve: vLLM's own OpenAI app, behind an API key, with configurations.

`Frontend` is the ASGI app that a client meets: it checks the key, turns a body's `"configuration"` into the system
message that the model was tuned on, and hands everything else to vLLM as it came. `VllmServer` is what a replica
holds; `serve_model` starts and stops it all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import http.client
import io
import json
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
import types
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.configuration import CATALOG_FILE, Catalog, Resolved
from cpt_ray.console import progress, say
from cpt_ray.engine import CPU_KV_CACHE_BYTES
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.prompting import policy_messages
from cpt_ray.rundir import RunDir

KEY_VARIABLE = "CPT_API_KEY"
MAX_BODY_BYTES = 10 << 20
CHAT_PATHS = ("/v1/chat/completions", "/tokenize")
"""Where a body may name a configuration; anywhere else one is an error, never silently ignored."""
CONFIGURATIONS_PATH = "/v1/configurations"
OPEN_PATH = "/health"
APPLIED_HEADER = b"x-cpt-configuration"
APPLICATION = "cpt"
MAX_CAUSE = 400
"""Characters shown of why a replica did not start."""
MAX_ONGOING_REQUESTS = 1024
"""Requests per replica that vLLM queues and batches itself; Serve holds back what is beyond."""
START_TIMEOUT_SECONDS = 1800.0
"""Loading and compiling a large model takes minutes; a node may have to start first."""
HEALTH_TIMEOUT_SECONDS = 60.0
"""From all replicas running to the first answer over HTTP."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]


# ---------------------------------------------------------------- what a client meets


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


# ---------------------------------------------------------------- what a replica holds


class VllmServer:
    """A vLLM engine and its OpenAI app; made a Serve deployment where it is placed.

    vLLM's asynchronous engine always lives in a process of its own, which ends when this one does.
    """

    def __init__(self, engine: dict[str, Any], frontend: dict[str, Any], catalog: dict[str, Any], hashed_key: str):
        self._engine_arguments, self._frontend_arguments = engine, frontend
        self._catalog, self._hashed_key = Catalog.from_json(catalog), hashed_key
        self._engine: Any = None

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        from vllm import AsyncEngineArgs, SamplingParams
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        known = list(AsyncEngineArgs.__dataclass_fields__)
        for name in self._engine_arguments:
            if name not in known:
                raise UserError(f"engine.{name}: vLLM has no such engine argument{did_you_mean(name, known)}")
        engine_args = AsyncEngineArgs(**self._engine_arguments)
        args = argparse.Namespace(**(vars(FrontendArgs(**self._frontend_arguments)) | vars(engine_args)))
        try:
            self._engine = AsyncLLM.from_engine_args(engine_args)
            one_token = SamplingParams(max_tokens=1)  # some engines start well and die of their first request
            async for _ in self._engine.generate({"prompt_token_ids": [0]}, one_token, "first"):
                pass
        except (RuntimeError, EngineDeadError) as error:  # "See root cause above."
            await asyncio.sleep(1)  # the engine's process reports that it dies before it prints why
            raise UserError(_last_error_on_stderr() or str(error)) from None
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, supported_tasks=tasks, model_config=self._engine.model_config)
        await init_app_state(self._engine, app.state, args, supported_tasks=tasks)
        app.state.server = types.SimpleNamespace()  # vLLM tells uvicorn to exit through it; here check_health does
        return Frontend(app, self._catalog, self._hashed_key)

    async def check_health(self) -> None:
        """Raises if the engine is dead: Serve then replaces this replica."""
        if self._engine is not None:
            await self._engine.check_health()

    def __del__(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()


def _last_error_on_stderr() -> str:
    """The last exception that this process's children printed: vLLM does not pass it on."""
    try:
        tail = Path(os.readlink("/proc/self/fd/2")).read_bytes()[-20_000:].decode(errors="replace")
    except OSError:
        return ""
    return _last_error(tail, but="Engine core initialization failed")


def _last_error(text: str, but: str = "\0") -> str:
    """`Kind: message`, in one line, of the last traceback in `text` whose message does not start with `but`."""
    prefix = r"^(?:\([^)]*\) |ERROR \S+ \S+ \[[^]]*\] |[^\w\n])*"
    found = re.findall(prefix + r"((?:[\w.]*\.)?\w*(?:Error|Exception): .+(?:\n[ \t]+\S.*)*)", text, re.MULTILINE)
    found = [" ".join(one.split()) for one in found if but not in one]
    last = re.sub(r"^(?:[\w.]+\.)?(?:(?:User|Runtime)Error: )?", "", found[-1]) if found else ""
    return last.partition(" [type=")[0][:MAX_CAUSE]  # pydantic repeats the whole input there


# ---------------------------------------------------------------- starting and stopping


def serve_model(
    config: RunConfig, run: RunDir, api_key: str | None, block: bool = True, model: Path | None = None
) -> str:
    """Serves the run's model (or `model`) until Ctrl-C or SIGTERM and returns its base URL; Ray must be connected.

    The key is `api_key`, else CPT_API_KEY, else made here and printed once. With `block=False` it returns as soon as
    the model answers; `ray.serve.shutdown()` then ends it. UserError, naming the cause, for whatever keeps it from
    starting.
    """
    from ray import serve

    model = model or run.model
    catalog = _load_catalog(run, model)
    key, made = _choose_key(api_key)
    if serve.status().proxies:
        raise UserError("Ray Serve already runs on this cluster; stop it first (serve shutdown --yes)")
    host, port = config.serve.host, _free_port(config.serve.host, config.serve.port)
    url = f"http://{_reachable(host)}:{port}"
    with _interrupted_by_sigterm():
        try:
            _start(config, _application(config, model, catalog, key_hash(key)), port)
            _wait_until_healthy(url)
            _say_how_to_talk(config, catalog, url, key if made else None, block)
        except BaseException:
            _stop()
            raise
        if block:
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                say("stopping")
            finally:
                _stop()
    return url


def _stop() -> None:
    from ray import serve

    with contextlib.redirect_stdout(io.StringIO()):  # where Ray reports that the controller, told to end, has ended
        serve.shutdown()


def _load_catalog(run: RunDir, model: Path) -> Catalog:
    if not (model / "config.json").exists():
        raise UserError(f"{model}: no model here; run `cpt train RUN_FILE` first")
    data = run.read_json(CATALOG_FILE)
    if data is None:
        raise UserError(f"{run.path / CATALOG_FILE}: not there; run `cpt train RUN_FILE` first")
    return Catalog.from_json(data)


def _choose_key(api_key: str | None) -> tuple[str, bool]:
    """(key, whether it was made here)."""
    given = api_key or os.environ.get(KEY_VARIABLE)
    if not given:
        return secrets.token_urlsafe(24), True
    if not re.fullmatch(r"[!-~]+", given):
        raise UserError(f"{KEY_VARIABLE}: use printable ASCII characters without spaces")
    return given, False


def _free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0; UserError if this machine cannot listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else "unknown host"
        raise UserError(
            f"cannot listen on {host}:{port} ({why}); choose another, as with serve.port={port + 1}"
        ) from None


def _reachable(host: str) -> str:
    """The host as a URL on this machine has it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _engine_arguments(config: ModelConfig, model: Path, name: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"seed": 0, **config.engine, "model": str(model), "served_model_name": [name]}
    if config.num_gpus == 0:
        arguments.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
    return arguments


def _application(config: RunConfig, model: Path, catalog: Catalog, hashed_key: str) -> Any:
    from ray import serve

    policy = config.policy
    frontend = {
        "default_chat_template_kwargs": policy.chat_template_kwargs or None,
        "api_key": [""],  # none of vLLM's own, not even from VLLM_API_KEY: it would leave most paths open
    }
    deployment = serve.deployment(
        serve.ingress()(VllmServer),
        name=APPLICATION,
        num_replicas=config.serve.replicas,
        ray_actor_options={"num_cpus": policy.num_cpus, "num_gpus": policy.num_gpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,  # what fails to start once fails again; after a first start Serve retries
    )
    return deployment.bind(_engine_arguments(policy, model, config.name), frontend, catalog.to_json(), hashed_key)


def _start(config: RunConfig, application: Any, port: int) -> None:
    """Deploys and waits until every replica runs; UserError with the replica's own reason if one cannot."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    with progress("serve", config.serve.replicas, "replicas") as advance:
        advance(0, "starting Serve")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        http_options = {"host": config.serve.host, "port": port}
        serve.start(proxy_location="HeadOnly", http_options=http_options, logging_config=quiet)
        target = serve.RunTarget(application, name=APPLICATION, logging_config=quiet)
        serve.run_many([target], wait_for_applications_running=False)
        running = 0
        while True:
            found = serve.status().applications[APPLICATION]
            parts = list(found.deployments.values())
            why = "\n".join([found.message, *(one.message for one in parts)])
            before, running = running, sum(one.replica_states.get("RUNNING", 0) for one in parts)
            if found.status == "RUNNING":
                advance(running - before, "")
                return
            advance(running - before, "no node has room yet" if "be scheduled" in why else "starting the engine")
            if found.status == "DEPLOY_FAILED":
                raise UserError(f"the model cannot be served: {_last_error(why) or _end_of(why)}")
            if time.monotonic() > deadline:
                raise UserError(f"the model is not served after {START_TIMEOUT_SECONDS:.0f} s: {_end_of(why)}")
            time.sleep(0.25)


def _end_of(text: str) -> str:
    return " ".join(text.split())[-MAX_CAUSE:]


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + HEALTH_TIMEOUT_SECONDS
    while True:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=HEALTH_TIMEOUT_SECONDS)
        try:
            connection.request("GET", OPEN_PATH)
            found = f"status {connection.getresponse().status}"
        except OSError as error:
            found = str(error)
        finally:
            connection.close()
        if found == "status 200":
            return
        if time.monotonic() > deadline:
            raise UserError(f"{url}{OPEN_PATH} does not answer after {HEALTH_TIMEOUT_SECONDS:.0f} s ({found})")
        time.sleep(0.1)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM (`ray job stop`, Kubernetes) ends what is inside as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_how_to_talk(config: RunConfig, catalog: Catalog, url: str, new_key: str | None, block: bool) -> None:
    example = json.dumps({rubric.id: rubric.levels[-1].name for rubric in catalog.rubrics[:1]})
    if new_key:
        say(f"API key (made for this server, shown only here): {new_key}\n  export {KEY_VARIABLE}={new_key}")
    say(f"""serving      {config.name} at {url}{" (Ctrl-C stops it)" if block else ""}

curl {url}/v1/chat/completions -H "Authorization: Bearer ${KEY_VARIABLE}" -H "Content-Type: application/json" \\
  -d '{{"model": "{config.name}", "configuration": {example}, "messages": [{{"role": "user", "content": "Hello"}}]}}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="...")
client.chat.completions.create(model="{config.name}", messages=[{{"role": "user", "content": "Hello"}}],
                               extra_body={{"configuration": {example}}})

What can be asked for: {url}{CONFIGURATIONS_PATH}""")
