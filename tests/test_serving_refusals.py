"""What keeps a server from starting is said in a line, before Ray or an engine starts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.errors import UserError
from cpt_ray.serving.deploy import serve_model
from cpt_ray.serving.keys import Keyring, make_key
from cpt_ray.steering.policy import VERSION, SavedForm
from cpt_ray.tables.rundir import CATALOG_FILE, SPENT_FILE, RunDir
from tests.served import CATALOG, KEY, make_config, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"))


OTHER: dict[str, Any] = {"weights": "", "policy": "other", "embedder": "", "size": 8, "mean": [], "deviation": []}


@pytest.mark.parametrize("saved", [None, OTHER, OTHER | {"version": VERSION}])
def test_steering_that_was_not_fitted_for_the_model_is_said(tmp_path: Path, run: RunDir, saved: Any) -> None:
    made = RunDir(tmp_path)
    made.write_json(CATALOG_FILE, CATALOG.to_json())
    if saved:
        made.write_json(SavedForm.file("gated_lora"), saved)
    with pytest.raises(UserError, match=r"^serve.preferences: .*run `cpt steer fit`"):
        serve_model(make_config(made, preferences="gated_lora"), made, KEY, block=False, model=run.model)


@pytest.mark.parametrize(("left_out", "named"), [("model", "model: no model here"), (CATALOG_FILE, "not there")])
def test_a_run_that_was_not_trained_is_told_what_to_do(tmp_path: Path, left_out: str, named: str) -> None:
    made = RunDir(tmp_path)
    steps: dict[str, Callable[[], Any]] = {
        "model": lambda: made.write_json("model/config.json", {}),
        CATALOG_FILE: lambda: made.write_json(CATALOG_FILE, CATALOG.to_json()),
    }
    steps.pop(left_out)
    for step in steps.values():
        step()
    with pytest.raises(UserError, match=rf"{named}.*; run `cpt train RUN_FILE` first"):
        serve_model(make_config(made), made, KEY, block=False)


@contextlib.contextmanager
def no_ray() -> Iterator[None]:
    pytest.fail("Ray was started")
    yield


def test_what_can_be_checked_without_ray_is_said_before_it_starts(
    tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt_ray.serving.deploy.starts_own_cluster", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = make_config(run, port=taken.getsockname()[1])
        with pytest.raises(UserError, match=r"^cannot listen on"):
            serve_model(config, run, KEY, connecting=no_ray())
    with pytest.raises(UserError, match="no model here"):
        serve_model(make_config(run), RunDir(tmp_path), KEY, connecting=no_ray())
    assert list(tmp_path.iterdir()) == []
    no_system = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="its chat template drops the content of the system message"):
        serve_model(make_config(run, frontend={"chat_template": no_system}), run, KEY, connecting=no_ray())
    monkeypatch.delenv("CPT_API_KEY", raising=False)
    made = RunDir(tmp_path)
    made.write_json(CATALOG_FILE, CATALOG.to_json())
    with pytest.raises(UserError, match="there is no open key"):
        serve_model(make_config(made, host="0.0.0.0"), made, None, model=run.model, connecting=no_ray())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_open_network_without_a_key_is_refused(
    tmp_path: Path, run: RunDir, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CPT_API_KEY", raising=False)
    made = RunDir(tmp_path)
    made.write_json(CATALOG_FILE, CATALOG.to_json())
    with pytest.raises(UserError, match=rf"{host} is open to the network and there is no open key; .* --insecure"):
        serve_model(make_config(made, host=host), made, None, block=False, model=run.model)


@pytest.mark.parametrize("end", ["revoked", "expired", "spent"])
def test_a_key_that_opens_nothing_is_none(
    tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.delenv("CPT_API_KEY", raising=False)
    made, keyring = RunDir(tmp_path), Keyring(tmp_path / "keys.json")
    key, _ = make_key("bob", days=1, budget=30)
    keyring.add(replace(key, revoked=end == "revoked", expires=1.0 if end == "expired" else None))
    made.write_json(SPENT_FILE, {"bob": 30 if end == "spent" else 29})
    made.write_json(CATALOG_FILE, CATALOG.to_json())
    with pytest.raises(UserError, match="there is no open key"):
        serve_model(make_config(made, host="0.0.0.0"), made, None, model=run.model, connecting=no_ray())
    assert keyring.keys[0].describe(30 if end == "spent" else 29).startswith(end)


def test_a_saved_configuration_that_cannot_be_is_said(run: RunDir) -> None:
    with pytest.raises(UserError, match=r"serve.configurations.a: configuration: no rubric 'b' .known: ornament"):
        serve_model(make_config(run, configurations={"a": {"b": 1}, "c": {}}), run, KEY, block=False)
