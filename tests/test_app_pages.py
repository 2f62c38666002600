"""The page, pages of other origins, HEAD, and a front behind a prefix."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from cpt_ray.serving.asgi import with_cors
from tests.front import AUTHORIZED, CHAT, HIGH, USER, ask, echo, make_front

# ---------------------------------------------------------------- pages of other origins


PAGE_ORIGIN = "http://localhost:5173"
PREFLIGHT = {
    "Origin": PAGE_ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def from_page(front: Any, method: str, path: str, headers: dict[str, str], **given: Any) -> httpx.Response:
    opened = with_cors(front, {"allowed_origins": [PAGE_ORIGIN], "allow_credentials": True})
    return ask(method, path, {"Origin": PAGE_ORIGIN, **headers}, opened, **given)


@pytest.mark.parametrize("path", [CHAT, "/v1/configurations", "/v1/preferences", "/health", "/nowhere"])
def test_a_preflight_of_a_page_that_is_let_in_needs_no_key(path: str) -> None:
    answer = from_page(make_front(echo), "OPTIONS", path, PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE_ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"


async def models(scope: Any, receive: Any, send: Any) -> None:
    """Lists models as vLLM does."""
    body = b'{"data": [{"id": "m"}]}'
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("app", "method", "path", "headers", "status"),
    [
        (echo, "POST", CHAT, AUTHORIZED, 200),
        (echo, "POST", CHAT, {}, 401),
        (echo, "POST", f"{CHAT}?configuration=poet", AUTHORIZED, 400),
        (echo, "POST", "/nowhere", AUTHORIZED, 404),
        (echo, "GET", "/v1/configurations", AUTHORIZED, 200),
        (models, "GET", "/v1/models", AUTHORIZED, 200),
        (echo, "GET", "/playground", {}, 200),
        (echo, "HEAD", "/v1/configurations", AUTHORIZED, 200),
    ],
)
def test_a_page_that_is_let_in_reads_every_answer(
    app: Any, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answer = from_page(make_front(app), method, path, headers)
    assert answer.status_code == status
    assert answer.headers.get_list("access-control-allow-origin") == [PAGE_ORIGIN]
    exposed = {one.strip() for one in answer.headers["access-control-expose-headers"].split(",")}
    assert exposed >= {"x-cpt-configuration", "x-cpt-configuration-from", "retry-after"}


def test_a_page_that_is_not_let_in_reads_nothing() -> None:
    other = {**PREFLIGHT, "Origin": "http://elsewhere"}
    assert from_page(make_front(echo), "OPTIONS", CHAT, other).status_code == 400
    answer = from_page(make_front(echo), "GET", "/v1/configurations", {**AUTHORIZED, "Origin": "http://elsewhere"})
    assert "access-control-allow-origin" not in answer.headers
    front = make_front(echo)
    assert with_cors(front, {"allowed_origins": []}) is front
    assert ask("OPTIONS", CHAT, PREFLIGHT, front).status_code == 401


# ---------------------------------------------------------------- HEAD


@pytest.mark.parametrize("path", ["/", "/playground", "/health", "/version", "/v1/configurations"])
def test_head_is_get_without_a_body(path: str) -> None:
    head, get = ask("HEAD", path), ask("GET", path)
    assert (head.status_code, head.content, get.status_code) == (200, b"", 200)
    assert head.headers["content-length"] == str(len(get.content))


def test_head_needs_a_key_where_get_does() -> None:
    assert ask("HEAD", "/v1/configurations", {}).status_code == 401
    assert ask("HEAD", "/health", {}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/playground"])
def test_the_page_needs_no_key_and_may_load_nothing_from_elsewhere(path: str) -> None:
    answer = ask("GET", path, {})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'; connect-src 'self'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_behind_a_route_prefix_everything_is_where_it_was() -> None:
    async def go() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_front(echo), root_path="/base")
        async with httpx.AsyncClient(transport=transport, base_url="http://front/base") as client:
            closed = await client.get("/v1/configurations")
            listed = await client.get("/v1/configurations", headers=AUTHORIZED)
            asked = await client.post(CHAT, headers=AUTHORIZED, json={"model": "cpt:poet", "messages": USER})
            bare = await client.get("http://front/base")
            assert (bare.status_code, bare.headers["location"]) == (307, "/base/playground")
            return [closed, listed, asked, await client.get("/health")]

    closed, listed, asked, health = asyncio.run(go())
    assert [closed.status_code, listed.status_code, health.status_code] == [401, 200, 200]
    assert listed.json()["saved"] == {"poet": {"ornament": 88}}
    assert asked.json()["configuration"]["directive"] == HIGH
