"""The files in jobs/clusters and cluster.yaml: against the schemas and schedulers of Ray and KubeRay, and run for real.

What needs a cloud or a container runtime is not run here.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.serve.schema import ServeDeploySchema

from cpt_ray.cluster import unused_port
from cpt_ray.serving.keys import Keyring, make_key
from cpt_ray.synthesis.pair_steps import PAIRING
from cpt_ray.tables.rundir import KEYS_FILE
from tests.cluster_files import CLUSTERS, RAY, load, pins
from tests.local_cluster import ROOT, LocalCluster
from tests.served import make_config, make_run

LAUNCHED = [ROOT / "cluster.yaml", CLUSTERS / "cluster-gcp.yaml"]
ON_KUBERNETES = [CLUSTERS / "rayjob.yaml", CLUSTERS / "rayservice.yaml"]


def prepared(path: Path) -> Any:
    """As `ray up` reads it."""
    config = prepare_config(load(path))
    validate_config(config)
    return config


# ---------------------------------------------------------------- the operating page


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    table = page.split(f"## {heading}\n")[1].split("\n|", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_memory_of_every_model_is_as_the_page_says_that_it_is_counted() -> None:
    page = (ROOT / "jobs" / "operating.md").read_text(encoding="utf-8")
    shapes = {
        name: ([int(number) for number in numbers.split(",")], apart == "yes")
        for name, numbers, apart in re.findall(r"-([\d.]+\w)\s((?:[\d\s]+,){6}[\d\s]+),\s(yes|no)", page)
    }
    rows = rows_of(page, "Machines by model size")
    assert [row[0] for row in rows] == list(shapes)
    for name, weights, cache, gpus, answers, training, _ in rows:
        (layers, hidden, inner, heads, kv_heads, size, vocabulary), apart = shapes[name]
        widths = [(hidden, heads * size)] * 2 + [(hidden, kv_heads * size)] * 2 + [(hidden, inner)] * 3
        layer, head = sum(wide * narrow for wide, narrow in widths), vocabulary * hidden
        all_weights = 2 * (layers * layer + head * (1 + apart)) / 1e9
        token = 2 * layers * kv_heads * size * 2 / 1e9
        assert (weights, cache) == (f"{all_weights:.2f}", f"{1000 * token:.3f}")
        count, memory = map(int, re.findall(r"\d+", gpus))
        assert int(answers) == int((0.92 * count * memory - all_weights - 2 * count) / (2000 * token))
        adapter = 16 * 16 * layers * sum(wide + narrow for wide, narrow in widths) / 1e9
        activations = (3300 * (2 * hidden * layers + 2 * (10 * hidden + 6 * inner)) + 3000 * 4 * hidden) / 1e9
        held = all_weights / 8 + 2 * (2 * layer + head * (1 + apart)) / 1e9 if "fsdp" in training else all_weights
        assert float(training.split()[0]) == round(held + adapter + activations, 1)


def test_alerts_are_about_metrics_that_there_are() -> None:
    rules = [rule for group in load(ROOT / "jobs" / "alerts.yaml")["groups"] for rule in group["rules"]]
    own = (ROOT / "cpt_ray" / "serving" / "access_log.py").read_text(encoding="utf-8")
    for rule in rules:
        for name in re.findall(r"\bray_(\w+)", rule["expr"]):
            base = re.sub("_(total|bucket)$", "", name)
            assert name in METRICS_GAUGES or f'"{base}"' in own, name


# ---------------------------------------------------------------- ray up


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_ray_up_accepts_the_file(path: Path) -> None:
    config = prepared(path)
    assert config["available_node_types"].keys() == {"head", "cpu", "gpu"}
    assert all(config["available_node_types"][name]["min_workers"] == 0 for name in ("cpu", "gpu"))


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_every_command_that_installs_takes_a_lock_that_the_nodes_have(path: Path) -> None:
    config = prepared(path)
    mounts = config["file_mounts"]
    types = config["available_node_types"].values()
    commands = [*config["head_setup_commands"], *config["worker_setup_commands"]]
    commands += [command for node_type in types for command in node_type.get("worker_setup_commands", ())]
    locks = [re.fullmatch(r"pip install --quiet --no-deps (?:--\S+ \S+ )?-r (\S+)", command) for command in commands]
    assert [lock and mounts[lock[1]] for lock in locks] == [
        "requirements-cpu.lock",
        "requirements-cuda.lock",
        "requirements-cpu.lock",
    ]


def nodes_that_start_for(config: Any, demand: Mapping[str, float], count: int) -> dict[str, int]:
    """What Ray's own autoscaler asks for, with nothing but the head there."""
    scorer = functools.partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    nodes, _ = get_nodes_for(
        config["available_node_types"],
        {config["head_node_type"]: 1},
        config["head_node_type"],
        config["max_workers"],
        [dict(demand)] * count,
        scorer,
    )
    return dict(nodes)


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_pairing_starts_cpu_nodes_alone_and_an_engine_a_gpu_node(path: Path) -> None:
    config, actors = prepared(path), PAIRING.num_actors.most
    for demand in ({"CPU": PAIRING.num_cpus}, {"CPU": PAIRING.num_cpus, "no_gpu": 0.001}):
        assert nodes_that_start_for(config, demand, actors) == {"cpu": 4}
    assert nodes_that_start_for(config, {"CPU": 1, "GPU": 1}, 3) == {"gpu": 3}


# ---------------------------------------------------------------- KubeRay


TEXT, NUMBER, FLAG, ANY = str, int, bool, object
REDIS_PASSWORD = {"valueFrom": {"secretKeyRef": {"name": TEXT, "key": TEXT}}}
GROUP = {"rayStartParams": ANY, "template": ANY}
CLUSTER = {
    "rayVersion": TEXT,
    "enableInTreeAutoscaling": FLAG,
    "autoscalerOptions": {"version": ("v1", "v2"), "idleTimeoutSeconds": NUMBER},
    "authOptions": {"mode": ("token", "disabled"), "secretName": TEXT},
    "gcsFaultToleranceOptions": {
        "backend": ("redis", "rocksdb"),
        "redisAddress": TEXT,
        "redisPassword": REDIS_PASSWORD,
    },
    "headGroupSpec": GROUP,
    "workerGroupSpecs": [
        {**GROUP, "groupName": TEXT, "replicas": NUMBER, "minReplicas": NUMBER, "maxReplicas": NUMBER}
    ],
}
FIELDS: dict[str, Any] = {
    "RayJob": {
        "entrypoint": TEXT,
        "shutdownAfterJobFinishes": FLAG,
        "ttlSecondsAfterFinished": NUMBER,
        "backoffLimit": NUMBER,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {
        "upgradeStrategy": {"type": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")},
        "rayClusterDeletionDelaySeconds": NUMBER,
        "serveConfigV2": TEXT,
        "rayClusterConfig": CLUSTER,
    },
}
"""The fields used here and their types: docs/reference/api.md of KubeRay v1.7.0 (github.com/ray-project/kuberay)."""


def unknown_fields(value: Any, known: Any, where: str) -> Iterator[str]:
    """Where a value has a field or a type that is not known."""
    if isinstance(known, tuple):
        if value not in known:
            yield f"{where}: {value!r}"
    elif isinstance(known, type):
        if not isinstance(value, known) or (known is NUMBER and isinstance(value, bool)):
            yield f"{where}: {value!r}"
    elif isinstance(known, list):
        for at, each in enumerate(value):
            yield from unknown_fields(each, known[0], f"{where}[{at}]")
    else:
        for name, each in value.items():
            if name in known:
                yield from unknown_fields(each, known[name], f"{where}.{name}")
            else:
                yield f"{where}.{name}"


def ray_cluster(resource: Any) -> Any:
    """The RayCluster that KubeRay makes of it."""
    spec = resource["spec"].get("rayClusterSpec") or resource["spec"]["rayClusterConfig"]
    return {"metadata": {"name": "cpt-ray", "namespace": "default"}, "spec": copy.deepcopy(spec)}


@pytest.mark.parametrize("path", ON_KUBERNETES, ids=lambda path: path.stem)
def test_kuberay_knows_every_field(path: Path) -> None:
    resource = load(path)
    assert resource["apiVersion"] == "ray.io/v1"
    assert list(unknown_fields(resource["spec"], FIELDS[resource["kind"]], resource["kind"])) == []


def test_a_misspelt_field_of_kuberay_is_noticed() -> None:
    spec = load(CLUSTERS / "rayjob.yaml")["spec"]
    spec["rayClusterSpec"]["workerGroupSpecs"][1]["maxReplica"] = 8
    spec["rayClusterSpec"]["authOptions"]["mode"] = "tokens"
    assert list(unknown_fields(spec, FIELDS["RayJob"], "RayJob")) == [
        "RayJob.rayClusterSpec.authOptions.mode: 'tokens'",
        "RayJob.rayClusterSpec.workerGroupSpecs[1].maxReplica",
    ]


@pytest.mark.parametrize("path", ON_KUBERNETES, ids=lambda path: path.stem)
def test_rays_autoscaler_reads_the_groups_as_they_are_meant(path: Path) -> None:
    config = _derive_autoscaling_config_from_ray_cr(ray_cluster(load(path)))
    types = config["available_node_types"]
    assert config["idle_timeout_minutes"] == 10
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"].items() >= {"CPU": 8, "GPU": 1}.items()
    if "cpu" in types:
        actors = PAIRING.num_actors.most
        assert types["cpu"]["resources"]["CPU"] * types["cpu"]["max_workers"] == actors
        assert "GPU" not in types["cpu"]["resources"]
        for demand in ({"CPU": 1}, {"CPU": 1, "no_gpu": 0.001}):
            assert nodes_that_start_for(config, demand, actors) == {"cpu": 8}
    assert nodes_that_start_for(config, {"CPU": 1, "GPU": 1}, 3) == {"gpu": 3}


@pytest.mark.parametrize("path", ON_KUBERNETES, ids=lambda path: path.stem)
def test_pods_have_the_image_of_their_device_and_ask_for_as_much_as_they_may_use(path: Path) -> None:
    spec = ray_cluster(load(path))["spec"]
    for name, group in [
        ("cpu", spec["headGroupSpec"]),
        *((each["groupName"], each) for each in spec["workerGroupSpecs"]),
    ]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f"cpt-ray:{'cuda' if name == 'gpu' else 'cpu'}")
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_ray_of_every_file_is_the_locks() -> None:
    assert {pins(lock)["ray"] for lock in ("requirements-cpu.lock", "requirements-cuda.lock")} == {RAY}
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*LAUNCHED, *CLUSTERS.iterdir()])
    assert set(re.findall(r"rayproject/ray:([\d.]+)-py311", text)) == {RAY}
    assert {ray_cluster(load(path))["spec"]["rayVersion"] for path in ON_KUBERNETES} == {RAY}


@pytest.mark.cluster
def test_the_token_guards_jobs_and_the_dashboard_but_no_metrics(cluster: LocalCluster) -> None:
    token = cluster.env["RAY_AUTH_TOKEN"]
    for path in ("/api/jobs/", "/api/serve/applications/", "/nodes?view=summary"):
        statuses = [
            httpx.get(cluster.dashboard + path, headers=headers, timeout=60).status_code
            for headers in ({}, {"Authorization": f"Bearer {'0' * 64}"}, {"Authorization": f"Bearer {token}"})
        ]
        assert statuses == [401, 403, 200]
    targets = json.loads((cluster.home / "prom_metrics_service_discovery.json").read_text(encoding="utf-8"))[0][
        "targets"
    ]
    assert {httpx.get(f"http://{target}/metrics", timeout=60).status_code for target in targets} == {200}


@pytest.mark.cluster
def test_the_application_of_the_rayservice_serves_a_run_to_those_who_have_a_key(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(make_config(run).model_dump(mode="json")), encoding="utf-8")
    config = yaml.safe_load(load(CLUSTERS / "rayservice.yaml")["spec"]["serveConfigV2"])
    config["applications"][0]["args"] = {"run_file": str(run_file)}
    port = config["http_options"]["port"] = unused_port()
    config["http_options"]["host"] = "127.0.0.1"
    ServeDeploySchema.model_validate(config)
    with httpx.Client(base_url=cluster.dashboard, timeout=60) as dashboard:
        address, token = "/api/serve/applications/", {"Authorization": f"Bearer {cluster.env['RAY_AUTH_TOKEN']}"}
        assert dashboard.put(address, json=config, headers=token).status_code == 200  # as KubeRay does

        def state() -> Any:
            return dashboard.get(address, headers=token).json()["applications"].get("qwen3-4b", {})

        wait_for(lambda: state().get("status") == "DEPLOY_FAILED")
        assert "there is no open key" in state()["message"]

        key, secret = make_key("client")
        Keyring(run.path / KEYS_FILE).add(key)
        assert dashboard.put(address, json=config, headers=token).status_code == 200
        wait_for(lambda: state().get("status") == "RUNNING")
        url, body = f"http://127.0.0.1:{port}/qwen3-4b/v1/chat/completions", {"model": "tiny", "max_tokens": 4}
        body |= {"messages": [{"role": "user", "content": "Hello"}], "configuration": {"ornament": "high"}}
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {secret}"}, timeout=60)
        assert answer.json()["configuration"]["applied"] == {"ornament": "high"}
        dashboard.delete(address, headers=token)


def wait_for(condition: Any, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)
