"""The tuned model in vLLM's own OpenAI app; all that touches the inside of vLLM's server is here, for vLLM 0.32."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import re
import secrets
import traceback
import types
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_ray.chat.templates import control_tokens
from cpt_ray.config import SamplingConfig
from cpt_ray.engines.vllm import engine_arguments
from cpt_ray.engines.waiting import AT_WORK, STARTING
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.serving.access_log import AccessLog
from cpt_ray.serving.app import ConfiguredApp
from cpt_ray.serving.asgi import AsgiApp, Json, Refusal, with_cors
from cpt_ray.serving.call import CALL, Call
from cpt_ray.serving.keys import Key, Keyring
from cpt_ray.serving.served import Served, check_whole
from cpt_ray.steering.inference import read_questions
from cpt_ray.tables.node_cache import local_copy
from cpt_ray.tables.rundir import KEYS_FILE

if TYPE_CHECKING:
    from cpt_ray.serving.preferences import PreferenceStore

MAX_CAUSE = 400
"""Characters shown of why a replica did not start."""


class VllmServer:
    """A vLLM engine and its OpenAI app; made a Serve deployment where it is placed.

    vLLM's asynchronous engine always lives in a process of its own, which ends when this one does.
    """

    def __init__(self, served: Served, meter: Any):
        self._served, self._meter = served, meter
        self._engine: Any = None
        self._log: AccessLog | None = None

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        """What `serve.ingress()` without an app asks a replica for: only there is an engine, and its event loop."""
        from ray import serve

        served = self._served
        frontend, engine = _frontend_arguments(served), _engine_arguments(served)
        beats = served.pulse.start(secrets.token_hex(8), STARTING) if served.pulse else None
        self._engine = await _start(engine)
        if beats:
            beats.end(AT_WORK)
        # vLLM 0.32 dies on a CPU of scoring a prompt with LoRA enabled
        can_score = served.model.num_gpus > 0 or not engine.enable_lora
        # the one method that all of vLLM's routes call, and that no setting or middleware could change
        self._engine.generate = wrapped_generate(self._engine.generate, can_score, served.model.sampling)
        app = await _openai_app(self._engine, argparse.Namespace(**(vars(frontend) | vars(engine))))
        keyring = None if served.fixed_keys is None else Keyring(served.run.path / KEYS_FILE, served.fixed_keys)
        self._log = AccessLog(served.run, serve.get_replica_context().app_name)
        app_with_keys = ConfiguredApp(
            app,
            served.catalogs,
            keyring,
            _SharedMeter(self._meter),
            self._log,
            served.listing_extras,
            self._preferences(),
            _fields_of(app),
            control_tokens(self._engine.renderer.tokenizer),
        )
        return with_cors(app_with_keys, served.frontend)

    def _preferences(self) -> PreferenceStore | None:
        from cpt_ray.serving.conditioning import Conditioner
        from cpt_ray.serving.preferences import EngineScorer, PreferenceStore

        served = self._served
        if served.candidates is None:
            return None
        scorer = EngineScorer(self._engine, served.model)
        questions = read_questions(served.run, served.candidates)
        conditioner = Conditioner(served.run, served.model, served.conditioning) if served.conditioning else None
        return PreferenceStore(served.run.preferences, served.candidates, scorer, questions, conditioner)

    def reconfigure(self, mark: Any) -> None:
        """Does nothing: Serve wants it where a deployment has a user_config, here the mark of who deployed it."""

    async def check_health(self) -> None:
        """Raises if the engine is dead: Serve then replaces this replica."""
        if self._engine is not None:
            await self._engine.check_health()

    def __del__(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._engine is not None:
            self._engine.shutdown()


def _frontend_arguments(served: Served) -> Any:
    """vLLM's `FrontendArgs`; UserError for one that it has not."""
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    arguments = {
        "default_chat_template_kwargs": served.model.chat_template_kwargs or None,
        "lora_modules": [LoRAModulePath(name, str(local_copy(where))) for name, where in served.adapters.items()],
        **served.frontend,
        "api_key": [""],  # none of vLLM's own, not even from VLLM_API_KEY: it would leave most paths open
        "allowed_origins": [],  # `with_cors` does this in front of the keys, where a preflight gets an answer
        "allow_credentials": False,
    }
    known = [field.name for field in fields(FrontendArgs)]
    for name in arguments:
        if name not in known:
            raise UserError(f"serve.frontend.{name}: vLLM has no such argument{did_you_mean(name, known)}")
    return FrontendArgs(**arguments)


def _engine_arguments(served: Served) -> Any:
    """vLLM's `AsyncEngineArgs`; UserError if the model is not whole: a training may replace it at any time."""
    from vllm import AsyncEngineArgs
    from vllm.config import StructuredOutputsConfig

    from cpt_ray.serving.conditioning import ENGINE_ARGUMENTS

    check_whole(served.run, served.model.model, served.run.model)  # before a copy takes the place of a whole one
    arguments = (ENGINE_ARGUMENTS if served.conditioning else {}) | engine_arguments(served.model)
    check_whole(served.run, served.model.model, Path(arguments["model"]))
    if isinstance(outputs := arguments.get("structured_outputs_config"), dict):  # vLLM's batch engine does this itself
        arguments["structured_outputs_config"] = StructuredOutputsConfig(**outputs)
    return AsyncEngineArgs(**arguments, served_model_name=[served.name])


def set_up_logging(arguments: Any) -> None:
    """vLLM's own set-up, before an engine does it, and without taking their files from Serve's handlers.

    It closes every handler of the process, and a closed `MemoryHandler` has no target. A controller that is started
    anew, as on a new head, asks each replica for its log file, and ends one that has none (Ray 2.60).
    """
    from vllm.logger import configure_logging_if_needed

    handlers = [it for it in logging.getLogger("ray.serve").handlers if isinstance(it, MemoryHandler)]
    files = [handler.target for handler in handlers]
    configure_logging_if_needed(arguments.create_logging_config())  # which a later call with the same leaves alone
    for handler, file in zip(handlers, files, strict=True):
        handler.setTarget(file)


async def _start(arguments: Any) -> Any:
    """An engine that has answered once; UserError with the reason why it cannot."""
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    set_up_logging(arguments)
    try:
        engine = AsyncLLM.from_engine_args(arguments)
        one_token = SamplingParams(max_tokens=1)  # some engines start well and die of their first request
        async for _ in engine.generate({"prompt_token_ids": [0]}, one_token, "first"):
            pass
    except (RuntimeError, EngineDeadError) as error:  # "See root cause above."
        await asyncio.sleep(1)  # the engine's process reports that it dies before it prints why
        raise UserError(_last_error_on_stderr() or str(error)) from None
    return engine


async def _openai_app(engine: Any, arguments: argparse.Namespace) -> Any:
    """vLLM 0.32's own app, as its `run_server` makes it, without the uvicorn that it would run in."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await engine.get_supported_tasks()
    app = build_app(arguments, supported_tasks=tasks, model_config=engine.model_config)
    _answer_400_for_bad_bodies(app)
    app.middleware_stack = app.build_middleware_stack()  # handlers are in it, and vLLM has built it before
    await init_app_state(engine, app.state, arguments, supported_tasks=tasks)
    app.state.server = types.SimpleNamespace()  # vLLM tells uvicorn to exit through it; here check_health does
    return app


def _fields_of(app: Any) -> frozenset[str]:
    """The names of all fields that vLLM's routes know."""
    schemas = app.openapi().get("components", {}).get("schemas", {}).values()
    return frozenset(name for schema in schemas for name in schema.get("properties", ()))


def _answer_400_for_bad_bodies(app: Any) -> None:
    """Answers 400, not vLLM's 500, where its validators stumble over a body (`"structured_outputs": 1`).

    What an endpoint itself raises, with a body that was read, stays a server error. FastAPI has no other mark of which
    of the two it is than the function that calls endpoints.
    """

    async def handle(request: Any, error: Exception) -> Any:
        if any(frame.f_code.co_name == "run_endpoint_function" for frame, _ in traceback.walk_tb(error.__traceback__)):
            return await app.exception_handlers[Exception](request, error)
        text = f"The body has a field of the wrong kind ({error})."
        return Json({"error": {"message": text, "type": "BadRequestError", "param": None, "code": 400}}, 400)

    for kind in (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError):
        app.add_exception_handler(kind, handle)


class _SharedMeter:
    """The one `Meter`, an actor, as a replica asks it."""

    def __init__(self, meter: Any):
        self._meter = meter

    async def admit(self, key: Key) -> Refusal | None:
        refusal: Refusal | None = await self._meter.admit.remote(key)
        return refusal

    async def charge(self, key: Key, tokens: int) -> None:
        self._meter.charge.remote(key, tokens)  # nobody waits for it


def wrapped_generate(
    generate: Callable[..., Any], can_score: bool = True, sampling: SamplingConfig | None = None
) -> Callable[..., AsyncIterator[Any]]:
    """vLLM's `generate`: with the user's adapter and the default stop texts, and with tokens counted in the `Call`.

    ValueError, which vLLM answers with 400, for what could end the engine.

    Args:
        can_score: whether the engine can give log-probabilities of prompts.
        sampling: the stop texts of requests for text that name none. vLLM's defaults for requests have no such field.
    """

    async def counted(prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        is_text = sampling_params.detokenize and sampling_params.structured_outputs is None
        if sampling is not None and is_text and not sampling_params.stop:
            sampling_params.stop = list(sampling.stop)
            sampling_params.include_stop_str_in_output |= sampling.include_stop
        if sampling_params.prompt_logprobs is not None and not can_score:
            raise ValueError("this model gives no log-probabilities of prompts (prompt_logprobs)")
        call = CALL.get()
        if call is not None and call.is_left:
            raise asyncio.CancelledError
        if call is not None and (task := asyncio.current_task()):
            call.engine_tasks.add(task)
        if call is not None and call.adapter is not None:
            options["lora_request"] = call.adapter.lora_request
        count = _counter(call, sampling_params)
        async with contextlib.aclosing(generate(prompt, sampling_params, request_id, **options)) as outputs:
            async for output in outputs:
                count(output)
                yield output

    return counted


def _counter(call: Call | None, sampling_params: Any) -> Callable[[Any], None]:
    """Adds the tokens of each output of one request to the engine."""
    seen: Counter[int] = Counter()  # tokens of each answer so far, where outputs have all and not the new ones
    is_delta = sampling_params.output_kind.name == "DELTA"
    is_first = True

    def count(output: Any) -> None:
        nonlocal is_first
        if call is None:
            return
        if is_first:
            call.prompt_tokens += len(output.prompt_token_ids or ())
            is_first = False
        for answer in output.outputs:
            call.tokens += len(answer.token_ids) - seen[answer.index]
            if not is_delta:
                seen[answer.index] = len(answer.token_ids)

    return count


def _last_error_on_stderr() -> str:
    """The last exception that this process's children printed: vLLM does not pass it on."""
    try:
        tail = Path(os.readlink("/proc/self/fd/2")).read_bytes()[-20_000:].decode(errors="replace")
    except OSError:
        return ""
    return last_error(tail, but="Engine core initialization failed")


def last_error(text: str, but: str = "\0") -> str:
    """`Kind: message`, in one line, of the last traceback in `text` whose message does not start with `but`."""
    prefix = r"^(?:\([^)]*\) |ERROR \S+ \S+ \[[^]]*\] |[^\w\n])*"
    errors = re.findall(prefix + r"((?:[\w.]*\.)?\w*(?:Error|Exception): .+(?:\n[ \t]+\S.*)*)", text, re.MULTILINE)
    errors = [" ".join(error.split()) for error in errors if but not in error]
    last = re.sub(r"^(?:[\w.]+\.)?(?:(?:User|Runtime)Error: )?", "", errors[-1]) if errors else ""
    return last.partition(" [type=")[0][:MAX_CAUSE]  # pydantic repeats the whole input there
