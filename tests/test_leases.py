"""One process at a time works on a run in an object store, and a dead one holds up nobody."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from cpt_ray.errors import UserError
from cpt_ray.tables import run_lock
from cpt_ray.tables.rundir import RunDir
from tests.object_store import ObjectStore, proxy, set_environment
from tests.stored_runs import child

HOLDER = """
import sys, time
from cpt_ray.tables.rundir import RunDir
with RunDir.at(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_of_two_processes_one_works_on_a_run_and_a_dead_one_holds_up_nobody(store: str) -> None:
    run = RunDir.at(store)
    holder = child(HOLDER, store)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert run.busy
        with pytest.raises(UserError, match=f"another process works on this run.*process {holder.pid}"), run.locked():
            pass
    finally:
        holder.kill()
        holder.wait()
    assert not run.busy
    with run.locked():
        assert run.busy
    assert not run.busy


def elsewhere(name: str) -> bytes:
    """The lease of a process of another machine."""
    return json.dumps({"owner": name, "host": "other", "pid": 1, "place": "another boot"}).encode()


def test_a_lease_of_another_machine_is_taken_over_once_it_stands_still(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.2)
    run = RunDir.at(store)
    (run.path / run_lock.LOCK_FILE).put(elsewhere("dead"))
    with run.locked():
        assert b"dead" not in (run.path / run_lock.LOCK_FILE).read_bytes()
    assert "held by process 1 on other" in capsys.readouterr().out


def test_a_lease_of_another_machine_that_is_renewed_is_not_taken_over(store: str) -> None:
    run = RunDir.at(store)
    lease = run.path / run_lock.LOCK_FILE
    lease.put(elsewhere("alive"))
    timer = threading.Timer(1.0, lambda: lease.put(elsewhere("alive still")))
    timer.start()
    with pytest.raises(UserError, match="another process works on this run"), run.locked():
        pass
    timer.join()
    assert b"alive still" in lease.read_bytes()


def test_a_command_whose_lease_was_taken_ends_with_a_line(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.2)
    run = RunDir.at(store)
    with pytest.raises(UserError, match="another process has taken over this run"), run.locked():
        (run.path / run_lock.LOCK_FILE).put(elsewhere("thief"))
        time.sleep(60)
    assert b"thief" in (run.path / run_lock.LOCK_FILE).read_bytes()


DEAF_HOLDER = """
import signal, sys, time
from cpt_ray.errors import UserError
from cpt_ray.tables import run_lock
from cpt_ray.tables.rundir import RunDir
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
run_lock.RENEW_SECONDS = 0.2
try:
    with RunDir.at(sys.argv[1]).locked():
        print("held", flush=True)
        time.sleep(600)
except UserError as error:
    is_as_before = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    print(error, is_as_before and signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_a_command_that_was_started_deaf_to_interrupts_ends_too(store: str) -> None:
    holder = child(DEAF_HOLDER, store)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        (RunDir.at(store).path / run_lock.LOCK_FILE).put(elsewhere("thief"))
        said = holder.communicate(timeout=60)[0]
    finally:
        holder.kill()
    assert "another process has taken over this run" in said
    assert said.endswith("True\n")


def test_a_command_keeps_its_lease_while_the_store_is_away(
    object_store: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.2)
    is_away = threading.Event()
    with proxy(object_store.url, lambda number, line: None if is_away.is_set() else 0.0) as (url, asked):
        set_environment(monkeypatch, url, tmp_path / "cache")
        run = RunDir.at(store)
        with run.locked():
            is_away.set()
            before, deadline = len(asked), time.monotonic() + 60
            while len(asked) < before + 8:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            is_away.clear()
            before = (run.path / run_lock.LOCK_FILE).read_bytes()
            while (run.path / run_lock.LOCK_FILE).read_bytes() == before:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_what_another_process_has_taken_over_is_not_tidied_up(store: str) -> None:
    run = RunDir.at(store)
    with pytest.raises(UserError, match="not today"), run.locked():
        (run.path / run_lock.LOCK_FILE).put(elsewhere("thief"))
        run.write_json("ledger.json", {"plan": {}})  # by the thief, for all that this process knows
        raise UserError("not today")
    assert {*run.path.files()} == {run_lock.LOCK_FILE, "ledger.json"}


def test_what_ends_before_there_is_a_result_leaves_nothing_behind(store: str) -> None:
    run = RunDir.at(store)
    with pytest.raises(UserError, match="not today"), run.locked():
        run.write_json("ledger.json", {"plan": {}})
        raise UserError("not today")
    assert run.path.files() == {}
