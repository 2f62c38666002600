"""Somebody else's server as an engine: its misbehaviour is waited out, reported or a reject, never a made-up answer."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


def completion(handler: Any, text: Any = "", reason: str | None = "stop", logprobs: Any = None, **more: Any) -> str:
    text = text or handler.body["messages"][0]["content"].upper()
    message = {"role": "assistant", "content": text} | more
    choice = {"index": 0, "finish_reason": reason, "message": message, "logprobs": logprobs}
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
    with pytest.raises(UserError, match=r"gave up; the last error was InternalServerError \(Error code: 500") as caught:
        Server(*[broken] * 9).engine(max_retries=1).run([Request(messages=ASK, max_tokens=9)] * 3)
    assert KEY not in str(caught.value)
    with pytest.raises(UserError, match="its response is not a chat completion"):
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


def one_of(act: Callable[[Any], None], **more: Any) -> Any:
    """What comes of one request that a server answers so."""
    return Server(act).engine().run([Request(messages=ASK, max_tokens=9, **more)])[0]


def sends(*arguments: Any, **more: Any) -> Callable[[Any], None]:
    return lambda one: reply(one, 200, completion(one, *arguments, **more))


@pytest.mark.parametrize(
    ("act", "text", "error", "said"),
    [
        (sends("<think>\nIt wants rain.\n</think>\n\nRain."), "Rain.", "", ""),
        (sends("Rain.", reasoning_content="It wants rain."), "Rain.", "", ""),
        (sends("Rain.", reason=None), "Rain.", "", ""),
        (sends("Rain.", reason="eos_token"), "Rain.", "", ""),
        (sends(" ", reasoning_content="It wants rain."), "", "thoughts not ended", "all of the text is thoughts"),
        (sends(" ", reasoning="It wants rain."), "", "thoughts not ended", "all of the text is thoughts"),
        (
            sends("<think>It wants", "length"),
            "",
            "cut off",
            "not finished after 9 tokens (all of the text is thoughts)",
        ),
        (sends("I can", "content_filter"), "", "filtered", "content_filter"),
        (sends(" ", "tool_calls"), "", "tool call", "tool_calls"),
        (sends(" ", tool_calls=[{"id": "1", "type": "function", "function": {}}]), "", "tool call", "tool_calls"),
        (sends("Rain.", "overloaded"), "", "ended by overloaded", "overloaded"),
        (sends(" ", refusal="I cannot write that."), "", "refused", "I cannot write that."),
        (
            sends([{"type": "thinking", "thinking": [{"text": "It wants rain."}]}, {"type": "text", "text": "Rain."}]),
            "Rain.",
            "",
            "",
        ),
    ],
)
def test_what_is_no_finished_answer_is_none(act: Callable[[Any], None], text: str, error: str, said: str) -> None:
    done = one_of(act)
    assert (done.text, done.error) == (text, error)
    assert said in done.detail


def tops(*likely: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": text, "logprob": value, "bytes": None} for text, value in likely]
    return {"content": [{**top[0], "top_logprobs": top}]}


def test_the_tokens_of_a_label_are_added_up() -> None:
    half, least = math.log(0.47), -9999.0
    found = tops(("3", math.log(0.5)), ("1", half), (" 1", math.log(0.01)), ("1\n", math.log(0.02)), ("2", least))
    values = one_of(sends("3", "length", found), labels=("1", "2", "3", "4")).label_logprobs
    assert [round(math.exp(one), 9) for one in values] == [0.5, 0, 0.5, 0]
    assert one_of(sends("1", logprobs=tops(("1", 1e-7), (" 1", 0.0))), labels=("1", "2")).label_logprobs[0] == 0.0


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (sends(" ", "content_filter"), "filtered"),
        (sends(" ", "tool_calls"), "tool call"),
        (sends(" ", refusal="No."), "refused"),
        (sends("2"), "no probabilities"),
    ],
)
def test_a_verdict_that_did_not_come_is_said_to_be_none(act: Callable[[Any], None], error: str) -> None:
    done = one_of(act, labels=("1", "2"))
    assert (done.error, done.label_logprobs) == (error, ())


EXTRA = [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted"}]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (422, {"detail": EXTRA}, "body.max_completion_tokens: Extra inputs are not permitted"),
        (422, {"message": {"detail": EXTRA}}, "body.max_completion_tokens: Extra inputs are not permitted"),
        (422, {"detail": "no such field"}, "no such field"),
        (400, {"error": "no such field"}, "no such field"),
        (400, {"errors": ["no", "nor this"]}, "no; nor this"),
        (400, {"code": 7}, '{"code": 7}'),
    ],
)
def test_a_refusal_is_kept_in_the_servers_own_words(status: int, body: Any, said: str) -> None:
    done = one_of(lambda one: reply(one, status, json.dumps(body)))
    assert done.error == "refused"
    assert done.detail.startswith(said)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("This model's maximum context length is 256 tokens. However, you asked for 300.", "too long"),
        ("The input (500 tokens) is longer than the model's context length (256 tokens).", "too long"),
        ("the request exceeds the available context size", "too long"),
        ("top_logprobs: the maximum is 5", "refused"),
        ("unknown field: context", "refused"),
        ("this content is not allowed in the context of this service", "refused"),
    ],
)
def test_too_long_is_what_the_server_says_is_too_long(message: str, error: str) -> None:
    assert one_of(lambda one: reply(one, 400, json.dumps({"error": {"message": message}}))).error == error
    coded = {"error": {"message": "no", "code": "context_length_exceeded"}}
    assert one_of(lambda one: reply(one, 400, json.dumps(coded))).error == "too long"
    coded = {"error": {"message": "no", "code": "content_filter"}}
    assert one_of(lambda one: reply(one, 400, json.dumps(coded))).error == "filtered"


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


def test_what_is_refused_for_its_own_sake_does_not_end_the_run() -> None:
    def own(handler: Any) -> None:
        text = handler.body["messages"][0]["content"]
        if text == "fine":
            fine(handler)
        else:
            code = {"long": "context_length_exceeded", "bad": "content_filter"}.get(text)
            reply(handler, 400, json.dumps({"error": {"message": f"no, since it is {text}", "code": code}}))

    def errors(*texts: str) -> list[str]:
        asked = [Request(messages=[{"role": "user", "content": text}], max_tokens=9) for text in texts]
        return [one.error for one in Server(*[own] * 100).engine().run(asked)]

    assert errors(*["long"] * 20, "fine") == ["too long"] * 20 + [""]
    assert errors(*["bad"] * 20) == ["filtered"] * 20
    assert errors(*"abcdefghijkl") == ["refused"] * 12
    assert errors("fine", *["a"] * 20)[1:] == ["refused"] * 20


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


@pytest.mark.parametrize(
    ("include", "sent", "text", "error"), [(False, [". ", "! "], "One", ""), (True, None, "One!", "")]
)
def test_an_answer_ends_at_a_stop_text_whatever_the_server_makes_of_it(
    include: bool, sent: Any, text: str, error: str
) -> None:
    def unstopped(handler: Any) -> None:
        reply(handler, 200, completion(handler, "One! Two. And thr", "length"))

    server = Server(*[unstopped] * 3)
    request = Request(messages=ASK, max_tokens=9, stop=(". ", "! "), include_stop=include, samples=2)
    done = server.engine().run([request])
    assert server.seen[0][1].get("stop") == sent
    assert [(one.text, one.error) for one in done] == [(text, error)] * 2
    server.engine().run([replace(request, json_schema={"type": "object"})])
    assert "stop" not in server.seen[1][1]
    other = server.engine().run([replace(request, stop=("?",))])
    assert [(one.text, one.error) for one in other] == [("One! Two. And thr", "cut off")] * 2


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
