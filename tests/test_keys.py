"""Keys: kept as hashes, made and revoked by command, seen by a running server."""

from __future__ import annotations

import hashlib
import json
import stat
import time
from pathlib import Path

import pytest
import yaml

from cpt_ray.cli import main
from cpt_ray.errors import UserError
from cpt_ray.serving import keys
from cpt_ray.serving.asgi import Refusal
from cpt_ray.serving.keys import UNKNOWN_KEY, Key, Keyring, choose_keys, make_key
from cpt_ray.tables.rundir import RunDir


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    data = {"name": "a", "run_dir": str(tmp_path), "rubrics": ["r"], "prompts": {"source": "p"}}
    path.write_text(yaml.safe_dump(data | {role: {"model": "org/name"} for role in ("writer", "policy")}))
    return path


def header(secret: str) -> bytes:
    return f"Bearer {secret}".encode()


def test_a_key_is_made_listed_and_revoked_by_command(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--budget", "1000000", "--days", "30"]
    assert main(["keys", "add", str(run_file), "alice", *limits]) == 0
    secret = capsys.readouterr().out.split()[0]
    file = run_file.parent / "keys.json"
    assert secret not in file.read_text()
    assert json.loads(file.read_text())[0]["hash"] == hashlib.sha256(secret.encode()).hexdigest()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    keyring = Keyring(file)
    found = keyring.check(header(secret))
    assert isinstance(found, Key)
    assert found.metered
    assert found.expires is not None
    assert abs(found.expires - time.time() - 30 * 86400) < 60

    assert main(["keys", "list", str(run_file)]) == 0
    assert "60 requests/min, 9000 tokens/min, 0 of 1000000 tokens used" in capsys.readouterr().out
    assert main(["keys", "revoke", str(run_file), "alice"]) == 0
    refused = Keyring(file).check(header(secret))
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.code) == (403, "key_revoked")

    assert main(["keys", "add", str(run_file), "alice"]) == 1
    assert "there is a key named 'alice'" in capsys.readouterr().err
    assert main(["keys", "revoke", str(run_file), "alcie"]) == 1
    assert "no key named 'alcie' (did you mean \"alice\"?)" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "many", "1e99", "nan", "inf", "36526", ""])
def test_a_limit_that_is_no_number_above_zero_is_refused(
    run_file: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "add", str(run_file), "alice", f"--days={value}"])
    assert f"--days: found '{value}'; give a number above 0, at most 36,525" in capsys.readouterr().err
    assert not (run_file.parent / "keys.json").exists()


@pytest.mark.parametrize("value", ["1.5", "0", "-3", "nan", "1e3", "9" * 16])
@pytest.mark.parametrize("limit", ["--requests-per-minute", "--tokens-per-minute", "--budget"])
def test_a_limit_that_is_counted_is_whole(
    run_file: Path, limit: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "add", str(run_file), "alice", f"{limit}={value}"])
    assert f"{limit}: found '{value}'; give a whole number above 0" in capsys.readouterr().err


def test_the_longest_life_of_a_key_is_listed(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", str(run_file), "alice", "--days", "36525"]) == 0
    assert main(["keys", "list", str(run_file)]) == 0
    assert "open, until 2" in capsys.readouterr().out


BAD_NAMES = [
    "bob  open\nmallory", "a\tb", "\x1b[2Kbob", "a\x00", "bob\u202egnp", "\u200b", "a\u200db", "\u2066a", " bob",
    "bob ", "a\u2028b", "\udcff", "a" * 65, "\x7f", "\u00a0",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_would_fake_or_hide_a_line_of_the_list_is_refused(
    run_file: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "add", str(run_file), name]) == 1
    told = capsys.readouterr().err
    assert told.isascii()
    assert told.count("\n") == 1
    assert "at most 64 printable" in told or "needs a name" in told
    assert not (run_file.parent / "keys.json").exists()
    assert main(["keys", "revoke", str(run_file), name]) == 1
    told = capsys.readouterr().err
    assert told.isascii()
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["alice", "Zoë's laptop", "山田", "a" * 64])
def test_any_readable_name_is_kept(run_file: Path, name: str) -> None:
    assert main(["keys", "add", str(run_file), name]) == 0
    assert [one.name for one in Keyring(run_file.parent / "keys.json").keys] == [name]


def test_a_name_of_an_earlier_version_cannot_fake_a_line(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_file.parent / "keys.json").write_text(json.dumps([{"name": "a\nb", "hash": "0", "created": 0.0}]))
    assert main(["keys", "list", str(run_file)]) == 0
    assert capsys.readouterr().out.splitlines() == ["'a\\nb'               open"]


@pytest.mark.parametrize("given", [" secret\n", "secret", "\tsecret "])
def test_the_servers_key_is_taken_without_the_blanks_around_it(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPT_API_KEY", given)
    fixed, made = choose_keys("0.0.0.0", RunDir(tmp_path), None, insecure=False)
    assert fixed is not None
    assert made is None
    assert Keyring(tmp_path / "keys.json", fixed).check(header("secret")) == fixed[0]


@pytest.mark.parametrize("given", [" ", "\n", "two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPT_API_KEY", given)
    with pytest.raises(UserError, match="CPT_API_KEY: use printable ASCII"):
        choose_keys("127.0.0.1", RunDir(tmp_path), None, insecure=False)


def test_a_running_server_sees_keys_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "REREAD_SECONDS", 0.0)
    server, command = Keyring(tmp_path / "keys.json"), Keyring(tmp_path / "keys.json")
    key, secret = make_key("bob")
    assert server.check(header(secret)) is UNKNOWN_KEY
    command.add(key)
    assert server.check(header(secret)) == key
    command.revoke("bob")
    assert isinstance(server.check(header(secret)), Refusal)
    (tmp_path / "keys.json").unlink()
    assert server.check(header(secret)) is UNKNOWN_KEY


def test_two_commands_at_once_lose_no_key_and_open_no_revoked_one(tmp_path: Path) -> None:
    rings = [Keyring(tmp_path / "keys.json") for _ in range(3)]
    assert [ring.keys for ring in rings] == [()] * 3  # what each of them knows, for a second
    for ring, name in zip(rings, "abc", strict=True):
        ring.add(make_key(name)[0])
    stale = Keyring(tmp_path / "keys.json")
    assert len(stale.keys) == 3
    rings[2].revoke("a")
    stale.add(make_key("d")[0])
    assert [(one.name, one.revoked) for one in Keyring(tmp_path / "keys.json").keys] == [
        ("a", True), ("b", False), ("c", False), ("d", False)
    ]  # fmt: skip


def test_a_key_without_a_name_is_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", str(run_file), " "]) == 1
    assert "a key needs a name" in capsys.readouterr().err
    assert not (run_file.parent / "keys.json").exists()


def test_two_keys_are_never_alike_and_neither_is_the_hash_a_key() -> None:
    (first, secret), (second, _) = make_key("a"), make_key("b")
    assert first.hash != second.hash
    assert Keyring(Path("/nonexistent"), (first,)).check(header(first.hash)) is UNKNOWN_KEY
    assert Keyring(Path("/nonexistent"), (first,)).check(header(secret)) == first


def test_a_file_that_holds_no_keys_is_said(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('[{"nmae": 1}]')
    with pytest.raises(UserError, match=r"keys\.json: cannot be read as keys"):
        Keyring(tmp_path / "keys.json").check(b"")
