"""Newer weights on two replicas, and what happens to one of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from cpt_ray.serving.deploy import serve_model
from cpt_ray.serving.keys import Keyring, make_key
from cpt_ray.tables.rundir import KEYS_FILE, RunDir
from tests.served import (
    ANY_TEMPLATE,
    AUTHORIZED,
    CHAT,
    KEY,
    WAIT_SECONDS,
    Load,
    make_config,
    noted,
    post,
)
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def takeover(url: str, run: RunDir) -> list[tuple[float, int, str]]:
    """What clients were told while two replicas with newer weights took over, which stay."""
    newer = make_tiny_model(run.path / "newer", seed=1, chat_template=ANY_TEMPLATE)
    with Load(url, clients=2) as load:
        load.wait_for(2)
        assert serve_model(make_config(run, replicas=2), run, KEY, block=False, model=newer) == url
        load.wait_for(2, since=time.monotonic())
    return load.answers


@pytest.mark.slow
def test_newer_weights_on_two_replicas_take_over_without_a_failed_request(takeover: Any) -> None:
    assert [one for one in takeover if one[1] != 200] == []
    said = [json.loads(text)["choices"][0]["message"]["content"] for _, _, text in sorted(takeover)]
    assert said[0] != said[-1]
    assert set(said) == {said[0], said[-1]}


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def replicas(run: RunDir) -> list[int]:
    """Processes of those that are alive; each has a log of its own."""
    known = [int(log.stem.rpartition("-")[2]) for log in (run.path / "access").iterdir()]
    return [pid for pid in known if psutil.pid_exists(pid)]


@pytest.mark.slow
@pytest.mark.usefixtures("takeover")
def test_choices_told_to_two_replicas_come_to_one_state(url: str, run: RunDir) -> None:
    given = {"prompt": "Day 0?", "chosen": "High 0.", "rejected": "Low 0."}
    state = f"/v1/preferences/{post(url, '/v1/preferences', json={'choices': [given]}).json()['id']}"
    told = [{"prompt": f"Day {at}?", "chosen": f"High {at}.", "rejected": f"Low {at}."} for at in range(1, 13)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda one: post(url, state, json={"choices": [one]}), told))
    assert [one.status_code for one in answers] == [200] * len(told)
    kept = httpx.get(f"{url}{state}", headers=AUTHORIZED, timeout=60).json()["choices"]
    assert sorted(one["prompt"] for one in kept) == sorted(one["prompt"] for one in [given, *told])
    noted(run, len(told), lambda line: line["path"] == state and line["method"] == "POST")
    assert sum(state in log.read_text() for log in (run.path / "access").iterdir()) == 2
    assert httpx.delete(f"{url}{state}", headers=AUTHORIZED, timeout=60).is_success


@pytest.mark.slow
@pytest.mark.usefixtures("takeover")
def test_a_controller_that_starts_anew_keeps_every_replica_and_no_request_fails(url: str, run: RunDir) -> None:
    import ray
    from ray import serve

    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")

    def process() -> int:
        return int(ray.get(controller.get_pid.remote(), timeout=WAIT_SECONDS))  # which waits until there is one

    def status() -> str:
        return str(serve.status().applications["tiny"].status.value)

    until(lambda: len(replicas(run)) == 2)  # the older weights' replica is on its way out
    before, earlier = set(replicas(run)), process()
    with Load(url, clients=2) as load:
        load.wait_for(2)
        ray.kill(controller, no_restart=False)
        until(lambda: process() != earlier)
        until(lambda: status() != "DEPLOYING")
        assert status() == "RUNNING"
        assert set(replicas(run)) == before
        load.wait_for(8, since=time.monotonic())
    assert [one for one in load.answers if one[1] != 200] == []


@pytest.mark.slow
@pytest.mark.usefixtures("takeover")
def test_two_replicas_count_as_one_and_the_death_of_one_fails_only_what_it_was_at(url: str, run: RunDir) -> None:
    until(lambda: len(replicas(run)) == 2)
    limits = {"slow": {"requests_per_minute": 1}, "poor": {"budget": 60}}
    secrets = {}
    for name, limit in limits.items():
        key, secrets[name] = make_key(name, **limit)
        Keyring(run.path / KEYS_FILE).add(key)
    time.sleep(1.1)  # the servers look once a second

    def statuses(name: str) -> list[int]:
        headers = {"Authorization": f"Bearer {secrets[name]}"}
        asked = [[{"role": "user", "content": f"Write about {number}."}] for number in range(8)]  # to either replica
        bodies = [{"model": "tiny", "messages": messages, "max_tokens": 2} for messages in asked]
        return [httpx.post(f"{url}{CHAT}", headers=headers, json=body, timeout=60).status_code for body in bodies]

    assert statuses("slow") == [200, *[429] * 7]
    spending = statuses("poor")
    assert spending[0] == 200
    assert spending[-1] == 403
    assert spending == sorted(spending)
    noted(run, 8, lambda line: line["key"] == "poor")
    logs = {log.stem for log in (run.path / "access").iterdir() if '"key": "poor"' in log.read_text()}
    assert len(logs) == 2

    with Load(url, clients=4) as load:
        load.wait_for(8)
        killed = time.monotonic()
        os.kill(replicas(run)[0], signal.SIGKILL)
        load.wait_for(8, since=killed)
    failed = [(status, text) for _, status, text in load.answers if status != 200]
    assert len(failed) <= 4, failed
    assert all(status in (500, 502, 503) for status, _ in failed), failed
    assert set(statuses("poor")) == {403}
