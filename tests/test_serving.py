"""Serving: a client's configuration becomes the directive the model was tuned on; nothing opens without the key.

The front is tested by itself around a toy app, then with the real Ray Serve, the real vLLM and the openai client.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cpt_ray.cluster import connected
from cpt_ray.config import RunConfig
from cpt_ray.configuration import CATALOG_FILE, Catalog
from cpt_ray.errors import UserError
from cpt_ray.frontend import MAX_BODY_BYTES, Frontend, configured_body, key_hash
from cpt_ray.prompting import policy_messages, token_ids
from cpt_ray.rundir import RunDir
from cpt_ray.serving import serve_model
from tests.builders import make_directives, make_rubric
from tests.tiny_model import make_tiny_model

KEY = "a-test-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
CATALOG = Catalog.build([make_rubric()], make_directives())
HIGH = "Write in the high manner, please (a)."
USER: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]
SYSTEM: list[Any] = [{"role": "system", "content": "Be brief."}, *USER]
CHAT = "/v1/chat/completions"
TEMPLATE_KWARGS = {"shout": True}
ONE_GIB = 1 << 30


# ---------------------------------------------------------------- the front, around a toy app


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it was sent."""
    assert scope["type"] == "http"
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    seen = json.dumps({"path": scope["path"], "headers": headers, "body": body.decode("latin-1")}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": seen})


def ask(method: str, path: str, headers: dict[str, str] | None = None, **given: Any) -> httpx.Response:
    """One request to the front; the key is sent unless `headers` are given."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(Frontend(echo, CATALOG, key_hash(KEY)))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.request(method, path, headers=AUTHORIZED if headers is None else headers, **given)

    return asyncio.run(go())


WRONG_KEYS = [
    {},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": "Bearer"},
    {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": f"Bearer {key_hash(KEY)}"},
    {"x-api-key": KEY},
]


@pytest.mark.parametrize("headers", WRONG_KEYS)
def test_without_the_key_everything_but_health_is_closed(headers: dict[str, str]) -> None:
    for path in (CHAT, "/v1/models", "/v1/configurations", "/tokenize", "/metrics", "/docs", "/health/", "/"):
        for method in ("GET", "POST", "OPTIONS"):
            answer = ask(method, path, headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert ask("GET", "/health", headers).status_code == 200


def test_a_websocket_without_the_key_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("not to be read")

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(Frontend(echo, CATALOG, key_hash(KEY))(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_key_opens_and_its_scheme_may_be_in_any_case() -> None:
    assert ask("GET", "/metrics").status_code == 200
    assert ask("GET", "/metrics", {"Authorization": f"bearer {KEY}"}).status_code == 200


def test_the_directive_goes_in_front_and_the_length_fits() -> None:
    answer = ask("POST", CHAT, json={"model": "m", "messages": SYSTEM, "configuration": {"ornament": 99}, "seed": 7})
    seen = answer.json()
    messages = [{"role": "system", "content": f"{HIGH}\n\nBe brief."}, *USER]
    assert json.loads(seen["body"]) == {"model": "m", "messages": messages, "seed": 7}
    assert int(seen["headers"]["content-length"]) == len(seen["body"])
    assert json.loads(answer.headers["x-cpt-configuration"]) == {"ornament": "high"}


def test_a_system_message_in_parts_is_composed_as_its_text() -> None:
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    body = json.dumps({"messages": [{"role": "system", "content": parts}, *USER], "configuration": {"ornament": 99}})
    made, _ = configured_body(CHAT, body.encode(), CATALOG)
    assert json.loads(made)["messages"][0]["content"] == f"{HIGH}\n\nBe brief.\nBe kind."


BODIES = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"messages": 3}', b'{ "a":1 }', b'"configuration"']


@pytest.mark.parametrize("body", BODIES)
def test_a_body_without_a_configuration_passes_untouched(body: bytes) -> None:
    answer = ask("POST", CHAT, content=body)
    assert answer.status_code == 200
    assert answer.json()["body"].encode("latin-1") == body
    assert "x-cpt-configuration" not in answer.headers


@pytest.mark.parametrize(
    ("path", "changes", "text"),
    [
        (CHAT, {"configuration": {"ornament": "hgih"}}, "no level 'hgih' (did you mean \"high\"?)"),
        (CHAT, {"configuration": None}, "found a NoneType"),
        (CHAT, {"messages": None}, "messages: expected a list"),
        (CHAT, {"messages": ["Hello"]}, "messages: expected a list"),
        (CHAT, {"messages": [{"role": "system", "content": None}]}, "messages[0].content: expected text"),
        (CHAT, {"messages": [{"role": "system", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ("/v1/completions", {}, "configuration: not understood here; send it with messages to /v1/chat/completions"),
    ],
)
def test_a_configuration_that_cannot_be_applied_is_refused(path: str, changes: dict[str, Any], text: str) -> None:
    answer = ask("POST", path, json={"messages": USER, "configuration": {"ornament": "high"}} | changes)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert text in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", error["message"].partition(":")[0])


def test_too_large_a_body_is_refused_whether_announced_or_streamed() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 1):
            yield b" " * (1 << 20)

    assert ask("POST", CHAT, content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413
    assert ask("POST", CHAT, content=chunks()).status_code == 413
    assert ask("POST", CHAT, content=b" " * MAX_BODY_BYTES).status_code == 200


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
MESSAGES = JSON | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": JSON}))


@given(JSON | st.fixed_dictionaries({"configuration": JSON | st.just({"ornament": 1}), "messages": MESSAGES}))
def test_any_body_is_rewritten_passed_or_refused_but_never_an_accident(data: Any) -> None:
    body = json.dumps(data).encode()
    try:
        made, resolved = configured_body(CHAT, body, CATALOG)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert made == body if resolved is None else "configuration" not in json.loads(made)


# ---------------------------------------------------------------- the whole server


def make_config(run: RunDir, **changes: Any) -> RunConfig:
    engine = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": ONE_GIB // 16}
    policy = {"model": "unused", "engine": engine, "chat_template_kwargs": TEMPLATE_KWARGS}
    data = {
        "name": "tiny",
        "run_dir": str(run.path),
        "rubrics": ["unused"],
        "prompts": {"source": "unused"},
        "writer": {"model": "unused"},
        "policy": policy,
        "serve": {"port": 0, **changes},
    }
    return RunConfig.model_validate(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run directory as training leaves it, as far as serving reads it."""
    made = RunDir(tmp_path_factory.mktemp("run"))
    make_tiny_model(made.model)
    made.write_json(CATALOG_FILE, CATALOG.to_json())
    return made


@pytest.fixture(scope="module")
def url(run: RunDir) -> Iterator[str]:
    from ray import serve

    with connected():
        yield serve_model(make_config(run), run, KEY, block=False)
        serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def expected_ids(run: RunDir, directive: str | None, messages: Any) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    return token_ids(tokenizer, policy_messages(directive, messages), TEMPLATE_KWARGS)


@pytest.mark.parametrize(
    ("configuration", "directive"), [({"ornament": "high"}, HIGH), ({"ornament": 85}, HIGH), ({}, None), (None, None)]
)
@pytest.mark.parametrize("messages", [USER, SYSTEM], ids=["user", "system"])
def test_the_server_sees_the_same_tokens_as_training(
    client: openai.OpenAI, run: RunDir, configuration: Any, directive: str | None, messages: Any
) -> None:
    extra = {} if configuration is None else {"configuration": configuration}
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, extra_body={**extra, "return_token_ids": True}
    )
    assert (answer.model_extra or {})["prompt_token_ids"] == expected_ids(run, directive, messages)
    body = {"model": "tiny", "messages": messages, **extra}
    tokenized = httpx.post(f"{client.base_url.join('/tokenize')}", json=body, headers=AUTHORIZED, timeout=60)
    assert tokenized.json()["tokens"] == expected_ids(run, directive, messages)


def test_the_answer_says_what_was_applied(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=USER, max_tokens=4, extra_body={"configuration": {"ornament": 20}}
    )
    assert json.loads(raw.headers["x-cpt-configuration"]) == {"ornament": "low"}
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=USER, max_tokens=4)
    assert "x-cpt-configuration" not in raw.headers


def test_an_answer_streams_token_by_token_and_is_the_one_that_comes_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": USER,
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"configuration": {"ornament": "high"}, "ignore_eos": True},
    }
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert len(chunks) > 12
    whole = client.chat.completions.create(**options).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_a_wrong_key_is_an_authentication_error(url: str) -> None:
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Incorrect or missing API key"):
        wrong.models.list()
    for path in ("/metrics", "/tokenize", "/docs", "/openapi.json"):
        assert httpx.get(f"{url}{path}").status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200


def test_an_unknown_level_is_a_bad_request_with_the_nearest_one(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=USER, extra_body={"configuration": {"ornament": "hihg"}})
    assert 'did you mean "high"?' in raised.value.message
    assert raised.value.param == "configuration.ornament"


def test_models_and_configurations_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert Catalog.from_json(client.get("/configurations", cast_to=object)) == CATALOG


@pytest.mark.parametrize("body", [*BODIES, b'{"messages": [], "configuration": {}}', b" " * (MAX_BODY_BYTES + 1)])
def test_no_body_makes_the_server_fail(url: str, body: bytes) -> None:
    headers = {**AUTHORIZED, "Content-Type": "application/json"}
    assert 400 <= httpx.post(f"{url}{CHAT}", content=body, headers=headers, timeout=60).status_code < 500
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200


def test_a_second_server_on_the_cluster_is_refused(url: str, run: RunDir) -> None:
    with pytest.raises(UserError, match="already runs on this cluster"):
        serve_model(make_config(run), run, KEY, block=False)


# ---------------------------------------------------------------- what keeps it from starting


def test_a_taken_port_is_said_before_anything_starts(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve
    from ray.serve.schema import ServeStatus

    monkeypatch.setattr(serve, "status", ServeStatus)  # as on a cluster without Serve
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as raised:
            serve_model(make_config(run, port=port), run, KEY, block=False)
    where = f"127.0.0.1:{port} (Address already in use)"
    assert str(raised.value) == f"cannot listen on {where}; try another, as with serve.port={port + 1}"


@pytest.mark.parametrize(("left_out", "named"), [("model", "model: no model here"), (CATALOG_FILE, "not there")])
def test_a_run_that_was_not_trained_is_told_what_to_do(tmp_path: Path, left_out: str, named: str) -> None:
    made = RunDir(tmp_path)
    steps: dict[str, Callable[[], Any]] = {
        "model": lambda: made.write_json("model/config.json", {}),
        CATALOG_FILE: lambda: made.write_json(CATALOG_FILE, CATALOG.to_json()),
    }
    steps.pop(left_out)
    for step in steps.values():
        step()
    with pytest.raises(UserError, match=rf"{named}.*; run `cpt train RUN_FILE` first"):
        serve_model(make_config(made), made, KEY, block=False)
