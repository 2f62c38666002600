"""The tuned model on Ray Serve: `VllmServer` is what a replica holds, `serve_model` starts and stops it all."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.configuration import CATALOG_FILE, Catalog
from cpt_ray.console import progress, say
from cpt_ray.engine import engine_arguments, engine_env
from cpt_ray.errors import UserError
from cpt_ray.frontend import CONFIGURATIONS_PATH, OPEN_PATH, AsgiApp, Frontend, key_hash
from cpt_ray.rundir import RunDir

KEY_VARIABLE = "CPT_API_KEY"
APPLICATION = "cpt"
MAX_CAUSE = 400
"""Characters shown of why a replica did not start."""
MAX_ONGOING_REQUESTS = 1024
"""Requests per replica that vLLM queues and batches itself; Serve holds back what is beyond."""
START_TIMEOUT_SECONDS = 1800.0
"""Loading and compiling a large model takes minutes; a node may have to start first."""
HEALTH_TIMEOUT_SECONDS = 60.0
"""From all replicas running to the first answer over HTTP."""


# ---------------------------------------------------------------- what a replica holds


class VllmServer:
    """A vLLM engine and its OpenAI app; made a Serve deployment where it is placed.

    vLLM's asynchronous engine always lives in a process of its own, which ends when this one does.
    """

    def __init__(
        self, model: ModelConfig, name: str, frontend: dict[str, Any], catalog: dict[str, Any], hashed_key: str
    ):
        self._model, self._name, self._frontend_arguments = model, name, frontend
        self._catalog, self._hashed_key = Catalog.from_json(catalog), hashed_key
        self._engine: Any = None

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        from vllm import AsyncEngineArgs, SamplingParams
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        engine_args = AsyncEngineArgs(**engine_arguments(self._model), served_model_name=[self._name])
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
        raise UserError(f"cannot listen on {host}:{port} ({why}); try another, as with serve.port={port + 1}") from None


def _reachable(host: str) -> str:
    """The host as a URL on this machine has it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


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
        ray_actor_options={
            "num_cpus": policy.num_cpus,
            "num_gpus": policy.num_gpus,
            "runtime_env": {"env_vars": engine_env(policy)},
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,  # what fails to start once fails again; after a first start Serve retries
    )
    served = policy.model_copy(update={"model": str(model)})
    return deployment.bind(served, config.name, frontend, catalog.to_json(), hashed_key)


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
