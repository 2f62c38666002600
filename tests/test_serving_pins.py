"""What the server uses of vLLM 0.32 and Ray 2.60 without a promise of theirs: fails by name when it changes."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from typing import Any

import fastapi.routing
import pytest
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError
from ray.serve import context
from ray.serve._private import constants, haproxy_templates
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.haproxy import HAProxyManager
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.schema import DeploymentSchema
from vllm import SamplingParams
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.v1.engine.async_llm import AsyncLLM

from cpt_ray.serving.haproxy import running_serve, serve_env


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_vllms_app_is_made_by_the_same_two_functions() -> None:
    assert parameters(build_app) == ["args", "supported_tasks", "model_config"]
    assert parameters(init_app_state) == ["engine_client", "state", "args", "supported_tasks"]
    known = {field.name for field in dataclasses.fields(FrontendArgs)}
    assert known >= {"api_key", "allowed_origins", "allow_credentials", "lora_modules", "default_chat_template_kwargs"}


def test_all_of_vllms_routes_ask_the_engine_by_one_method() -> None:
    assert parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert "lora_request" in parameters(AsyncLLM.generate)
    params = SamplingParams()
    assert params.output_kind.name in ("CUMULATIVE", "DELTA", "FINAL_ONLY")
    assert (params.stop, params.include_stop_str_in_output, params.prompt_logprobs) == ([], False, None)


def test_vllm_still_goes_on_with_an_answer_whose_request_is_cancelled() -> None:
    """Else `Call.engine_tasks` is needed no more."""
    ended: list[str] = []

    async def handler(request: Any, raw_request: Any) -> None:
        await asyncio.sleep(0.02)
        ended.append("handler")

    class NeverLeft:
        async def receive(self) -> Any:
            await asyncio.Event().wait()

    async def go() -> None:
        task = asyncio.create_task(with_cancellation(handler)(None, NeverLeft()))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.05)

    asyncio.run(go())
    assert ended == ["handler"]


def test_fastapi_calls_endpoints_in_a_function_of_that_name() -> None:
    assert inspect.iscoroutinefunction(fastapi.routing.run_endpoint_function)


def test_ray_reads_every_variable_that_is_set() -> None:
    source = inspect.getsource(constants)
    assert [name for name in serve_env() if f'"{name}"' not in source] == []


def test_haproxy_repeats_requests_on_a_running_cluster_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = serve_env()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    names = ("RAY_SERVE_HAPROXY_RETRY_ON", "RAY_SERVE_HAPROXY_TUNE_BUFSIZE")
    assert [serve_env()[name] for name in names] == [own[name] for name in names]


def test_haproxys_retries_are_a_line_of_their_own_among_the_defaults() -> None:
    _, _, defaults = haproxy_templates.HAPROXY_CONFIG_TEMPLATE.partition("\ndefaults\n")
    assert "\n    retry-on {{ config.retry_on }}\n" in defaults.partition("\nfrontend ")[0]


def test_rays_client_knows_where_serve_listens() -> None:
    assert callable(_get_global_client)
    assert isinstance(ServeControllerClient.http_config, property)


def test_a_serve_that_somebody_has_shut_down_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfTheDead:
        def get_serve_details(self) -> Any:
            raise ActorDiedError

    assert parameters(_disconnect) == []
    monkeypatch.setattr(context, "_cached_client_from_current_session", lambda: True)
    monkeypatch.setattr(context, "_global_client", OfTheDead())
    assert running_serve() is None
    assert context._global_client is None


def test_rays_client_knows_who_deployed_what_behind_which_proxy() -> None:
    assert callable(ServeControllerClient.get_serve_details)
    assert HAProxyManager.__ray_metadata__.class_name == "HAProxyManager"
    assert "user_config" in DeploymentSchema.model_fields
    source = inspect.getsource(ActorHandle)
    assert "self._ray_actor_creation_function_descriptor = " in source
