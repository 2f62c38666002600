"""Somebody else's server as an engine: its misbehaviour is waited out, reported or a reject, never a made-up answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from cpt_ray.cluster import unused_port
from cpt_ray.config import ModelConfig
from cpt_ray.engines.engine import Request, check_schema_is_enforced
from cpt_ray.engines.openai import REFUSED_ALIKE, OpenAIEngine, Pace
from cpt_ray.engines.vllm import TIGHT_JSON
from cpt_ray.errors import UserError
from tests.misbehaving import ASK, EXTRA, KEY, Server, completion, fine, one_of, reply
from tests.tiny_model import make_tiny_model


def busy(handler: BaseHTTPRequestHandler) -> None:
    reply(handler, 429, '{"error": {"message": "slow down"}}', Retry_After="1")


def broken(handler: BaseHTTPRequestHandler) -> None:
    reply(handler, 500, "oh no")


def hanging(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)


def cut_off_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion(handler)[:80].encode())


def half_json(handler: BaseHTTPRequestHandler) -> None:
    reply(handler, 200, completion(handler)[:80])


def test_a_misbehaving_server_is_asked_again_and_no_answer_is_lost_or_mixed_up() -> None:
    server = Server(busy, broken, hanging, cut_off_body, half_json)
    requests = [
        Request(messages=[{"role": "user", "content": f"text {at}"}], max_tokens=9, seed=at) for at in range(20)
    ]
    engine = server.engine(concurrency=5)
    with ThreadPoolExecutor(2) as threads:  # as an actor with two shards in flight
        done = [one for part in threads.map(engine.run, (requests[:10], requests[10:])) for one in part]
    assert [one.text for one in done] == [f"TEXT {at}" for at in range(20)]
    assert (done[0].num_prompt_tokens, done[0].num_cached_tokens, done[0].num_tokens) == (10, 4, 3)
    assert server.most_at_once <= 5
    assert {key for key, _ in server.seen} == {f"Bearer {KEY}"}


def test_retry_after_is_honoured() -> None:
    server = Server(busy)
    assert server.engine().run([Request(messages=ASK, max_tokens=9)])[0].text == "WRITE."
    assert server.times[1] - server.times[0] >= 1


def test_a_server_that_stays_down_ends_the_run_and_rejects_nothing() -> None:
    with pytest.raises(UserError, match=r"gave up; the last error was InternalServerError \(Error code: 500") as caught:
        Server(*[broken] * 9).engine(max_retries=1).run([Request(messages=ASK, max_tokens=9)] * 3)
    assert KEY not in str(caught.value)
    with pytest.raises(UserError, match="its response is not a chat completion"):
        Server(*[half_json] * 9).engine(max_retries=1).run([Request(messages=ASK, max_tokens=9)])
    with pytest.raises(UserError, match=r"the key in \$X is refused"):
        Server(lambda one: reply(one, 401, "{}")).engine().run([Request(messages=ASK, max_tokens=9)])


def knows_max_tokens_only(handler: Any) -> None:
    if "max_completion_tokens" in handler.body:
        reply(handler, 422, json.dumps({"detail": EXTRA}))
    else:
        fine(handler)


def test_a_server_that_refuses_all_requests_alike_ends_the_run_within_a_few() -> None:
    server = Server(*[knows_max_tokens_only] * 500)
    with pytest.raises(UserError, match=r"with 422: body\.max_completion_tokens: Extra inputs.*max_tokens\)$"):
        server.engine(concurrency=100).run([Request(messages=ASK, max_tokens=9)] * 200)
    assert len(server.seen) == REFUSED_ALIKE
    done = server.engine(max_tokens_field="max_tokens").run([Request(messages=ASK, max_tokens=9)] * 20)
    assert {one.text for one in done} == {"WRITE."}
    few = Server(*[knows_max_tokens_only] * 500).engine().run([Request(messages=ASK, max_tokens=9)] * 5)
    assert [one.error for one in few] == ["refused"] * 5
    assert "set endpoint.max_tokens_field: max_tokens" in few[0].detail


def test_each_kind_of_request_must_be_taken_by_the_server() -> None:
    def no_logprobs(handler: Any) -> None:
        if "logprobs" in handler.body:
            reply(handler, 400, '{"error": {"message": "logprobs are not supported"}}')
        else:
            fine(handler)

    def wants_temperature_1(handler: Any) -> None:
        if handler.body["temperature"] == 1:
            fine(handler)
        else:
            reply(handler, 400, '{"error": {"message": "temperature must be 1"}}')

    engine = Server(*[wants_temperature_1] * 500).engine()
    assert engine.run([Request(messages=ASK, max_tokens=9, seed=1)])[0].text == "WRITE."
    with pytest.raises(UserError, match="refuses all requests for one reason, with 400: temperature must be 1"):
        engine.run([Request(messages=ASK, max_tokens=9, temperature=0.7, seed=at) for at in range(100)])
    engine = Server(*[no_logprobs] * 500).engine()
    assert engine.run([Request(messages=ASK, max_tokens=9)])[0].text == "WRITE."
    with pytest.raises(UserError, match="refuses all requests for one reason, with 400: logprobs are not supported"):
        engine.run([Request(messages=ASK, max_tokens=1, labels=("1",))] * 100)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, r"the key in \$X is refused \(no such thing\)"),
        (403, r"refused with 403 \(no such thing\)"),
        (404, r"refused with 404 \(no such thing\); see model, endpoint\.base_url"),
    ],
)
def test_a_wrong_key_model_or_address_ends_the_run_at_once(status: int, said: str) -> None:
    server = Server(*[lambda one: reply(one, status, '{"error": {"message": "no such thing"}}')] * 9)
    engine = server.engine(concurrency=1)
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            engine.run([Request(messages=ASK, max_tokens=9)] * 3)
    assert len(server.seen) == 1


def test_a_key_that_the_server_repeats_is_not_shown() -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
    with pytest.raises(UserError, match="is refused") as caught:
        one_of(lambda one: reply(one, 401, body))
    assert KEY not in str(caught.value)


def test_the_pace_is_kept() -> None:
    start, server = time.monotonic(), Server()
    server.engine(requests_per_minute=600).run([Request(messages=ASK, max_tokens=9)] * 6)
    assert max(server.times) - start >= 0.45  # six requests, 0.1 s apart
    start, by_tokens = time.monotonic(), Server()
    asked = [Request(messages=ASK, max_tokens=9, samples=2)] * 6  # 2 (a guess) + 2 x 9 tokens each
    by_tokens.engine(tokens_per_minute=12_000).run(asked)
    assert max(by_tokens.times) - start >= 0.45
    assert Pace(60, 4)._seconds_each == 4


def test_the_key_is_not_in_what_is_written_of_the_engine() -> None:
    engine = Server().engine()
    assert KEY not in repr(vars(engine))
    assert KEY not in str(engine._config.model_dump())


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real vLLM OpenAI server with a model of random weights."""
    folder = tmp_path_factory.mktemp("vllm")
    model, port = make_tiny_model(folder / "model"), unused_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}"]
    command += ["--served-model-name=tiny", f"--api-key={KEY}", "--enforce-eager", "--max-model-len=256"]
    command += ["--kv-cache-memory-bytes=50000000", "--host=127.0.0.1", "--no-enable-chunked-prefill"]
    command += ["--structured-outputs-config=" + json.dumps(TIGHT_JSON)]  # random weights would write only spaces
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = folder / "log"
    process = subprocess.Popen(command, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        else:
            pytest.fail(Path(log).read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_a_real_vllm_server_writes_judges_and_keeps_to_a_schema(vllm_url: str) -> None:
    endpoint = {"base_url": vllm_url, "api_key_env": "X", "timeout_seconds": 60, "max_retries": 0}
    engine = OpenAIEngine(ModelConfig(model="tiny", endpoint=endpoint), SecretStr(KEY))
    texts = engine.run([Request(messages=ASK, max_tokens=8, seed=1, samples=3)])
    assert len(texts) == 3
    assert {one.error for one in texts} <= {"", "cut off"}
    assert texts == engine.run([Request(messages=ASK, max_tokens=8, seed=1, samples=3)])
    stop = texts[0].text[3:5]
    ended = [
        engine.run([Request(messages=ASK, max_tokens=8, seed=1, samples=3, stop=(stop,), include_stop=include)])[0]
        for include in (False, True)
    ]
    place = texts[0].text.index(stop)
    expected = [texts[0].text[:place].strip(), texts[0].text[: place + 2].strip()]
    assert [(one.text, one.error) for one in ended] == [(one, "") for one in expected]
    labels = engine.run([Request(messages=ASK, max_tokens=1, labels=("1", "2", "3"))])
    assert len(labels[0].label_logprobs) == 3
    check_schema_is_enforced(engine, "judge tiny")
    long = engine.run([Request(messages=[{"role": "user", "content": "word " * 500}], max_tokens=8)])
    assert long[0].error == "too long"
    greedy = engine.run([Request(messages=ASK, max_tokens=5000)])
    assert (greedy[0].error, greedy[0].detail) == (
        "refused",
        "max_completion_tokens=5000 cannot be greater than max_model_len=256. Please request fewer output tokens. "
        "(parameter=max_completion_tokens, value=5000)",
    )
    nobody = OpenAIEngine(ModelConfig(model="other", endpoint=endpoint), SecretStr(KEY))
    with pytest.raises(UserError, match="refused with 404 \\(The model `other` does not exist"):
        nobody.run([Request(messages=ASK, max_tokens=8)])
    wrong = OpenAIEngine(ModelConfig(model="tiny", endpoint=endpoint), SecretStr("another"))
    with pytest.raises(UserError, match="refused"):
        wrong.run([Request(messages=ASK, max_tokens=8)])
