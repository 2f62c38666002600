"""Jobs on a real local cluster with token authentication; and the cluster files' schema. See also test_loop.py."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import httpx
import jsonschema
import pytest
import ray
import yaml

from cpt_ray.cli import main
from cpt_ray.configuration import CATALOG_FILE, Catalog
from cpt_ray.rundir import RunDir
from tests.builders import make_directives, make_rubric
from tests.local_cluster import ROOT, LocalCluster, free_port
from tests.tiny_model import make_tiny_model


def test_a_bad_run_file_fails_the_job_with_its_reason(cluster: LocalCluster) -> None:
    done = cluster.job(
        "submit", "--working-dir", ".", "--", sys.executable, "jobs/train.py", "jobs/embedded.yaml", "trian.beta=1"
    )
    assert done.returncode != 0
    assert 'unknown key (did you mean "train"?)' in done.stdout + done.stderr


def test_a_relative_run_directory_is_refused_in_a_job(cluster: LocalCluster) -> None:
    done = cluster.job("submit", "--working-dir", ".", "--", sys.executable, "jobs/train.py", "jobs/embedded.yaml")
    assert done.returncode != 0
    assert "give an absolute path that every node sees" in done.stdout + done.stderr


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


def test_a_wrong_token_is_refused(cluster: LocalCluster) -> None:
    done = cluster.job("list", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode != 0


def test_the_server_runs_as_a_job_and_ends_with_it(
    cluster: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, port = RunDir(tmp_path), free_port()
    make_tiny_model(run.model)
    run.write_json(CATALOG_FILE, Catalog.build([make_rubric()], make_directives()).to_json())
    policy = {"model": "embedded", "engine": {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}}
    data = {"name": "tiny", "run_dir": str(tmp_path), "rubrics": ["unused"], "prompts": {"source": "unused"}}
    data |= {"writer": {"model": "embedded"}, "policy": policy, "serve": {"port": port}}
    run_file = run.write_text("run.yaml", yaml.safe_dump(data))
    assert main(["keys", "add", str(run_file), "tests"]) == 0
    headers = {"Authorization": f"Bearer {capsys.readouterr().out.split()[0]}"}

    submit = ["submit", "--no-wait", "--submission-id", "serving", "--working-dir", "."]
    started = cluster.job(*submit, "--", sys.executable, "jobs/serve.py", str(run_file))
    assert started.returncode == 0, started.stderr
    body = {"model": "cpt:ornament=high", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    deadline = time.monotonic() + 240
    while True:
        try:
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, headers=headers, timeout=60)
            if answer.status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, cluster.job("logs", "serving").stdout
        time.sleep(1)
    assert answer.json()["configuration"]["applied"] == {"ornament": "high"}
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
    assert cluster.job("stop", "serving").returncode == 0
    with pytest.raises(httpx.TransportError):
        while time.monotonic() < deadline:
            httpx.get(f"http://127.0.0.1:{port}/health")
            time.sleep(0.5)


def test_cluster_yaml_follows_rays_schema() -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(
        yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8")),
        json.loads(schema.read_text(encoding="utf-8")),
    )
