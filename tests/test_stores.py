"""Runs in an object store: the same tables as in a folder, whatever the store does meanwhile and whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cpt_ray.cluster import unused_port
from cpt_ray.config import load_config
from cpt_ray.errors import UserError
from cpt_ray.tables import address
from cpt_ray.tables.files import replacing
from cpt_ray.tables.records import Reject
from cpt_ray.tables.rundir import SPENT_FILE, TABLES, RunDir
from cpt_ray.tables.store_path import PART_BYTES, StorePath
from cpt_ray.training import worker
from tests.local_cluster import ROOT, LocalCluster
from tests.object_store import BUCKET, ObjectStore, environment, proxy, set_environment
from tests.stored_runs import child, run_commands, run_file

pytestmark = pytest.mark.usefixtures("store")


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


@pytest.mark.parametrize("size", [10, PART_BYTES + 1000])
def test_what_is_in_a_store_first_stays_there(store: str, size: int) -> None:
    path, content = StorePath.parse(store) / "some", os.urandom(size)
    for written in (content, b"later"):
        with replacing(path, keep=True) as file:
            file.write(written)
    assert path.read_bytes() == content


# ---------------------------------------------------------------- a whole run


def rows_of(run: RunDir) -> dict[str, dict[str, list[Any]]]:
    """All rows by table and shard."""
    return {
        table: {name: run.read(table, [name], record) for name in sorted(run.names(table))}
        for table, record in TABLES.items()
        if run.table(table).exists()
    }


def test_a_run_in_a_store_that_fails_and_dawdles_has_the_rows_of_one_in_a_folder(
    object_store: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = ("synthesize", "train", "evaluate")
    in_folder = rows_of(run_commands(tmp_path / "one", str(tmp_path / "run"), commands))

    def fault(number: int, line: str) -> float | None:
        return None if number % 41 == 0 else 0.3 if number % 97 == 0 else 0.0

    with proxy(object_store.url, fault) as (url, asked):
        set_environment(monkeypatch, url, tmp_path / "cache")
        in_store = rows_of(run_commands(tmp_path / "two", store, commands))
    assert len(asked) > 200
    assert in_folder.keys() >= {"units", "generations", "grades", "pairs", "evaluation"}
    assert in_store == in_folder
    assert not (tmp_path / "two" / "s3:").exists()


CHILD = """
import os, sys
from pathlib import Path
from tests import golden_run, stored_runs
number = 0
class Dying(golden_run.RecordingEngine):
    def run(self, requests):
        global number
        number += 1
        if number > int(sys.argv[3]):
            os.kill(os.getpid(), 9)
        return super().run(requests)
stored_runs.RecordingEngine = Dying
stored_runs.run_commands(Path(sys.argv[1]), sys.argv[2], ["synthesize"])
"""


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


# ---------------------------------------------------------------- a training's notes


def test_a_training_goes_on_without_its_notes_while_the_store_is_away(
    object_store: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    with proxy(object_store.url, lambda number, line: None, (403, "AccessDenied")) as (url, asked):
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
