"""The same run served with other settings, one deployment after another."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cpt_ray.config import SamplingConfig
from cpt_ray.engines.engine import Request
from cpt_ray.engines.vllm import VllmEngine
from cpt_ray.errors import UserError
from cpt_ray.serving.conditioning import FORM
from cpt_ray.serving.deploy import serve_model
from cpt_ray.steering.actors import Embedder
from cpt_ray.steering.policy import ConditionalPolicy, SavedForm
from cpt_ray.tables.rundir import RunDir
from tests.served import (
    ANY_TEMPLATE,
    CHAT,
    HIGH,
    KEY,
    USER,
    WAIT_SECONDS,
    expected_ids,
    make_adapter,
    make_config,
    noted,
    post,
)
from tests.test_steering_policy import disturbed
from tests.tiny_model import make_tiny_model


@pytest.mark.slow
def test_adapters_are_served_and_an_idle_server_ends_and_comes_back(url: str, run: RunDir) -> None:
    from ray import serve

    make_tiny_model(run.path / "base", chat_template=ANY_TEMPLATE)
    adapters = {"poet": str(make_adapter(run, "poet", 1)), "terse": f"file://{make_adapter(run, 'terse', 2)}"}
    config = make_config(run, adapters=adapters, configurations={}, replicas=[0, 1], idle_seconds=0)
    assert serve_model(config, run, KEY, block=False) == url

    def said(model: str) -> str:
        deadline = time.monotonic() + WAIT_SECONDS
        while (answer := post(url, json={"model": model, "messages": USER, "max_tokens": 24})).status_code != 200:
            assert time.monotonic() < deadline, answer.text  # what served before may be on its way out
            time.sleep(0.2)
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text

    before = {model: said(model) for model in ("poet:ornament=high", "terse:ornament=high", "tiny-base")}
    assert len(set(before.values())) == 3
    deadline = time.monotonic() + WAIT_SECONDS
    while serve.status().applications["tiny"].deployments["tiny"].replica_states:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert {model: said(model) for model in before} == before


CHOICES = [{"prompt": f"Day {at}?", "chosen": f"High {at}.", "rejected": f"Low {at}."} for at in range(2)]


def pick_on_the_page(url: str, browser: Any) -> None:
    """One pick, where the server steers by a user's adapter; and it is forgotten."""
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(f"{url}/playground")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Connect").click()
    page.get_by_role("button", name="Offer me two answers").click()
    page.locator("#pair article").first.get_by_role("button").click()
    page.get_by_text("After 1 choice: the answer follows them.").wait_for()
    page.locator("#panes small", has_text="tokens").wait_for()
    page.get_by_role("button", name="Forget my choices").click()
    page.get_by_text("Your choices are deleted.").wait_for()
    page.close()


@pytest.mark.slow
def test_users_are_answered_by_their_own_adapter(url: str, run: RunDir, browser: Any) -> None:
    """As transformers would with their z; nobody else is, and a configuration of one's own wins."""
    frozen = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.bfloat16).float().eval()  # the server's
    width, policy = frozen.config.hidden_size, make_config(run).policy.model_copy(update={"model": str(run.model)})
    conditional = disturbed(ConditionalPolicy(frozen, FORM, embedding=2 * width, size=32))
    (run.path / "steering").mkdir(exist_ok=True)
    save_file(conditional.own_state(), run.path / "steering" / "weights.safetensors")
    saved = SavedForm(
        weights="steering/weights.safetensors",
        policy=policy.identity,
        embedder=policy.identity,
        size=32,
        mean=[0.5] * 2 * width,
        deviation=[2.0] * 2 * width,
    )
    run.write_json(SavedForm.file(FORM), asdict(saved))
    assert serve_model(make_config(run, preferences=FORM), run, KEY, block=False) == url

    deadline = time.monotonic() + WAIT_SECONDS
    while (made := post(url, "/v1/preferences", json={"choices": CHOICES}).json())["probabilities"]:
        assert time.monotonic() < deadline, made  # what served before may be on its way out
    vectors = torch.tensor(
        Embedder(policy).embed([(c["prompt"], c[k]) for c in CHOICES for k in ("chosen", "rejected")])
    )
    z = conditional.encoder(((vectors - 0.5) / 2).view(1, 2, 2, -1))

    def check(applied: Any, is_mine: bool, directive: str | None, **more: Any) -> None:
        asked = {"model": "tiny", "messages": USER, "max_tokens": 8, "logprobs": True, "return_token_ids": True}
        answer = post(url, json=asked | {"ignore_eos": True} | more).json()
        assert answer.get("configuration") == applied, answer
        ids, choice = expected_ids(run, directive, USER), answer["choices"][0]
        served = sum(one["logprob"] for one in choice["logprobs"]["content"])
        whole = (ids + choice["token_ids"], len(ids))
        with torch.no_grad():
            found = {mine: float(conditional.logps([whole], z if mine else None)) for mine in (True, False)}
        assert found[is_mine] == pytest.approx(served, abs=0.1)  # the server computes in bfloat16
        assert abs(found[not is_mine] - served) > 0.3

    pick_on_the_page(url, browser)
    mine, begun = {"preferences": made["id"]}, time.time()
    for _ in range(2):
        check({"applied": {}, "directive": None, "from": f"preferences, by {FORM}"}, True, None, **mine)
    chats = noted(run, 2, lambda line: line["path"] == CHAT and line["time"] > begun)
    first, second = (one["prompt_tokens"] for one in sorted(chats, key=lambda line: line["time"]))
    assert first > second > 0  # to read the choices is counted, once
    check(None, False, None)
    asked_for = {"applied": {"ornament": "high"}, "directive": HIGH, "from": "configuration"}
    check(asked_for, False, HIGH, configuration={"ornament": "high"}, **mine)
    refused = post(url, json={"model": f"user-{made['id']}-1", "messages": USER})
    assert refused.status_code == 404
    scored = post(url, json={"model": "tiny", "messages": USER, "max_tokens": 1, "prompt_logprobs": 1})
    assert scored.status_code == 400, scored.text
    torch.save(torch.zeros(3, width), own := io.BytesIO())
    body = {"model": "tiny", "prompt_embeds": base64.b64encode(own.getvalue()).decode(), "max_tokens": 1}
    refused = post(url, "/v1/completions", json=body)
    assert refused.status_code == 400, refused.text


def test_the_server_ends_an_answer_where_evaluation_does(url: str, run: RunDir) -> None:
    config = make_config(run)
    policy = config.policy.model_copy(update={"model": str(run.model)})
    engine = VllmEngine(policy)
    asked = Request(messages=USER, max_tokens=40, temperature=0)
    whole = engine.run([asked])[0].text
    stop, other = whole[10:14], whole[1:3]
    expected, own = (
        engine.run([replace(asked, stop=(text,), include_stop=include)])[0].text
        for text, include in ((stop, True), (other, False))
    )
    assert expected == whole[: whole.index(stop) + 4].strip()
    assert own == whole[: whole.index(other)].strip()
    sampling = SamplingConfig(temperature=0, stop=(stop,), include_stop=True)
    changed = config.model_copy(update={"policy": policy.model_copy(update={"sampling": sampling})})
    assert serve_model(changed, run, KEY, block=False) == url
    body = {"model": "tiny", "messages": USER, "max_tokens": 40}

    def said(path: str = CHAT, **more: Any) -> str:
        choice = post(url, path, json=body | more).json()["choices"][0]
        return str(choice["message"]["content"] if path == CHAT else choice["text"]).strip()

    deadline = time.monotonic() + WAIT_SECONDS
    while said() != expected:  # what served before may be on its way out
        assert time.monotonic() < deadline
        time.sleep(0.2)
    lines = post(url, json=body | {"stream": True}).text.removesuffix("data: [DONE]\n\n").split("data: ")[1:]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content") for line in lines]
    assert "".join(filter(None, deltas)).strip() == expected
    assert said(stop=other) == own
    prompt = expected_ids(run, None, USER)
    assert said("/v1/completions", prompt=prompt) == expected
    assert said(response_format={"type": "json_object"}, max_tokens=60)[:1] == "{"
    scored = post(url, "/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 1, "logprobs": 1})
    assert scored.status_code == 200


# ---------------------------------------------------------------- what keeps it from starting


def test_a_taken_port_is_said_before_anything_starts(url: str, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt_ray.serving.deploy.running_serve", lambda: None)  # as on a cluster without Serve
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as raised:
            serve_model(make_config(run, port=port), run, KEY, block=False)
    where = f"127.0.0.1:{port} (Address already in use)"
    assert str(raised.value) == f"cannot listen on {where}; try another, as with serve.port={port + 1}"
