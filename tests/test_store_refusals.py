"""Addresses and stores that cannot be used are named in a line, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt_ray.cli import main
from cpt_ray.config import load_config
from cpt_ray.errors import UserError
from tests.object_store import ObjectStore, proxy, set_environment
from tests.stored_runs import run_file

pytestmark = pytest.mark.usefixtures("store")


@pytest.mark.parametrize("given", ["run_dir", "train.checkpoints", "policy.model", "serve.adapters.poet"])
def test_a_scheme_that_is_not_supported_is_refused_by_name(given: str, tmp_path: Path) -> None:
    path = run_file(tmp_path, str(tmp_path / "run"))
    with pytest.raises(
        UserError, match=rf"{given.rpartition('.')[2]}.*ftp:// is not supported: give a path, or an address with s3://"
    ):
        load_config(Path(path), [f"{given}=ftp://host/folder"])
    assert not [*tmp_path.glob("ftp*")]


@pytest.mark.parametrize("command", [["status", "ftp://x/y"], ["push", "RUN_FILE", "ftp://x/y"]])
def test_arguments_with_such_a_scheme_are_refused_too(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path, str(tmp_path / "run"))
    assert main([path if word == "RUN_FILE" else word for word in command]) == 1
    assert "ftp:// is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["s3:/bucket/run", "s3://", "s3://bucket/../x", "s3://bucket/a b?c", "S3://b/x"])
def test_an_address_is_whole(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run_dir: found"):
        load_config(Path(run_file(tmp_path, text)))


def test_a_bucket_that_is_not_there_is_said_in_a_line_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = run_file(tmp_path, "s3://no-such-bucket/run")
    for command in ("synthesize", "train", "evaluate", "serve"):
        assert main([command, path]) == 1
        assert "there is no such bucket as s3://no-such-bucket" in capsys.readouterr().err
    assert not (tmp_path / "s3:").exists()


def test_a_store_that_refuses_access_is_said_in_a_line(
    object_store: ObjectStore,
    store: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = run_file(tmp_path, store)
    with proxy(object_store.url, lambda number, line: None, (403, "AccessDenied")) as (url, _):
        set_environment(monkeypatch, url, tmp_path / "cache")
        for command in (["status", store], ["synthesize", path]):
            assert main(command) == 1
            assert "access refused (403 Forbidden, AccessDenied); give credentials" in capsys.readouterr().err
