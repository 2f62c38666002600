"""Jobs on a real local cluster with token authentication; and the cluster files' schema. See also test_loop.py."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import jsonschema
import ray
import yaml

from tests.local_cluster import ROOT, LocalCluster


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
