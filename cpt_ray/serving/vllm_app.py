"""The tuned model in vLLM's own OpenAI app; all that touches the inside of vLLM's server is here, for vLLM 0.32."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import traceback
import types
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from cpt_ray.chat.templates import control_tokens
from cpt_ray.config import SamplingConfig
from cpt_ray.engines.vllm import engine_arguments
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.serving.access_log import CALL, AccessLog
from cpt_ray.serving.app import Frontend, Steerer
from cpt_ray.serving.asgi import AsgiApp, open_to_pages
from cpt_ray.serving.keys import KEYS_FILE, Key, Keyring, Refusal
from cpt_ray.serving.served import Served, local_copy
from cpt_ray.steering.inference import read_questions

MAX_CAUSE = 400
"""Characters shown of why a replica did not start."""


class VllmServer:
    """A vLLM engine and its OpenAI app; made a Serve deployment where it is placed.

    vLLM's asynchronous engine always lives in a process of its own, which ends when this one does.
    """

    def __init__(self, served: Served, meter: Any):
        self._served, self._meter = served, meter
        self._engine: Any = None
        self._record: AccessLog | None = None

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        from vllm import AsyncEngineArgs, SamplingParams
        from vllm.config import StructuredOutputsConfig
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.entrypoints.openai.models.protocol import LoRAModulePath
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        from cpt_ray.serving.conditioning import ENGINE_ARGUMENTS

        served = self._served
        arguments = {
            "default_chat_template_kwargs": served.model.chat_template_kwargs or None,
            "lora_modules": [LoRAModulePath(name, str(local_copy(at))) for name, at in served.adapters.items()],
            **served.frontend,
            "api_key": [""],  # none of vLLM's own, not even from VLLM_API_KEY: it would leave most paths open
            "allowed_origins": [],  # `open_to_pages` is around all of it, in front of the keys
            "allow_credentials": False,
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
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, supported_tasks=tasks, model_config=self._engine.model_config)
        _blame_bodies(app)
        app.middleware_stack = app.build_middleware_stack()  # handlers are in it, and vLLM has built it before
        await init_app_state(self._engine, app.state, args, supported_tasks=tasks)
        app.state.server = types.SimpleNamespace()  # vLLM tells uvicorn to exit through it; here check_health does
        keyring = None if served.fixed_keys is None else Keyring(served.run.path / KEYS_FILE, served.fixed_keys)
        meter, self._record = _Shared(self._meter), AccessLog(served.run)
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
        if call is not None and (task := asyncio.current_task()):
            call.work.add(task)
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
    found = re.findall(prefix + r"((?:[\w.]*\.)?\w*(?:Error|Exception): .+(?:\n[ \t]+\S.*)*)", text, re.MULTILINE)
    found = [" ".join(one.split()) for one in found if but not in one]
    last = re.sub(r"^(?:[\w.]+\.)?(?:(?:User|Runtime)Error: )?", "", found[-1]) if found else ""
    return last.partition(" [type=")[0][:MAX_CAUSE]  # pydantic repeats the whole input there
