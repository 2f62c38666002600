"""Two replicas behind HAProxy that goes by the configuration."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cpt_ray.cluster import by_configuration, connected
from cpt_ray.serving.deploy import serve_model
from cpt_ray.tables.rundir import RunDir
from tests.test_serving import AUTHORIZED, CHAT, KEY, make_config, make_run, noted


def asking(number: int, named: bool) -> dict[str, Any]:
    """A request for a level of its own, in the body or in the model's name, and words that no other one has."""
    level: dict[str, Any] = {"model": f"cpt:ornament={number}"} if named else {"configuration": {"ornament": number}}
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"Write {time.time()}."}],
        "max_tokens": 2,
    } | level


def until_both_answer(url: str, run: RunDir) -> None:
    """HAProxy is told of the second replica after the first: until then all goes to that one."""
    end = time.monotonic() + 60
    while not all(log.stat().st_size for log in (run.path / "access").iterdir()):
        assert time.monotonic() < end, "one replica is never asked"
        for number in range(0, 100, 9):
            httpx.post(f"{url}{CHAT}", headers=AUTHORIZED, json=asking(number, named=False), timeout=60)


@pytest.mark.slow
def test_requests_for_the_same_level_go_to_the_same_replica(tmp_path: Path) -> None:
    from ray import serve

    run = make_run(tmp_path)
    with connected(more_env=by_configuration()):
        url = serve_model(make_config(run, replicas=2), run, KEY, block=False)
        try:
            until_both_answer(url, run)
            for named in (False, True):
                for number in range(0, 100, 9):
                    headers = {**AUTHORIZED, "X-Request-ID": f"routed-{named}-{number}"}
                    for _ in range(3):
                        answer = httpx.post(f"{url}{CHAT}", headers=headers, json=asking(number, named), timeout=60)
                        assert answer.is_success
            noted(run, 72, lambda line: line["request_id"].startswith("routed-"))
        finally:
            serve.shutdown()
    served: dict[str, set[str]] = {}
    for log in (run.path / "access").iterdir():
        for found in re.findall(r'"(routed-\w+-\d+)"', log.read_text()):
            served.setdefault(found, set()).add(log.stem)
    assert len(served) == 24 and all(len(logs) == 1 for logs in served.values()), served
    assert len(set.union(*served.values())) == 2
