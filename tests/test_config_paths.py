"""Paths and addresses in a run file: a home folder is put in, and what only a shell replaces is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.config import expanded_path, load_any_config
from cpt_ray.errors import UserError
from tests.builders import overridden

PATHS = [
    ("run_dir={}", lambda one: one.run_dir),
    ("rubrics=[{}]", lambda one: one.rubrics[0]),
    ("prompts.source={}", lambda one: one.prompts.source),
    ("policy.model={}", lambda one: one.policy.model),
    ("judge.model={}", lambda one: one.judge.model),
    ("steer.embedder.model={}", lambda one: one.steer.embedder.model),
    ("train.checkpoints={}", lambda one: one.train.checkpoints),
    ("serve.adapters.a={}", lambda one: one.serve.adapters["a"]),
    ("policy.engine.download_dir={}", lambda one: one.policy.engine["download_dir"]),
    ("serve.frontend.chat_template={}", lambda one: one.serve.frontend["chat_template"]),
]


@pytest.mark.parametrize(("override", "read"), PATHS)
def test_a_home_folder_is_put_in_wherever_a_path_is_given(
    override: str, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert read(overridden(override.format("~/a b"))) == "/home/me/a b"


@pytest.mark.parametrize("text", ["$HOME/a", "a/${X}/b", "%TEMP%/a", "~nobody-of-this-name/a", "a\nb", "file:///a"])
@pytest.mark.parametrize("override", [override for override, _ in PATHS[:6]])
def test_what_only_a_shell_replaces_is_refused(override: str, text: str) -> None:
    with pytest.raises(UserError, match=r"is not replaced here|no user of that name|control characters|the path alone"):
        overridden(override.format(json.dumps(text) if "[" in override else text))


@pytest.mark.parametrize("override", ["rubrics=[{}]", "prompts.source={}"])
@pytest.mark.parametrize("address", ["s3://bucket/a", "gs:/a", "https://host/a.jsonl", "C:/a", "ftp://host/a"])
def test_an_address_where_a_path_belongs_is_refused(override: str, address: str) -> None:
    with pytest.raises(UserError, match="are not read or written here; give a path") as caught:
        overridden(override.format(address))
    assert len(str(caught.value).splitlines()) == 1


def test_addresses_are_kept_where_they_are_read() -> None:
    address = "s3://bucket/%20a%20c%C3%A9"
    found = overridden(f"run_dir={address}", f"train.checkpoints={address}", f"serve.adapters.a={address}")
    assert (found.run_dir, found.train.checkpoints, found.serve.adapters) == (address, address, {"a": address})
    with pytest.raises(UserError, match="an address begins with s3://"):
        overridden("train.checkpoints=s3:/bucket/a")
    assert overridden("train.checkpoints=file:///shared/kept").train.checkpoints == "/shared/kept"


def test_the_run_file_itself_says_what_it_means_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "run.yaml"
    rest = "name: a\npolicy: {model: ~/m}\n"
    path.write_text(f"{rest}preferences: {{source: ~/p.jsonl}}\nrun_dir: ~/out")
    found = load_any_config(path)
    assert (found.run_dir, found.policy.model) == ("/home/me/out", "/home/me/m")
    for text in ("~", "null", "''"):
        path.write_text(f"{rest}preferences: {{source: p.jsonl}}\nrun_dir: {text}")
        with pytest.raises(UserError, match="run_dir: found nothing"):
            load_any_config(path)


@given(st.text(alphabet="ab/~$%{} .:-_1", min_size=1))
def test_a_path_is_as_it_was_or_has_a_home_in_front_or_is_refused(text: str) -> None:
    try:
        found = expanded_path(text)
    except ValueError as error:
        assert set(text) & set("~$%")
        assert repr(text) in str(error)
    else:
        assert found == text or (text.startswith("~") and not found.startswith("~"))
