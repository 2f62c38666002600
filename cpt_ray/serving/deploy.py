"""The tuned model on Ray Serve: `VllmServer` is what a replica holds, `serve_model` starts and stops it all."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import http.client
import io
import ipaddress
import json
import logging
import logging.handlers
import os
import re
import signal
import socket
import tempfile
import threading
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cpt_ray.chat.templates import control_tokens
from cpt_ray.cluster import starts_own_cluster
from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.console import progress, say
from cpt_ray.engines.engine import check_template, engine_arguments, engine_env
from cpt_ray.errors import UserError, did_you_mean, kind_of
from cpt_ray.rubrics.catalog import CATALOG_FILE, EXAMPLE_PROMPT, Catalog
from cpt_ray.serving.app import (
    CONFIGURATIONS_PATH,
    OPEN_PATH,
    PAGE_PATHS,
    AsgiApp,
    AtOnce,
    Call,
    Frontend,
    Steerer,
    counting,
    open_to_pages,
)
from cpt_ray.serving.keys import KEYS_FILE, SPENT_FILE, Key, Keyring, Meter, Refusal, key_hash, make_key
from cpt_ray.steering.inference import Candidates, make_candidates, read_questions
from cpt_ray.tables.rundir import RunDir

KEY_VARIABLE = "CPT_API_KEY"
APPLICATION = "cpt"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank."""
MAX_LOG_BYTES = 50 << 20
"""Size at which an access log begins a new file; four older ones are kept."""
MAX_CAUSE = 400
"""Characters shown of why a replica did not start."""
MAX_ONGOING_REQUESTS = 1024
"""Requests per replica that vLLM queues and batches itself; Serve holds back what is beyond."""
START_TIMEOUT_SECONDS = 1800.0
"""Loading and compiling a large model takes minutes; a node may have to start first."""
HEALTH_TIMEOUT_SECONDS = 60.0
"""From all replicas running to the first answer over HTTP."""
PROXY_PATH = "/-/healthz"
"""Serve's own: OPEN_PATH is a replica's, and would wake a server that has gone to 0."""
UPSCALE_SECONDS = 5.0
"""How long more load must last before a replica is added; Serve's own 30 s lets a queue build up."""
LEAST_LOOK_BACK_SECONDS = 11.0
"""Serve measures the load every 10 s and averages over more than one measurement."""
RECORD_SECONDS = 0.25
"""For which requests that ended are held before they are written and counted."""
LOOK_SECONDS = 1.0
"""How often a `cpt serve` looks whether another one has taken over."""
GARBAGE_OBJECTS = 20_000
"""After so many new objects a replica looks for garbage in cycles: Python's 700 come with every few tokens."""
Result = TypeVar("Result")

if TYPE_CHECKING:
    from cpt_ray.serving.conditioning import Conditioning


# ---------------------------------------------------------------- what a replica holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """All that a replica is told."""

    model: ModelConfig
    name: str
    """Of the engine's own model: the tuned one, or with adapters what they change."""
    catalogs: dict[str, Catalog]
    """What each served model can be asked for, the default model first."""
    adapters: dict[str, str]
    """Name to folder or URI."""
    frontend: dict[str, Any]
    """Arguments of vLLM's OpenAI server."""
    run: RunDir
    fixed_keys: tuple[Key, ...] | None
    """Keys beside those of the run directory; None lets everyone in."""
    listing: dict[str, Any]
    """What `GET /v1/configurations` says beside the catalog."""
    candidates: Candidates | None
    """What preferences are inferred among; None: there are no preferences."""
    conditioning: Conditioning | None = None
    """What steers by them in the place of directives."""


class VllmServer:
    """A vLLM engine and its OpenAI app; made a Serve deployment where it is placed.

    vLLM's asynchronous engine always lives in a process of its own, which ends when this one does.
    """

    def __init__(self, served: Served, meter: Any):
        self._served, self._meter = served, meter
        self._engine: Any = None
        self._record: Record | None = None

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
        from starlette.middleware.cors import CORSMiddleware
        from vllm import AsyncEngineArgs, SamplingParams
        from vllm.config import StructuredOutputsConfig
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.entrypoints.openai.models.protocol import LoRAModulePath
        from vllm.envs import enable_envs_cache
        from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        from cpt_ray.serving.conditioning import ENGINE_ARGUMENTS

        served = self._served
        arguments = {
            "default_chat_template_kwargs": served.model.chat_template_kwargs or None,
            "lora_modules": [LoRAModulePath(name, str(local_copy(at))) for name, at in served.adapters.items()],
            **served.frontend,
            "api_key": [""],  # none of vLLM's own, not even from VLLM_API_KEY: it would leave most paths open
        }
        known = [one.name for one in fields(FrontendArgs)]
        for name in arguments:
            if name not in known:
                raise UserError(f"serve.frontend.{name}: vLLM has no such argument{did_you_mean(name, known)}")
        frontend = FrontendArgs(**arguments)
        engine = dict(ENGINE_ARGUMENTS) if served.conditioning else {}
        engine |= engine_arguments(served.model)
        if isinstance(outputs := engine.get("structured_outputs_config"), dict):  # vLLM's batch engine does this itself
            engine["structured_outputs_config"] = StructuredOutputsConfig(**outputs)
        engine_args = AsyncEngineArgs(**engine, served_model_name=[served.name])
        args = argparse.Namespace(**(vars(frontend) | vars(engine_args)))
        try:
            self._engine = AsyncLLM.from_engine_args(engine_args)
            one_token = SamplingParams(max_tokens=1)  # some engines start well and die of their first request
            async for _ in self._engine.generate({"prompt_token_ids": [0]}, one_token, "first"):
                pass
        except (RuntimeError, EngineDeadError) as error:  # "See root cause above."
            await asyncio.sleep(1)  # the engine's process reports that it dies before it prints why
            raise UserError(_last_error_on_stderr() or str(error)) from None
        # vLLM 0.32 dies on a CPU of scoring a prompt with LoRA enabled
        scores = served.model.num_gpus > 0 or not engine.get("enable_lora")
        self._engine.generate = counting(self._engine.generate, scores, served.model.sampling)
        is_safe = isinstance(self._engine.renderer.tokenizer, ThreadSafeHFTokenizerMixin)  # beside vLLM's threads
        if is_safe and not frontend.trust_request_chat_template:
            threads = self._engine.renderer._executor  # what vLLM's functions are bound to; it keeps its own inside
            threads._inner = AtOnce(threads._inner)
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, supported_tasks=tasks, model_config=self._engine.model_config)
        _blame_bodies(app)
        # the first walks the routes for each request, to count what Record counts; the other is put around all of it
        dropped = (PrometheusInstrumentatorMiddleware, CORSMiddleware)
        app.user_middleware = [one for one in app.user_middleware if one.cls not in dropped]
        app.middleware_stack = app.build_middleware_stack()  # vLLM has built it before
        await init_app_state(self._engine, app.state, args, supported_tasks=tasks)
        enable_envs_cache()  # vLLM's server asks the environment anew for every request and answer
        gc.set_threshold(GARBAGE_OBJECTS)
        app.state.server = types.SimpleNamespace()  # vLLM tells uvicorn to exit through it; here check_health does
        keyring = None if served.fixed_keys is None else Keyring(served.run.path / KEYS_FILE, served.fixed_keys)
        meter, self._record = _Shared(self._meter), Record(served.run)
        control = control_tokens(self._engine.renderer.tokenizer)
        preferences, fields_of_vllm = self._preferences(), _fields_of(app)
        front = Frontend(
            app, served.catalogs, keyring, meter, self._record, served.listing, preferences, fields_of_vllm, control
        )
        return open_to_pages(front, served.frontend)

    def _preferences(self) -> Steerer | None:
        from cpt_ray.serving.conditioning import Conditioner
        from cpt_ray.serving.preferences import FOLDER, EngineScorer, PreferenceStore

        served = self._served
        if served.candidates is None:
            return None
        scorer = EngineScorer(self._engine, served.model)
        questions = read_questions(served.run, served.candidates)
        by = Conditioner(served.run, served.model, served.conditioning) if served.conditioning else None
        return PreferenceStore(served.run.path / FOLDER, served.candidates, scorer, questions, served.name, by)

    async def check_health(self) -> None:
        """Raises if the engine is dead: Serve then replaces this replica."""
        if self._engine is not None:
            await self._engine.check_health()

    def __del__(self) -> None:
        if self._record is not None:
            self._record.write()
        if self._engine is not None:
            self._engine.shutdown()


def _fields_of(app: Any) -> frozenset[str]:
    """The names of all fields that vLLM's routes know."""
    schemas = app.openapi().get("components", {}).get("schemas", {}).values()
    return frozenset(name for one in schemas for name in one.get("properties", ()))


def _blame_bodies(app: Any) -> None:
    """Answers 400, not vLLM's 500, where its validators stumble over a body (`"structured_outputs": 1`).

    What an endpoint itself raises, with a body that was read, stays a server error.
    """
    from fastapi.responses import JSONResponse

    async def handle(request: Any, error: Exception) -> Any:
        if any(frame.f_code.co_name == "run_endpoint_function" for frame, _ in traceback.walk_tb(error.__traceback__)):
            return await app.exception_handlers[Exception](request, error)
        text = f"The body has a field of the wrong kind ({error})."
        return JSONResponse({"error": {"message": text, "type": "BadRequestError", "param": None, "code": 400}}, 400)

    for kind in (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError):
        app.add_exception_handler(kind, handle)


class _Shared:
    """The one `Meter`, an actor, as a replica's front sees it."""

    def __init__(self, meter: Any):
        self._meter = meter

    async def admit(self, key: Key) -> Refusal | None:
        refusal: Refusal | None = await self._meter.admit.remote(key)
        return refusal

    async def charge(self, key: Key, tokens: int) -> None:
        self._meter.charge.remote(key, tokens)  # nobody waits for it


class Record:
    """Writes every request to the access log, one JSON object a line, and counts it for Prometheus.

    It does so for all that ended in a quarter of a second at once; so much is lost if the process is killed.
    """

    def __init__(self, run: RunDir):
        from ray.util import metrics

        self._requests = metrics.Counter("cpt_requests", "Requests, by key and status.", ("key", "status"))
        self._tokens = metrics.Counter("cpt_tokens", "Prompt and answer tokens, by key.", ("key", "kind"))
        self._configured = metrics.Counter("cpt_configured", "Requests that asked for a level.", ("rubric", "level"))
        bounds = [0.005 * 2**power for power in range(16)]
        self._first = metrics.Histogram("cpt_first_byte_seconds", "Until the answer begins.", bounds)
        self._whole = metrics.Histogram("cpt_request_seconds", "Until the answer ends.", bounds)
        path = run.path / "access" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = logging.Logger("cpt_ray.access")
        self._log.addHandler(logging.handlers.RotatingFileHandler(path, maxBytes=MAX_LOG_BYTES, backupCount=4))
        self._ended: list[Call] = []

    def __call__(self, call: Call) -> None:
        self._ended.append(call)
        if len(self._ended) == 1:
            asyncio.get_running_loop().call_later(RECORD_SECONDS, self.write)

    def write(self) -> None:
        """What is held."""
        calls, self._ended = self._ended, []
        if not calls:
            return
        self._log.info("\n".join(json.dumps(call.to_json()) for call in calls))
        tokens: Counter[tuple[str, str]] = Counter()
        for call in calls:
            tokens[call.key, "prompt"] += call.prompt_tokens
            tokens[call.key, "answer"] += call.tokens
            if call.first_byte_seconds is not None and call.tokens:
                self._first.observe(call.first_byte_seconds)
                self._whole.observe(call.seconds)
        for (key, status), count in Counter((call.key, str(call.status)) for call in calls).items():
            self._requests.inc(count, tags={"key": key, "status": status})
        for (key, kind), count in tokens.items():
            if count:
                self._tokens.inc(count, tags={"key": key, "kind": kind})
        levels = Counter(level for call in calls for level in call.configuration.items())
        for (rubric, level), count in levels.items():
            self._configured.inc(count, tags={"rubric": rubric, "level": level})


def local_copy(where: str) -> Path:
    """A folder on this machine: `where` itself, or a copy of what a URI (s3://, gs://, file://) names."""
    if "://" not in where:
        return Path(where)
    from pyarrow import fs

    target = tempfile.mkdtemp(prefix="cpt-adapter-")
    try:
        source, path = fs.FileSystem.from_uri(where)
        fs.copy_files(path, target, source_filesystem=source, destination_filesystem=fs.LocalFileSystem())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be copied ({error})") from None
    return Path(target)


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
    config: RunConfig,
    run: RunDir,
    api_key: str | None,
    block: bool = True,
    model: Path | None = None,
    insecure: bool = False,
    connecting: AbstractContextManager[None] | None = None,
) -> str:
    """Serves the run's model (or `model`) until Ctrl-C or SIGTERM and returns its base URL.

    `connecting` connects to Ray, once all is checked that can be without it; without one, Ray is connected already.

    Where a model is served already, this one takes its place, at the same address, without a request failing. The keys
    are the run's (`cpt keys`) and `api_key` (else CPT_API_KEY); if there are none, one is made here and printed once.
    `insecure` does without. With `block=False` it returns once the model answers; `ray.serve.shutdown()` then ends
    it. UserError, naming the cause, for whatever keeps it from starting.
    """
    served = _plan(config, run, model or run.model)
    fixed, made = _choose_keys(config.serve.host, run, api_key, insecure)
    served = replace(served, fixed_keys=fixed)
    if connecting is not None and starts_own_cluster():
        _free_port(config.serve.host, config.serve.port)
    with connecting or contextlib.nullcontext():
        return _serve(config, run, served, made, block)


def _serve(config: RunConfig, run: RunDir, served: Served, new_key: str | None, block: bool) -> str:
    from ray import serve

    before = serve.status()
    replaces = APPLICATION in before.applications
    if before.proxies and not replaces:
        raise UserError("Ray Serve already runs something else on this cluster; stop it first (serve shutdown --yes)")
    host = config.serve.host
    port = _running_port() if replaces else _on_head(_free_port, host, config.serve.port)
    url = f"http://{_reachable(host)}:{port}"
    with _interrupted_by_sigterm():
        try:
            targets = _targets(config, served)
            _start(config, targets, port)
            for name in set(before.applications) - {one.name for one in targets}:
                serve.delete(name)  # an untuned model that is no longer asked for
            asleep = config.serve.replicas.least == 0
            _on_head(_wait_until_healthy, url, PROXY_PATH if asleep else OPEN_PATH)
            _say_how_to_talk(config, served.catalogs, url, new_key, block)
            if block:
                _block(run)
        except BaseException as error:
            if not replaces or isinstance(error, KeyboardInterrupt):
                _stop(run)
            raise
    return url


def _block(run: RunDir) -> None:
    """Until Ctrl-C, which stops the server; or until another `cpt serve` has taken over, which keeps it."""
    from ray import serve

    deployed = serve.status().applications[APPLICATION].last_deployed_time_s
    try:
        while True:
            time.sleep(LOOK_SECONDS)
            found = serve.status().applications.get(APPLICATION)
            if found is None or found.last_deployed_time_s != deployed:
                say("the server was stopped" if found is None else "another `cpt serve` has taken over")
                return
    except KeyboardInterrupt:
        say("stopping")
        _stop(run)


def _meter_name(run: RunDir) -> str:
    """One per run directory: what a key has spent is written there."""
    return f"meter of {run.path}"


def _stop(run: RunDir) -> None:
    import ray
    from ray import serve

    with contextlib.redirect_stdout(io.StringIO()):  # where Ray reports that the controller, told to end, has ended
        serve.shutdown()
    with contextlib.suppress(ValueError):  # it never started
        ray.kill(ray.get_actor(_meter_name(run), namespace=APPLICATION))


def _plan(config: RunConfig, run: RunDir, model: Path) -> Served:
    """What is served, checked as far as can be without starting it."""
    serve, policy, name = config.serve, config.policy, config.name
    if serve.adapters:
        name, folders = f"{config.name}-base", {one: local_copy(where) for one, where in serve.adapters.items()}
        ranks = [_rank(one, folder) for one, folder in folders.items()]
        rank = next((one for one in LORA_RANKS if one >= max(ranks)), max(ranks))
        lora = {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": rank}
        policy = policy.model_copy(update={"engine": lora | policy.engine})
        catalogs = {one: _read_json(folder / CATALOG_FILE, _of_adapter(one)) for one, folder in folders.items()}
    else:
        if not (model / "config.json").exists():
            raise UserError(f"{model}: no model here; run `cpt train RUN_FILE` first")
        policy = policy.model_copy(update={"model": str(model)})
        catalogs = {name: _read_json(run.path / CATALOG_FILE, "run `cpt train RUN_FILE` first")}
    conditioning = None
    if serve.preferences != "directive":
        from cpt_ray.serving.conditioning import FORM, Conditioning
        from cpt_ray.steering.saved import SavedForm

        if serve.adapters:
            raise UserError("serve.preferences: only directives are offered beside serve.adapters; leave one out")
        embedder = config.steer.embedder or policy
        saved = SavedForm.read(run, FORM, policy, embedder)
        conditioning = Conditioning(saved=saved, embedder=embedder)
    if template := serve.frontend.get("chat_template"):  # the model's own is one that it was tuned with
        check_template(policy, str(template))
    offers = {one: Catalog.from_json(data).with_saved(serve.configurations) for one, data in catalogs.items()}
    base = {"path": "/base", "model": f"{config.name}-base"} if serve.base else None
    base = {"path": "", "model": name} if serve.adapters else base
    listing = {"model": next(iter(offers)), "base": base}
    return Served(
        model=policy.model_copy(update={"engine": _evaluated_sampling(policy) | policy.engine}),
        name=name,
        catalogs=offers,
        adapters=dict(serve.adapters),
        frontend=dict(serve.frontend),
        run=run,
        fixed_keys=None,
        listing=listing,
        candidates=None if serve.adapters else make_candidates(config, offers[name], policy),
        conditioning=conditioning,
    )


def _evaluated_sampling(policy: ModelConfig) -> dict[str, Any]:
    """Engine arguments that make a request which says nothing of sampling get what evaluation measured.

    Without stop texts, which are no engine argument (`counting` adds them), and without `max_tokens`, which vLLM would
    take as a limit for those who ask for more.
    """
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    asked = {"temperature": policy.sampling.temperature, "top_p": policy.sampling.top_p}
    return {"override_generation_config": {**neutral, **asked, "max_new_tokens": None}}


def _of_adapter(name: str) -> str:
    return f"serve.adapters.{name} takes the folder adapter/ of a run"


def _rank(name: str, folder: Path) -> int:
    """Of an adapter."""
    path = folder / "adapter_config.json"
    rank = _read_json(path, _of_adapter(name)).get("r")
    if not isinstance(rank, int):
        raise UserError(f"{path}: no rank `r` there; {_of_adapter(name)}")
    return rank


def _read_json(path: Path, remedy: str) -> Any:
    """The object in a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = "not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {what}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {kind_of(data)}; {remedy}")
    return data


def _choose_keys(
    host: str, run: RunDir, api_key: str | None, insecure: bool
) -> tuple[tuple[Key, ...] | None, str | None]:
    """(keys beside the run's own, the one that was made here); UserError if nothing would guard an open network."""
    if insecure:
        return None, None
    given = api_key or os.environ.get(KEY_VARIABLE)
    if given and not re.fullmatch(r"[!-~]+", given := given.strip()):  # a key read from a file ends in a line break
        raise UserError(f"{KEY_VARIABLE}: use printable ASCII characters without spaces, and at least one")
    if given:
        return (Key(name=KEY_VARIABLE, hash=key_hash(given), created=time.time()),), None
    spent = run.read_json(SPENT_FILE) or {}
    if any(key.state(spent.get(key.name, 0)) == "open" for key in Keyring(run.path / KEYS_FILE).keys):
        return (), None
    if not _is_loopback(host):
        raise UserError(
            f"serve.host: {host} is open to the network and there is no open key; make one (cpt keys add RUN_FILE "
            f"NAME), set {KEY_VARIABLE}, or let everyone in with --insecure"
        )
    key, secret = make_key("this-server")
    return (key,), secret


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _on_head(work: Callable[..., Result], *arguments: Any) -> Result:
    """`work(*arguments)` on the cluster's head node, where Serve listens: here, if this is it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    heads = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    if not heads or ray.get_runtime_context().get_node_id() in heads:
        return work(*arguments)
    there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
    try:
        done: Result = ray.get(ray.remote(num_cpus=0, scheduling_strategy=there)(work).remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return done


def _running_port() -> int:
    from ray.serve.context import _get_global_client

    return int(_get_global_client().http_config.port)


def _free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0; UserError if this machine cannot listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else "unknown host"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            remedy = f"serve.port={port + 1 if port < 65535 else port - 1}"
        else:
            remedy = "serve.host=127.0.0.1 for this machine alone, or 0.0.0.0 for its network"
        raise UserError(f"cannot listen on {host}:{port} ({why}); try another, as with {remedy}") from None


def _reachable(host: str) -> str:
    """The host as a URL on this machine has it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _start_meter(run: RunDir) -> Any:
    """The run's meter: the one that is there already, or a new one."""
    import ray

    return (
        ray.remote(Meter)
        .options(
            name=_meter_name(run),
            namespace=APPLICATION,
            get_if_exists=True,
            lifetime="detached",  # outlives a `cpt serve` that another one takes over from
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(run.path / SPENT_FILE)
    )


def _targets(config: RunConfig, served: Served) -> list[Any]:
    """The Serve applications: the tuned model and, if it is asked for, the untuned one."""
    from ray import serve

    policy, options = config.policy, config.serve
    count = 2 if (base := served.listing["base"]) and base["path"] else 1
    meter = _start_meter(served.run)
    least, most = options.replicas
    scaling: dict[str, Any] = {"num_replicas": most}
    if least != most:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "initial_replicas": max(least, 1),
                "max_replicas": most,
                "target_ongoing_requests": options.target_ongoing_requests,
                "upscale_delay_s": UPSCALE_SECONDS,
                "downscale_delay_s": options.idle_seconds,
                "look_back_period_s": min(30.0, max(options.idle_seconds, LEAST_LOOK_BACK_SECONDS)),
            }
        }
    deployment = serve.deployment(
        serve.ingress()(VllmServer),
        **scaling,
        ray_actor_options={
            "num_cpus": policy.num_cpus,
            "num_gpus": policy.num_gpus,
            "runtime_env": {"env_vars": engine_env(policy)},
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,  # what fails to start once fails again; after a first start Serve retries
        max_surge_percent=100 if _has_room(policy, count) else 0,  # newer weights start beside the older ones
    )
    quiet = _quiet_logging()
    tuned = deployment.options(name=APPLICATION).bind(served, meter)
    targets = [serve.RunTarget(tuned, name=APPLICATION, logging_config=quiet)]
    if count > 1:
        untuned = replace(
            served,
            model=served.model.model_copy(update={"model": policy.model}),
            name=base["model"],
            adapters={},
            catalogs={base["model"]: next(iter(served.catalogs.values()))},
            candidates=None,
            conditioning=None,
        )
        bound = deployment.options(name=base["model"]).bind(untuned, meter)
        targets.append(serve.RunTarget(bound, name=base["model"], route_prefix=base["path"], logging_config=quiet))
    return targets


def _has_room(policy: ModelConfig, count: int) -> bool:
    """Whether the cluster could hold so many more replicas now."""
    import ray

    free: dict[str, float] = ray.available_resources()
    return free.get("CPU", 0) >= policy.num_cpus * count and free.get("GPU", 0) >= policy.num_gpus * count


def _quiet_logging() -> Any:
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _start(config: RunConfig, targets: list[Any], port: int) -> None:
    """Deploys and waits until every replica runs; UserError with the replica's own reason if one cannot."""
    from ray import serve

    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    wanted = max(config.serve.replicas.least, 1)
    with progress("serve", wanted * len(targets), "replicas") as advance:
        advance(0, "starting Serve")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        http_options = {"host": config.serve.host, "port": port}
        serve.start(proxy_location="HeadOnly", http_options=http_options, logging_config=_quiet_logging())
        serve.run_many(targets, wait_for_applications_running=False)
        running = 0
        while True:
            applications = serve.status().applications
            found = [applications[one.name] for one in targets]
            parts = [part for one in found for part in one.deployments.values()]
            why = "\n".join([one.message for one in (*found, *parts)])
            before, running = running, sum(one.replica_states.get("RUNNING", 0) for one in parts)
            if all(one.status == "RUNNING" for one in found):
                advance(running - before, "")
                return
            advance(running - before, "no node has room yet" if "be scheduled" in why else "starting the engine")
            if any(one.status == "DEPLOY_FAILED" for one in found):
                raise UserError(f"the model cannot be served: {_last_error(why) or _end_of(why)}")
            if time.monotonic() > deadline:
                raise UserError(f"the model is not served after {START_TIMEOUT_SECONDS:.0f} s: {_end_of(why)}")
            time.sleep(0.25)


def _end_of(text: str) -> str:
    return " ".join(text.split())[-MAX_CAUSE:]


def _wait_until_healthy(url: str, path: str) -> None:
    deadline = time.monotonic() + HEALTH_TIMEOUT_SECONDS
    while True:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=HEALTH_TIMEOUT_SECONDS)
        try:
            connection.request("GET", path)
            found = f"status {connection.getresponse().status}"
        except OSError as error:
            found = str(error)
        finally:
            connection.close()
        if found == "status 200":
            return
        if time.monotonic() > deadline:
            raise UserError(f"{url}{path} does not answer after {HEALTH_TIMEOUT_SECONDS:.0f} s ({found})")
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


def _say_how_to_talk(
    config: RunConfig, catalogs: dict[str, Catalog], url: str, new_key: str | None, block: bool
) -> None:
    name, catalog = next(iter(catalogs.items()))
    example = json.dumps({rubric.id: rubric.levels[-1].name for rubric in catalog.rubrics[:1]})
    messages = json.dumps([{"role": "user", "content": EXAMPLE_PROMPT}])
    if new_key:
        say(f"API key (made for this server, shown only here): {new_key}\n  export {KEY_VARIABLE}={new_key}")
    say(f"""serving      {name} at {url}{" (Ctrl-C stops it)" if block else ""}
playground   {url}{PAGE_PATHS[1]}

curl {url}/v1/chat/completions -H "Authorization: Bearer ${KEY_VARIABLE}" -H "Content-Type: application/json" \\
  -d '{{"model": "{name}", "configuration": {example}, "messages": {messages}}}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="...")
client.chat.completions.create(model="{name}", messages={messages},
                               extra_body={{"configuration": {example}}})

What can be asked for:
curl {url}{CONFIGURATIONS_PATH} -H "Authorization: Bearer ${KEY_VARIABLE}\"""")
