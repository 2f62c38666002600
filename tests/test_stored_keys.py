"""Keys in an object store, which processes change at once: none is lost, and a server refuses a revoked one."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.serving.asgi import Refusal
from cpt_ray.serving.keys import Keyring, Meter, make_key
from cpt_ray.serving.store import JsonStore
from cpt_ray.tables import address
from cpt_ray.tables.rundir import KEYS_FILE, SPENT_FILE, RunDir
from cpt_ray.tables.store_path import StorePath
from tests.object_store import ObjectStore, proxy, set_environment
from tests.stored_runs import child

ADDER = """
import sys
from cpt_ray.serving.keys import Keyring, make_key
from cpt_ray.tables.rundir import KEYS_FILE, RunDir
keyring = Keyring(RunDir.at(sys.argv[1]).path / KEYS_FILE)
for number in range(12):
    keyring.add(make_key(f"{sys.argv[2]} {number}")[0])
keyring.revoke(f"{sys.argv[2]} 0")
"""


def test_keys_that_two_processes_change_at_once_are_all_there(store: str) -> None:
    processes = [child(ADDER, store, name) for name in ("this", "that")]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    keys = {key.name: key for key in Keyring(RunDir.at(store).path / KEYS_FILE).keys}
    assert keys.keys() == {f"{name} {number}" for name in ("this", "that") for number in range(12)}
    assert {name for name, key in keys.items() if key.revoked} == {"this 0", "that 0"}


def test_a_put_whose_answer_was_lost_is_not_done_twice(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = JsonStore(StorePath.parse(store))
    put_if, lost = StorePath.put_if, []

    def put_and_lose(self: StorePath, content: bytes, version: Any) -> Any:
        new = put_if(self, content, version)
        if not lost:
            lost.append(new)
            raise address.ChangedError
        return new

    monkeypatch.setattr(StorePath, "put_if", put_and_lose)
    files.change("count.json", lambda data: [*(data or []), "once"])
    assert files.read("count.json") == ["once"]
    assert lost


def test_a_server_keeps_its_keys_while_the_store_is_away_and_sees_a_revoked_one_after(
    object_store: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt_ray.serving.keys.REREAD_SECONDS", 0.05)
    path = RunDir.at(store).path / KEYS_FILE
    key, secret = make_key("who")
    Keyring(path).add(key)
    is_away = threading.Event()
    with proxy(object_store.url, lambda number, line: None if is_away.is_set() else 0.0) as (url, asked):
        set_environment(monkeypatch, url, tmp_path / "cache")
        serving = Keyring(path)
        assert serving.check(f"Bearer {secret}".encode()) == key
        is_away.set()
        before = len(asked)
        while len(asked) < before + 3:
            assert serving.check(f"Bearer {secret}".encode()) == key
            time.sleep(0.01)
        is_away.clear()
        Keyring(path).revoke("who")
        deadline = time.monotonic() + 60
        while serving.check(f"Bearer {secret}".encode()) == key:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_key_revoked_while_nobody_asks_is_refused_at_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt_ray.serving.keys.REREAD_SECONDS", 0.05)
    path = RunDir.at(store).path / KEYS_FILE
    key, secret = make_key("who")
    Keyring(path).add(key)
    idle = Keyring(path)
    assert idle.check(f"Bearer {secret}".encode()) == key
    Keyring(path).revoke("who")
    looks, version = threading.Semaphore(0), JsonStore.version

    def counted(self: JsonStore, name: str) -> Any:
        looks.release()
        return version(self, name)

    monkeypatch.setattr(JsonStore, "version", counted)
    for _ in range(2):  # once the second look begins, the first has ended
        assert looks.acquire(timeout=60)
    assert isinstance(idle.check(f"Bearer {secret}".encode()), Refusal)


@pytest.mark.parametrize("is_stored", [True, False])
def test_two_meters_of_a_run_lose_nothing_that_a_key_has_spent(store: str, tmp_path: Path, is_stored: bool) -> None:
    folder, key = StorePath.parse(store) if is_stored else tmp_path, make_key("who", budget=1000)[0]
    meters = [Meter(folder / SPENT_FILE) for _ in range(2)]

    async def count() -> list[Refusal | None]:
        await asyncio.gather(*(meters[at % 2].charge(key, 30 + at) for at in range(8)))
        await meters[0].charge(key, 700)
        await meters[1].charge(key, 100)
        return [await meter.admit(key) for meter in (meters[1], Meter(folder / SPENT_FILE))]

    assert all(isinstance(answer, Refusal) for answer in asyncio.run(count()))
    assert JsonStore(folder).read(SPENT_FILE) == {"who": 8 * 30 + 28 + 800}
