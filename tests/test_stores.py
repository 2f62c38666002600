"""Runs in an object store: the same tables as in a folder, whatever the store does meanwhile and whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cpt_ray.cli import main
from cpt_ray.cluster import unused_port
from cpt_ray.config import load_config
from cpt_ray.errors import UserError
from cpt_ray.serving.asgi import Refusal
from cpt_ray.serving.keys import Keyring, Meter, make_key
from cpt_ray.serving.served import check_whole, plan_serving
from cpt_ray.serving.store import JsonStore
from cpt_ray.tables import address, run_lock
from cpt_ray.tables.files import replacing
from cpt_ray.tables.node_cache import cache_folder, local_copy
from cpt_ray.tables.records import Reject
from cpt_ray.tables.rundir import CATALOG_FILE, KEYS_FILE, MODEL_INFO_FILE, SPENT_FILE, TABLES, RunDir
from cpt_ray.tables.store_path import PART_BYTES, StorePath
from cpt_ray.training import worker
from tests.golden_run import RecordingEngine, places, write_run_file
from tests.local_cluster import LocalCluster
from tests.object_store import BUCKET, ObjectStore, environment, forget_stores, proxy, set_environment

ROOT = Path(__file__).parent.parent
TINY = ("ornament", "mood")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    started = ObjectStore(tmp_path_factory.mktemp("store") / "log")
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def store(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty folder in the store."""
    set_environment(monkeypatch, server.url, tmp_path / "cache")
    yield f"s3://{BUCKET}/{tmp_path.name}"
    forget_stores()


# ---------------------------------------------------------------- paths and files


def test_a_folder_of_a_store_lists_what_was_put_at_once_and_nothing_else(store: str) -> None:
    folder = StorePath.parse(store)
    assert not folder.exists()
    assert [*folder.iterdir()] == []
    for name in ("a/one.json", "a/two.txt", "ab/three.json"):
        (folder / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["a", "ab"]
    assert [path.stem for path in (folder / "a").glob("*.json")] == ["one"]
    assert (folder / "a").is_dir()
    assert not (folder / "a").is_file()
    assert (folder / "a" / "one.json").read_text() == "a/one.json"
    (folder / "a").remove_tree()
    assert [*folder.files()] == ["ab/three.json"]


def test_what_ends_in_an_error_is_not_put(store: str) -> None:
    path = StorePath.parse(store) / "half"
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert not path.exists()


def test_large_objects_are_read_by_parts_and_of_one_version(store: str, tmp_path: Path) -> None:
    path, content = StorePath.parse(store) / "large", os.urandom(PART_BYTES + 1000)
    with replacing(path) as file:
        file.write(content)
    assert path.read_bytes() == content
    path.download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    with path.open() as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == content[-10:]
        path.put(content[::-1])
        file.seek(0)
        with pytest.raises(UserError, match="was replaced while it was read"):
            file.read()


def test_the_counts_of_a_shard_stay_with_its_rows(store: str) -> None:
    run = RunDir.at(store)
    rows = [Reject(stage="s", subject_id=str(at), rubric_id="r", level="l", reason="why", detail="") for at in range(9)]
    run.write("rejects", "some", rows, {"rows_in": 12})
    assert run.has("rejects", "some")
    assert run.read("rejects", ["some"], Reject) == rows
    assert run.counts("rejects", "some") == {"rows_in": 12}


# ---------------------------------------------------------------- a whole run


def run_file(folder: Path, run_dir: str) -> str:
    """The golden run, with its run directory elsewhere."""
    path = Path(write_run_file(folder, "levels", TINY, combine=[[*TINY]]))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_dir": run_dir}))
    return str(path)


def run_commands(folder: Path, run_dir: str, commands: Sequence[str]) -> RunDir:
    """Real stages in this process, with an engine that answers by a function."""
    folder.mkdir(exist_ok=True)
    path = run_file(folder, run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for place, value in places(RecordingEngine(), []).items():
            patch.setattr(f"cpt_ray.{place}", value)
        for command in commands:
            assert main([*command.split(), path]) == 0
    return RunDir.at(run_dir)


def rows_of(run: RunDir) -> dict[str, dict[str, list[Any]]]:
    """All rows by table and shard."""
    return {
        table: {name: run.read(table, [name], record) for name in sorted(run.names(table))}
        for table, record in TABLES.items()
        if run.table(table).exists()
    }


def test_a_run_in_a_store_that_fails_and_dawdles_has_the_rows_of_one_in_a_folder(
    server: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = ("synthesize", "train", "evaluate")
    in_folder = rows_of(run_commands(tmp_path / "one", str(tmp_path / "run"), commands))

    def fault(number: int, line: str) -> float | None:
        return None if number % 41 == 0 else 0.3 if number % 97 == 0 else 0.0

    with proxy(server.url, fault) as (url, asked):
        set_environment(monkeypatch, url, tmp_path / "cache")
        in_store = rows_of(run_commands(tmp_path / "two", store, commands))
    assert len(asked) > 200
    assert in_folder.keys() >= {"units", "generations", "grades", "pairs", "evaluation"}
    assert in_store == in_folder
    assert not (tmp_path / "two" / "s3:").exists()


CHILD = """
import os, sys
from pathlib import Path
from tests import golden_run, test_stores
number = 0
class Dying(golden_run.RecordingEngine):
    def run(self, requests):
        global number
        number += 1
        if number > int(sys.argv[3]):
            os.kill(os.getpid(), 9)
        return super().run(requests)
test_stores.RecordingEngine = Dying
test_stores.run_commands(Path(sys.argv[1]), sys.argv[2], ["synthesize"])
"""


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_with_nothing_lost_doubled_or_made_again(store: str, tmp_path: Path) -> None:
    process = child(CHILD, str(tmp_path / "work"), store, "12")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    run = RunDir.at(store)
    before = {name: version for name, version in run.path.files().items() if name.startswith("generations/")}
    assert before
    assert not run.busy
    run_commands(tmp_path / "work", store, ["synthesize"])
    after = run.path.files()
    assert before.items() <= after.items()
    units, written = (
        [row.unit_id for row in run.read(table, sorted(run.names(table)), TABLES[table])]
        for table in ("units", "generations")
    )
    assert len(after.keys() - before.keys()) > 0
    assert len(written) == len(set(written))
    assert set(units) <= set(written)


# ---------------------------------------------------------------- one process at a time

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
    server: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.2)
    is_away = threading.Event()
    with proxy(server.url, lambda number, line: None if is_away.is_set() else 0.0) as (url, asked):
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


# ---------------------------------------------------------------- keys

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
    server: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt_ray.serving.keys.REREAD_SECONDS", 0.05)
    path = RunDir.at(store).path / KEYS_FILE
    key, secret = make_key("who")
    Keyring(path).add(key)
    is_away = threading.Event()
    with proxy(server.url, lambda number, line: None if is_away.is_set() else 0.0) as (url, asked):
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


# ---------------------------------------------------------------- copies on a node


def test_a_node_copies_a_folder_once_per_content_and_drops_old_ones(
    server: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StorePath.parse(store) / "model"
    for name in ("config.json", "part/weights"):
        (model / name).write_text(f"old {name}")
    with proxy(server.url, lambda number, line: 0.05) as (url, asked):
        set_environment(monkeypatch, url, tmp_path / "cache")
        copies: list[Path] = []
        threads = [threading.Thread(target=lambda: copies.append(local_copy(model))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(copies)) == 1
        assert sum(line.startswith("GET") and "weights" in line for line in asked) == 1
    assert (copies[0] / "part" / "weights").read_text() == "old part/weights"
    abandoned = copies[0].parent / ".other-1.tmp"
    abandoned.mkdir()
    for folder in (copies[0], abandoned):
        os.utime(folder, (0, 0))
    assert local_copy(model) == copies[0]  # which is young again by that
    (model / "part/weights").write_text("new")
    newer = local_copy(str(model))
    assert (newer / "part" / "weights").read_text() == "new"
    assert newer.is_relative_to(cache_folder())
    assert {path for path in newer.parent.iterdir() if path.is_dir()} == {copies[0], newer}
    os.utime(copies[0], (0, 0))
    (model / "part/weights").write_text("newest")
    newest = local_copy(model)
    assert {path for path in newer.parent.iterdir() if path.is_dir()} == {newest, newer}


def test_nodes_that_share_a_cache_without_locks_do_not_harm_each_other(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StorePath.parse(store) / "model"
    for name in ("config.json", "part/weights"):
        (model / name).write_text(name)
    monkeypatch.setattr("cpt_ray.tables.node_cache.exclusive", lambda folder: contextlib.nullcontext(False))
    both, download = threading.Barrier(2), StorePath.download

    def download_at_once(self: StorePath, target: Path) -> None:
        both.wait(60)  # each has begun its own copy
        download(self, target)

    monkeypatch.setattr(StorePath, "download", download_at_once)
    copies: list[Path] = []
    threads = [threading.Thread(target=lambda: copies.append(local_copy(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copies) == 2
    assert copies[0] == copies[1]
    assert {path.name for path in copies[0].iterdir()} == {"config.json", "part"}
    assert [path for path in copies[0].parent.iterdir() if path.is_dir()] == [copies[0]]


def test_a_model_that_a_training_has_not_put_whole_is_not_served(store: str, tmp_path: Path) -> None:
    run, config = RunDir.at(store), load_config(Path(run_file(tmp_path, store)))
    run.write_json("model/config.json", {})
    run.write_json(CATALOG_FILE, {})
    model = str(run.model)
    with pytest.raises(UserError, match="model: the model is not complete"):
        plan_serving(config, run, run.model)
    half = local_copy(run.model)
    with pytest.raises(UserError, match="model: the model is not complete"):
        check_whole(run, model, half)
    run.write_json(MODEL_INFO_FILE, {})
    check_whole(run, model, run.model)
    check_whole(run, model, local_copy(run.model))
    check_whole(run, "the/untuned/model", half)


def test_an_adapter_that_a_training_has_not_put_whole_is_not_served(store: str, tmp_path: Path) -> None:
    run = RunDir.at(store)
    config = load_config(Path(run_file(tmp_path, store)), [f"serve.adapters.poet={run.adapter}"])
    run.write_json("adapter/adapter_config.json", {"r": 8})
    with pytest.raises(UserError, match=r"catalog\.json: not there; serve\.adapters\.poet takes the folder adapter/"):
        plan_serving(config, run, run.model)


def test_a_dry_run_copies_no_model_from_a_store(
    server: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = StorePath.parse(store) / "model"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    path, roles = run_file(tmp_path, str(tmp_path / "run")), ("policy", "writer", "judge", "director")
    assert main(["run", path, *(f"{role}.model={model}" for role in roles), "--dry-run"]) == 0
    assert "nothing was started or written" in capsys.readouterr().out
    assert not cache_folder().exists()


# ---------------------------------------------------------------- a training's notes


def test_a_training_goes_on_without_its_notes_while_the_store_is_away(
    server: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(Path(run_file(tmp_path, store)))
    task = worker.TrainingTask(config, RunDir.at(store), "key", "policy", "rows", None)
    (tmp_path / worker.TENSORBOARD).mkdir()
    (tmp_path / worker.TENSORBOARD / "events").write_text("loss")
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    reported: list[dict[str, int]] = []
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_size=lambda: 2))
    monkeypatch.setattr("ray.train.report", lambda metrics, **_: reported.append(metrics))
    reporter, state = worker._reporter(task, tmp_path), SimpleNamespace(global_step=1, is_world_process_zero=True)
    with proxy(server.url, lambda number, line: None, (403, "AccessDenied")) as (url, asked):
        set_environment(monkeypatch, url, tmp_path / "cache")
        reporter.on_log(None, state, None, {"loss": worker.LN_2, "rewards/accuracies": 0.5})
        reporter.on_save(None, state, None)
    assert reported == [{"step": 1}]
    assert len(asked) == 2


def test_a_rank_whose_store_fails_raises_and_does_not_leave_the_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(Path(run_file(tmp_path, str(tmp_path / "run"))))
    task = worker.TrainingTask(config, RunDir(tmp_path / "run"), "key", str(tmp_path), f"s3://{BUCKET}/none/rows", None)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))

    def fail(*_: Any) -> None:
        raise address.StoreError("away")

    monkeypatch.setattr(worker, "_train_rank", fail)
    with pytest.raises(address.StoreError, match="away"):
        worker.work({"task": task})


# ---------------------------------------------------------------- what is refused


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
    server: ObjectStore, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_file(tmp_path, store)
    with proxy(server.url, lambda number, line: None, (403, "AccessDenied")) as (url, _):
        set_environment(monkeypatch, url, tmp_path / "cache")
        for command in (["status", store], ["synthesize", path]):
            assert main(command) == 1
            assert "access refused (403 Forbidden, AccessDenied); give credentials" in capsys.readouterr().err


# ---------------------------------------------------------------- the loop on real parts


@pytest.fixture
def cluster(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """One whose nodes know nothing of the store: jobs bring the credentials along."""
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        started = LocalCluster(tmp_path)
    yield started
    started.stop()


@pytest.mark.cluster
def test_the_loop_runs_in_a_store_from_submission_to_a_served_model(
    cluster: LocalCluster, store: str, tmp_path: Path
) -> None:
    port = unused_port()
    small = ("prompts.limit=24", "synthesis.paraphrases=4", "train.max_pairs=64", "train.num_workers=1")
    small += ("writer.num_actors=1", "policy.num_actors=1")
    small += ("evaluate.prompts=2", "evaluate.directives=1", "evaluate.trained_directives=0", "evaluate.bootstrap=20")
    settings = ("tests/toy/run.yaml", f"run_dir={store}", *small, f"serve.port={port}")
    sent = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "CPT_CACHE"))}
    options = ("--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": sent}))

    def cpt(*arguments: str) -> str:
        command = [sys.executable, "-m", "cpt_ray", *arguments, *settings[1:]]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    job = (sys.executable, "-m", "cpt_ray", "run", *settings)
    done = cluster.job("submit", *options, "--", *job, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = RunDir.at(store)
    files = run.path.files()
    assert {"report/report.html", "model/model.safetensors", "adapter/adapter_model.safetensors"} <= {*files}
    assert any(name.startswith("checkpoints/") for name in files)
    assert any(name.startswith("tensorboard/") for name in files)
    key = cpt("keys", "add", settings[0], "who", "--budget", "100000").split()[0]
    cpt("push", settings[0], str(tmp_path / "pushed"))
    assert (tmp_path / "pushed" / "model.safetensors").is_file()

    job = (sys.executable, "jobs/serve.py", *settings)
    assert cluster.job("submit", "--no-wait", "--submission-id", "serving", *options, "--", *job).returncode == 0
    deadline = time.monotonic() + 300
    answer = None
    while answer is None or answer.status_code in (404, 500, 502, 503):
        assert time.monotonic() < deadline, cluster.job("logs", "serving").stdout[-3000:]
        time.sleep(0.5)
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(
                f"http://127.0.0.1:{port}/toy/v1/chat/completions",
                headers={"Authorization": f"Bearer {key}"},
                json={"model": "toy", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 5},
                timeout=60,
            )
    assert answer.status_code == 200, answer.text
    while not (spent := run.read_json(SPENT_FILE)) or not (parts := list(run.access.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert spent["who"] == answer.json()["usage"]["total_tokens"]
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert "who" in {line["key"] for line in lines}
    assert cluster.job("stop", "serving").returncode == 0
    assert not (ROOT / "s3:").exists()
