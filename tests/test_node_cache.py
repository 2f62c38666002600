"""A node's own copies of what is in an object store: once per content, whole, and only where they are used."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from cpt_ray.cli import main
from cpt_ray.config import load_config
from cpt_ray.errors import UserError
from cpt_ray.serving.served import check_whole, plan_serving
from cpt_ray.tables.node_cache import CACHE_ENV, cache_folder, local_copy
from cpt_ray.tables.rundir import CATALOG_FILE, MODEL_INFO_FILE, RunDir
from cpt_ray.tables.store_path import StorePath
from tests.object_store import ObjectStore, proxy, set_environment
from tests.stored_runs import run_file


def test_a_node_copies_a_folder_once_per_content_and_drops_old_ones(
    object_store: ObjectStore, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StorePath.parse(store) / "model"
    for name in ("config.json", "part/weights"):
        (model / name).write_text(f"old {name}")
    with proxy(object_store.url, lambda number, line: 0.05) as (url, asked):
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


def test_a_cache_that_cannot_be_written_is_said(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (StorePath.parse(store) / "model" / "config.json").write_text("{}")
    monkeypatch.setenv(CACHE_ENV, "/proc/nothing")
    with pytest.raises(UserError, match=r"^/proc/nothing/.*: the copy of .* cannot be written \(.*set CPT_CACHE"):
        local_copy(f"{store}/model")


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
    object_store: ObjectStore,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = StorePath.parse(store) / "model"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    path, roles = run_file(tmp_path, str(tmp_path / "run")), ("policy", "writer", "judge", "director")
    assert main(["run", path, *(f"{role}.model={model}" for role in roles), "--dry-run"]) == 0
    assert "nothing was started or written" in capsys.readouterr().out
    assert not cache_folder().exists()
