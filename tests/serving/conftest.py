"""One server for the tests of this folder.

The files run in alphabetical order: from test_replicas.py on, other deployments take the first one's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from shutil import which
from typing import Any

import openai
import pytest

from cpt_ray.cluster import connected
from cpt_ray.serving.deploy import serve_model
from cpt_ray.serving.haproxy import serve_env
from cpt_ray.tables.rundir import RunDir
from tests.served import (
    KEY,
    WAIT_SECONDS,
    make_config,
    make_run,
)


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="package")
def url(run: RunDir) -> Iterator[str]:
    from ray import serve

    with connected(more_env=serve_env()):
        yield serve_model(make_config(run), run, KEY, block=False)
        serve.shutdown()


@pytest.fixture(scope="package")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=WAIT_SECONDS)


def find_chromium() -> str | None:
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := which(name))), None)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", *quiet], timeout=120_000
        )
        yield launched
        launched.close()
