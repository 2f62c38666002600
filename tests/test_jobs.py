"""Jobs on a real local cluster with token authentication, through `ray job submit`; and the cluster files' schema."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class LocalCluster:
    """`ray start --head --block` as a child process, stopped by its own handle."""

    def __init__(self, folder: Path):
        self.env = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
        }
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        command = [str(RAY), "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"]
        command += [f"--dashboard-port={self.dashboard.rpartition(':')[2]}", "--dashboard-host=127.0.0.1"]
        command += [f"--ray-client-server-port={free_port()}", "--disable-usage-stats"]
        self.log = folder / "ray.log"
        self.process = subprocess.Popen(
            command, env=self.env, stdout=self.log.open("w"), stderr=subprocess.STDOUT, cwd=folder
        )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if self.job("list", timeout=60).returncode == 0:
                return
            time.sleep(1)
        pytest.fail(f"the cluster did not start: {self.log.read_text()[-2000:]}")

    def job(self, *arguments: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(RAY), "job", arguments[0], "--address", self.dashboard, *arguments[1:]]
        return subprocess.run(command, env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    started = LocalCluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()


def test_the_stages_run_as_jobs_on_a_cluster_with_token_authentication(cluster: LocalCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    small = [f"run_dir={run_dir}", "prompts.limit=40", "evaluate.prompts=3", "evaluate.bootstrap=50"]
    for stage in ("synthesize", "train", "evaluate"):
        done = cluster.job(
            "submit", "--working-dir", ".", "--", sys.executable, f"jobs/{stage}.py", "jobs/embedded.yaml", *small
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "succeeded" in done.stdout
    results = json.loads((run_dir / "report" / "results.json").read_text(encoding="utf-8"))
    assert results["base"]["n"] > 0
    assert results["tuned"]["n"] > 0


def test_a_bad_run_file_fails_the_job_with_its_reason(cluster: LocalCluster) -> None:
    done = cluster.job(
        "submit", "--working-dir", ".", "--", sys.executable, "jobs/train.py", "jobs/embedded.yaml", "trian.beta=1"
    )
    assert done.returncode != 0
    assert 'unknown key (did you mean "train"?)' in done.stdout + done.stderr


def test_a_wrong_token_is_refused(cluster: LocalCluster) -> None:
    done = cluster.job("list", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode != 0


def test_cluster_yaml_follows_rays_schema() -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(
        yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8")),
        json.loads(schema.read_text(encoding="utf-8")),
    )
