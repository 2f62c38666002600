"""Somebody else's server as an engine: its misbehaviour is waited out, reported or a reject, never a made-up answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from cpt_ray.cluster import unused_port
from cpt_ray.config import ModelConfig
from cpt_ray.engine import TIGHT_JSON, Request, check_schema_is_enforced
from cpt_ray.errors import UserError
from cpt_ray.openai_engine import OpenAIEngine, Pace
from tests.tiny_model import make_tiny_model

KEY = "sk-not-to-be-seen"
ASK = [{"role": "user", "content": "Write."}]


class Server:
    """Misbehaves as told: each request takes the next of `script`; when it is used up, all is well."""

    def __init__(self, *script: Callable[[BaseHTTPRequestHandler], None]):
        self.script, self.seen, self.most_at_once = list(script), [], 0
        self.times: list[float] = []
        self._now, lock = 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with lock:
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                    server.times.append(time.monotonic())
                    act = server.script.pop(0) if server.script else fine
                self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append((self.headers["Authorization"], self.body))
                act(self)
                with lock:
                    server._now -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def engine(self, **endpoint: Any) -> OpenAIEngine:
        made = {"base_url": self.url, "api_key_env": "X", "max_retries": 4, "timeout_seconds": 1} | endpoint
        return OpenAIEngine(ModelConfig(model="m", endpoint=made), SecretStr(KEY))


def reply(handler: BaseHTTPRequestHandler, status: int, body: str, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body.encode())


def completion(handler: Any, text: str = "", reason: str = "stop") -> str:
    text = text or handler.body["messages"][0]["content"].upper()
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}, "logprobs": None}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    choices = [choice | {"index": at} for at in range(handler.body["n"])]
    made = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
    return json.dumps({**made, "usage": usage | {"prompt_tokens_details": {"cached_tokens": 4}}})


def fine(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.02)
    reply(handler, 200, completion(handler))


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
    with pytest.raises(UserError, match=r"gave up after a last InternalServerError \(Error code: 500") as caught:
        Server(*[broken] * 9).engine(max_retries=1).run([Request(messages=ASK, max_tokens=9)] * 3)
    assert KEY not in str(caught.value)
    with pytest.raises(UserError, match="what it sends is no chat completion"):
        Server(*[half_json] * 9).engine(max_retries=1).run([Request(messages=ASK, max_tokens=9)])
    with pytest.raises(UserError, match=r"the key in \$X is refused"):
        Server(lambda one: reply(one, 401, "{}")).engine().run([Request(messages=ASK, max_tokens=9)])


def test_what_a_request_is_at_fault_for_is_a_reject_with_its_reason() -> None:
    def refuse(message: str) -> Callable[[BaseHTTPRequestHandler], None]:
        return lambda one: reply(one, 400, json.dumps({"error": {"message": message}}))

    def cut(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 200, completion(handler, "half", "length"))

    def empty(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 200, completion(handler, " "))

    server = Server(refuse("maximum context length is 8"), refuse("not nice"), cut, empty)
    done = [server.engine().run([Request(messages=ASK, max_tokens=9)])[0] for _ in range(4)]
    assert [one.error for one in done] == ["too long", "refused", "cut off", "empty answer"]


def test_the_pace_is_kept() -> None:
    server = Server()
    server.engine(requests_per_minute=600).run([Request(messages=ASK, max_tokens=9)] * 6)
    assert max(server.times) - min(server.times) >= 0.45  # six requests, 0.1 s apart
    by_tokens = Server()
    asked = [Request(messages=ASK, max_tokens=9, samples=2)] * 6  # 2 (a guess) + 2 x 9 tokens each
    by_tokens.engine(tokens_per_minute=12_000).run(asked)
    assert max(by_tokens.times) - min(by_tokens.times) >= 0.45
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
    labels = engine.run([Request(messages=ASK, max_tokens=1, labels=("1", "2", "3"))])
    assert len(labels[0].label_logprobs) == 3
    check_schema_is_enforced(engine, "judge tiny")
    long = engine.run([Request(messages=[{"role": "user", "content": "word " * 500}], max_tokens=8)])
    assert long[0].error == "too long"
    wrong = OpenAIEngine(ModelConfig(model="tiny", endpoint=endpoint), SecretStr("another"))
    with pytest.raises(UserError, match="refused"):
        wrong.run([Request(messages=ASK, max_tokens=8)])
