"""What a client gets from the real Ray Serve and vLLM: answers, configurations, keys, metrics."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import openai
import pytest

from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.serving.keys import Keyring, make_key
from cpt_ray.tables.rundir import KEYS_FILE, RunDir
from tests.local_cluster import ROOT
from tests.served import (
    AUTHORIZED,
    CATALOG,
    CHAT,
    HIGH,
    SYSTEM,
    TEMPLATES,
    TURNS,
    USER,
    WAIT_SECONDS,
    expected_ids,
    noted,
    post,
)

# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("model", "extra", "directive"),
    [
        ("tiny", {"configuration": {"ornament": "high"}}, HIGH),
        ("tiny", {"configuration": {"ornament": 85}}, HIGH),
        ("tiny", {"configuration": "poet"}, HIGH),
        ("cpt:ornament=high", {}, HIGH),
        ("cpt:poet", {}, HIGH),
        ("tiny", {"configuration": {}}, None),
        ("tiny", {}, None),
    ],
)
@pytest.mark.parametrize("messages", [USER, SYSTEM], ids=["user", "system"])
def test_the_server_sees_the_same_tokens_as_training(
    client: openai.OpenAI, run: RunDir, model: str, extra: dict[str, Any], directive: str | None, messages: Any
) -> None:
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=4, extra_body={**extra, "return_token_ids": True}
    )
    assert (answer.model_extra or {})["prompt_token_ids"] == expected_ids(run, directive, messages)
    said = (answer.model_extra or {}).get("configuration")
    asked = model != "tiny" or "configuration" in extra
    applied = {"ornament": "high"} if directive else {}
    assert said == ({"applied": applied, "directive": directive} if asked else None)


@pytest.mark.parametrize("messages", [USER, SYSTEM, TURNS], ids=["user", "system", "turns"])
@pytest.mark.parametrize("family", [name for name in TEMPLATES if name != "no-system"])
def test_every_chat_template_gives_the_same_tokens_at_the_server_and_in_training(
    url: str, run: RunDir, family: str, messages: Any
) -> None:
    body = {"model": "cpt:ornament=high", "messages": messages, "chat_template_kwargs": {"family": family}}
    found = post(url, "/tokenize", json=body).json()["tokens"]
    assert found == expected_ids(run, HIGH, messages, family=family)
    assert found != expected_ids(run, None, messages, family=family)


def test_a_template_that_refuses_system_messages_is_a_bad_request(url: str) -> None:
    body = {"model": "cpt:poet", "messages": USER, "chat_template_kwargs": {"family": "no-system"}}
    answer = post(url, json=body)
    assert (answer.status_code, "System role not supported" in answer.text) == (400, True)


def test_the_answer_says_what_was_applied(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=USER, max_tokens=4, extra_body={"configuration": {"ornament": 20}}
    )
    assert json.loads(raw.headers["x-cpt-configuration"]) == {"ornament": "low"}
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=USER, max_tokens=4)
    assert "x-cpt-configuration" not in raw.headers


def test_an_answer_streams_token_by_token_and_is_the_one_that_comes_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "cpt:ornament=high",
        "messages": USER,
        "max_tokens": 200,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert len(chunks) > 2  # fewer than tokens: what a slow client has not fetched comes together
    assert (chunks[0].model_extra or {})["configuration"]["directive"] == HIGH
    whole = client.chat.completions.create(**options).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def metric(url: str, name: str) -> float:
    """The sum over all labels of one of the engine's metrics."""
    lines = httpx.get(f"{url}/metrics", headers=AUTHORIZED, timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def generated(url: str) -> float:
    return metric(url, "vllm:generation_tokens_total")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_nothing_is_generated_for_a_client_that_left(url: str, run: RunDir, stream: bool) -> None:
    wanted = {"max_tokens": 200, "n": 128, "temperature": 1, "ignore_eos": True, "stream": stream}
    before = generated(url)
    headers = {**AUTHORIZED, "X-Request-Id": f"left-{stream}"}
    body = {"model": "cpt:poet", "messages": USER, **wanted}
    if stream:
        with httpx.stream("POST", url + CHAT, headers=headers, json=body, timeout=WAIT_SECONDS) as answer:
            assert answer.status_code == 200, answer.read()
            next(answer.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + CHAT, headers=headers, json=body, timeout=httpx.Timeout(WAIT_SECONDS, read=0.3))
    line = noted(run, 1, lambda line: line["request_id"] == f"left-{stream}")[0]
    assert line["status"] == (200 if stream else 0)
    deadline = time.monotonic() + WAIT_SECONDS
    while metric(url, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert generated(url) - before < 200 * 128


def test_who_says_nothing_of_sampling_gets_what_evaluation_measured(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "cpt:poet", "messages": USER, "max_tokens": 24}

    def said(**sampling: Any) -> str | None:
        return client.chat.completions.create(**options, **sampling).choices[0].message.content

    assert said() == said(temperature=0) != said(temperature=1, seed=1)


def test_tools_structured_output_log_probabilities_and_completions_work_as_in_vllm(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "cpt:poet", "messages": USER}
    chosen = client.chat.completions.create(**options, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert chosen.choices[0].message.content in ("yes", "no")
    schema = {"name": "a", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}}
    formed = client.chat.completions.create(
        **options, max_tokens=64, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert json.loads(formed.choices[0].message.content or "")["a"] == 1
    parameters = {"type": "object", "properties": {"to": {"enum": ["sea"]}}, "required": ["to"]}
    tool: Any = {"type": "function", "function": {"name": "go", "parameters": parameters, "strict": True}}
    choice: Any = {"type": "function", "function": {"name": "go"}}
    tries = [  # bare vLLM does the same: blanks are allowed in a call, and random weights may write nothing else
        client.chat.completions.create(**options, tools=[tool], tool_choice=choice, temperature=1, seed=seed)
        for seed in range(8)
    ]
    calls: Any = [call.function for one in tries for call in one.choices[0].message.tool_calls or ()]
    assert {(call.name, json.loads(call.arguments)["to"]) for call in calls} == {("go", "sea")}
    likely = client.chat.completions.create(**options, max_tokens=2, logprobs=True, top_logprobs=3)
    assert likely.choices[0].logprobs
    assert len((likely.choices[0].logprobs.content or [])[0].top_logprobs) == 3
    assert client.completions.create(model="tiny", prompt="The sea", max_tokens=4).usage.completion_tokens  # type: ignore


def test_an_unknown_level_is_a_bad_request_with_the_nearest_one(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=USER, extra_body={"configuration": {"ornament": "hihg"}})
    assert 'did you mean "high"?' in raised.value.message
    assert raised.value.param == "configuration.ornament"


def test_models_and_configurations_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "cpt:poet"]
    listed: Any = client.get("/configurations", cast_to=object)
    assert Catalog.from_json(listed) == CATALOG.with_saved({"poet": {"ornament": 88}})
    assert (listed["model"], listed["base"]) == ("tiny", None)


# ---------------------------------------------------------------- keys


def test_a_wrong_key_is_an_authentication_error(url: str) -> None:
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Incorrect or missing API key"):
        wrong.models.list()
    for path in ("/metrics", "/tokenize", "/docs", "/openapi.json"):
        assert httpx.get(f"{url}{path}").status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_keys_tokens_are_counted_and_its_limit_kept(url: str, run: RunDir) -> None:
    key, secret = make_key("limited", tokens_per_minute=40)
    Keyring(run.path / KEYS_FILE).add(key)
    time.sleep(1.1)  # the server looks once a second
    limited = openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=WAIT_SECONDS)
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
    usage = limited.chat.completions.create(**options).usage
    assert usage
    assert usage.total_tokens > 40
    with pytest.raises(openai.RateLimitError) as raised:
        limited.chat.completions.create(**options)
    wait = int(raised.value.response.headers["retry-after"])
    assert 0 < wait <= (usage.total_tokens - 40) * 1.5 + 2
    first, second = noted(run, 2, lambda line: line["key"] == "limited")
    assert (first["status"], second["status"]) == (200, 429)
    assert (first["prompt_tokens"], first["tokens"]) == (usage.prompt_tokens, usage.completion_tokens)
    assert "sea" not in json.dumps([first, second])


# ---------------------------------------------------------------- watching


def test_the_dashboard_asks_only_for_what_the_server_counts(url: str, client: openai.OpenAI) -> None:
    import ray

    client.chat.completions.create(model="cpt:poet", messages=USER, max_tokens=2)
    text = (ROOT / "jobs" / "grafana.json").read_text()
    queries = [target["expr"] for panel in json.loads(text)["panels"] for target in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert len(asked) > 5
    asked |= {'key="CPT_API_KEY"', 'level="high"', 'rubric="ornament"'}
    (node,) = ray.nodes()
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        if all(name in found for name in asked):
            break
        assert time.monotonic() < deadline, [name for name in asked if name not in found]
        time.sleep(0.5)
