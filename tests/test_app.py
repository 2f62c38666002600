"""What a client is answered, around a toy app: every form of a configuration, bodies of any kind, streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from cpt_ray.config import SamplingConfig
from cpt_ray.errors import UserError
from cpt_ray.serving.asgi import MAX_BODY_BYTES
from cpt_ray.serving.call import Call
from cpt_ray.serving.request import RequestParser
from cpt_ray.serving.vllm_app import wrapped_generate
from tests.front import CATALOGS, CHAT, HIGH, KEY, SYSTEM, USER, ask, make_front


def test_what_was_applied_is_in_the_first_event_of_a_stream_even_behind_a_comment() -> None:
    parts = [b": keep-alive\n\n", b'data: {"id": 1}\n\n', b'data: {"id": 2}\n\n', b""]

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": part != b""})

    body = {"model": "m", "messages": USER, "configuration": {"ornament": "high"}}
    said = ask("POST", CHAT, front=make_front(stream), json=body).content.split(b"\n\n")
    assert [said[0], *said[2:]] == [b": keep-alive", b'data: {"id": 2}', b""]
    first = json.loads(said[1].removeprefix(b"data: "))
    assert first == {"id": 1, "configuration": {"applied": {"ornament": "high"}, "directive": HIGH}}


def test_the_directive_goes_in_front_and_the_length_fits() -> None:
    answer = ask("POST", CHAT, json={"model": "m", "messages": SYSTEM, "configuration": {"ornament": 99}, "seed": 7})
    seen = answer.json()
    assert seen["configuration"] == {"applied": {"ornament": "high"}, "directive": HIGH}
    messages = [{"role": "system", "content": f"{HIGH}\n\nBe brief."}, *USER]
    assert json.loads(seen["body"]) == {"model": "m", "messages": messages, "seed": 7}
    assert int(seen["headers"]["content-length"]) == len(seen["body"])
    assert json.loads(answer.headers["x-cpt-configuration"]) == {"ornament": "high"}


def test_a_system_message_in_parts_is_composed_as_its_text() -> None:
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    data = {"messages": [{"role": "system", "content": parts}, *USER], "configuration": {"ornament": 99}}
    asked = RequestParser(CATALOGS).parse(CHAT, data)
    assert asked.configuration is not None
    body = json.loads(asked.body(asked.configuration))
    assert body["messages"][0]["content"] == f"{HIGH}\n\nBe brief.\nBe kind."


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
        (CHAT, {"configuration": None}, "found nothing"),
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
    answer = ask("POST", CHAT, content=body)
    if answer.status_code == 400:
        assert len(answer.json()["error"]["message"].splitlines()) == 1
    elif "configuration" in answer.json():
        assert "configuration" not in json.loads(answer.json()["body"])
    else:
        assert answer.json()["body"].encode("latin-1") == body


@pytest.mark.parametrize(
    ("model", "given", "level"),
    [
        ("m", {"configuration": {"ornament": 88}}, "high"),
        ("m", {"configuration": "poet"}, "high"),
        ("cpt:ornament=high", {}, "high"),
        ("cpt:ornament=88", {}, "high"),
        ("m:ornament=29.5", {}, "low"),
        ("cpt:poet", {}, "high"),
    ],
)
def test_every_way_to_ask_for_a_configuration_gives_the_same_body(model: str, given: Any, level: str) -> None:
    answer = ask("POST", CHAT, json={"model": model, "messages": USER, **given})
    directive = f"Write in the {level} manner, please (a)."
    messages = [{"role": "system", "content": directive}, *USER]
    assert json.loads(answer.json()["body"]) == {"model": "m", "messages": messages}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("cpt:ornamet=high", "model: no rubric 'ornamet' (did you mean \"ornament\"?)"),
        ("cpt:ornament=hgih", "model.ornament: no level 'hgih' (did you mean \"high\"?)"),
        ("cpt:ornament=101", "model.ornament: 101.0 is not a score from 0 to 100"),
        ("cpt:poett", "model: no saved configuration 'poett' (did you mean \"poet\"?)"),
        ("cpt:ornament=low,ornament=high", "model: 'ornament' is asked for twice"),
        ("cpt:ornament=low,high", "model: 'high' is not rubric=level"),
    ],
)
def test_a_model_name_that_carries_no_configuration_is_refused(model: str, text: str) -> None:
    answer = ask("POST", CHAT, json={"model": model, "messages": USER})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, text)
    assert answer.json()["error"]["param"] == text.partition(":")[0]


def test_a_configuration_given_twice_is_refused() -> None:
    answer = ask("POST", CHAT, json={"model": "cpt:poet", "messages": USER, "configuration": {}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "configuration")


@given(st.text(max_size=40) | st.from_regex(r"(ornament|x)=[a-z0-9.]{0,6}(,[a-z]+=[a-z]+)?", fullmatch=True))
def test_any_model_name_is_rewritten_passed_or_refused(text: str) -> None:
    data = {"model": f"cpt:{text}", "messages": USER}
    try:
        asked = RequestParser(CATALOGS).parse(CHAT, data)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert asked.configuration is not None
        assert json.loads(asked.body(asked.configuration))["model"] == "m"


async def stream(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for event in (b'data: {"id": 1}\n\n', b'data: {"id": 2}\n\n', b"data: [DONE]\n\n"):
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def test_a_streams_first_event_says_what_was_applied_and_the_others_pass_as_they_are() -> None:
    answer = ask("POST", CHAT, front=make_front(stream), json={"model": "cpt:poet", "messages": USER, "stream": True})
    first, *others = answer.text.split("\n\n")
    assert json.loads(first.removeprefix("data: ")) == {
        "configuration": {"applied": {"ornament": "high"}, "directive": HIGH},
        "id": 1,
    }
    assert others == ['data: {"id": 2}', "data: [DONE]", ""]


@pytest.mark.parametrize(
    ("asked", "stop"),
    [
        ({}, ["."]),
        ({"stop": "x"}, ["x"]),
        ({"detokenize": False}, []),  # scores, which have no text
        ({"structured_outputs": StructuredOutputsParams(json={"type": "object"})}, []),
    ],
)
def test_a_request_that_names_no_stop_gets_the_evaluated_one(asked: dict[str, Any], stop: list[str]) -> None:
    seen: list[SamplingParams] = []

    async def generate(prompt: Any, params: SamplingParams, request_id: str) -> AsyncIterator[Any]:
        seen.append(params)
        for output in ():
            yield output

    async def go() -> None:
        wrapped = wrapped_generate(generate, sampling=SamplingConfig(stop=(".",), include_stop=True))
        async for _ in wrapped({}, SamplingParams(**asked), "id"):
            pass

    asyncio.run(go())
    assert (seen[0].stop, seen[0].include_stop_str_in_output) == (stop, stop == ["."])


def test_a_client_that_left_before_the_engine_was_reached_has_nothing_generated() -> None:
    begun: list[str] = []
    reached, rendered = asyncio.Event(), asyncio.Event()
    abandoned: list[asyncio.Task[None]] = []

    async def generate(prompt: Any, params: SamplingParams, request_id: str) -> AsyncIterator[Any]:
        begun.append(request_id)
        for output in ():
            yield output

    async def handle() -> None:
        reached.set()
        await rendered.wait()
        async for _ in wrapped_generate(generate)({}, SamplingParams(), "id"):
            pass

    async def leaves_its_handler_running(scope: Any, receive: Any, send: Any) -> None:
        """As vLLM 0.32 does (`with_cancellation`)."""
        abandoned.append(asyncio.create_task(handle()))
        await asyncio.shield(abandoned[0])

    async def go() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": json.dumps({"model": "m", "messages": USER}).encode()}

        async def send(message: Any) -> None:
            raise AssertionError("there is nobody to answer")

        scope = {
            "type": "http", "method": "POST", "path": CHAT, "query_string": b"",
            "headers": [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")],
        }  # fmt: skip
        request = asyncio.create_task(make_front(leaves_its_handler_running)(scope, receive, send))
        await reached.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        rendered.set()
        with pytest.raises(asyncio.CancelledError):
            await abandoned[0]

    asyncio.run(go())
    assert begun == []


def test_a_failure_of_the_servers_own_is_logged_as_500_and_not_as_a_client_that_left() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("the meter's node is away")

    async def fail_later(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise RuntimeError("nobody is there")

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    calls: list[Call] = []
    with pytest.raises(RuntimeError, match="away"):
        ask("POST", CHAT, front=make_front(fail, calls=calls), json={"messages": USER})
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/models",
        "headers": [(b"authorization", b"Bearer " + KEY.encode())],
    }
    with pytest.raises(RuntimeError, match="nobody"):
        asyncio.run(make_front(fail_later, calls=calls)(scope, leave, leave))
    assert [call.status for call in calls] == [500, 0]
