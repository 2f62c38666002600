"""Keys open what is for clients and keep their limits; a call is noted without a word of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.serving.call import CALL, Call
from cpt_ray.serving.keys import Meter, key_hash
from cpt_ray.tables.rundir import SPENT_FILE
from tests.front import AUTHORIZED, CHAT, KEY, USER, ask, echo, make_front, make_key

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
    for path in (CHAT, "/v1/models", "/v1/configurations", "/tokenize", "/metrics", "/docs", "/health/", "/base"):
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
    asyncio.run(make_front(echo)(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_key_opens_and_its_scheme_may_be_in_any_case() -> None:
    assert ask("GET", "/metrics").status_code == 200
    assert ask("GET", "/metrics", {"Authorization": f"bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize(("changes", "code"), [({"revoked": True}, "key_revoked"), ({"expires": 1.0}, "key_expired")])
def test_a_key_that_opens_no_more_is_forbidden(changes: dict[str, Any], code: str) -> None:
    answer = ask("GET", "/v1/models", front=make_front(echo, make_key(**changes)))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, code)


def chatter(tokens: int) -> Any:
    """An app that answers in so many tokens."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        call = CALL.get()
        assert call is not None
        call.prompt_tokens, call.tokens = tokens - 1, 1
        await echo(scope, receive, send)

    return app


def test_requests_and_tokens_per_minute_and_the_budget_are_kept(tmp_path: Path) -> None:
    now = 0.0
    meter = Meter(tmp_path / SPENT_FILE, lambda: now)

    def post(**limits: Any) -> tuple[int, str | None]:
        front = make_front(chatter(50), make_key(**limits), meter=meter)
        answer = ask("POST", CHAT, front=front, json={"messages": USER})
        return answer.status_code, answer.headers.get("retry-after")

    assert [post(name="a", requests_per_minute=2) for _ in range(3)] == [(200, None), (200, None), (429, "31")]
    assert post(name="b", requests_per_minute=2) == (200, None)
    now = 31.0
    assert post(name="a", requests_per_minute=2) == (200, None)
    assert [post(name="c", tokens_per_minute=60) for _ in range(3)] == [(200, None), (200, None), (429, "42")]
    now = 73.0
    assert post(name="c", tokens_per_minute=60) == (200, None)
    assert [post(name="d", budget=100)[0] for _ in range(3)] == [200, 200, 403]
    meter = Meter(tmp_path / SPENT_FILE, lambda: now)  # as after a restart
    assert [post(name="d", budget=101)[0] for _ in range(2)] == [200, 403]


def test_only_work_is_counted_against_a_key(tmp_path: Path) -> None:
    meter = Meter(tmp_path / SPENT_FILE, lambda: 0.0)
    front = make_front(echo, make_key(requests_per_minute=1, budget=10), meter=meter)
    assert [ask("GET", "/version", front=front).status_code for _ in range(3)] == [200, 200, 200]
    assert not (tmp_path / SPENT_FILE).exists()


def test_a_call_is_noted_with_its_key_and_configuration_but_no_word_of_it() -> None:
    calls: list[Call] = []
    front = make_front(chatter(50), calls=calls)
    ask(
        "POST",
        CHAT,
        front=front,
        json={"model": "cpt:poet", "messages": USER},
        headers={**AUTHORIZED, "x-request-id": "7"},
    )
    ask("POST", CHAT, {}, front=front)
    first, second = calls
    assert (first.key, first.status, first.configuration, first.request_id) == ("tests", 200, {"ornament": "high"}, "7")
    assert (first.prompt_tokens, first.tokens, first.first_byte_seconds is not None) == (49, 1, True)
    assert (second.key, second.status) == ("-", 401)
    assert "sea" not in repr(calls)


@pytest.mark.parametrize("path", ["/scale_elastic_ep", "/inference/v1/abort_requests", "/nowhere"])
def test_a_key_opens_only_what_is_for_clients(path: str) -> None:
    assert ask("POST", path, json={}).status_code == 404
    assert ask("POST", "/tokenize", json={}).status_code == 200
