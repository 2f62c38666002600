"""What of somebody else's server is an answer or a verdict, and what is a reject with its reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from cpt_ray.engines.engine import Request
from tests.misbehaving import ASK, EXTRA, Server, completion, fine, one_of, reply, sends


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
