"""Nodes over time while a synthesis runs on a cluster that starts with none and may have four.

python jobs/benchmarks/ramp.py [--start-seconds 8] [--autoscaler v1] [--lose-after 40]

The cluster is this machine: Ray's own autoscaler with its provider of fake nodes, whose GPUs are names. The engine is
fake too: it takes some seconds to start, and a fixed time for each answer. Printed: when each node was up, by type.
With --lose-after, a node with a GPU is lost then, as a spot instance is: without notice.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cpt_ray.cluster import connected, unused_port
from cpt_ray.config import ModelConfig, load_config
from cpt_ray.engines.engine import Completion, FakeEngine, Request
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.step import Line, OpenEngine
from cpt_ray.plan import make_plan
from cpt_ray.synthesis.stage import synthesize
from cpt_ray.tables.records import Generation
from cpt_ray.tables.rundir import RunDir

HEAD = "ray.head.default"
"""The name that Ray's fake provider has for the head's type."""
NODE_TYPES = {
    "gpu": {"resources": {"CPU": 2, "GPU": 1}, "max_workers": 4},
    "cpu": {"resources": {"CPU": 2, "no_gpu": 1}, "max_workers": 1},
}


class FakeCluster:
    """A head without CPUs, and an autoscaler that adds raylets on this machine; ended by its own handle."""

    def __init__(
        self,
        folder: Path,
        node_types: Mapping[str, Mapping[str, Any]],
        is_v2: bool = False,
        boot_seconds: float = 0.0,
    ):
        from ray.util import get_node_ip_address

        port = unused_port()
        self.address = f"{get_node_ip_address()}:{port}"
        types = {HEAD: {"resources": {"CPU": 0}, "max_workers": 0}, **node_types}
        provider: dict[str, object] = {"type": "external", "module": "slow_nodes.SlowNodeProvider"}
        provider |= {"gcs_address": self.address, "launch_multiple": True, "boot_seconds": boot_seconds}
        flags = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")
        provider["worker_liveness_check"] = False  # a busy machine is late with heartbeats
        config = {
            "cluster_name": "fake",
            "max_workers": 8,
            "idle_timeout_minutes": 5,
            "upscaling_speed": 10,
            "provider": {**provider, **dict.fromkeys(flags, True)},
            "head_node_type": HEAD,
            "available_node_types": {name: {"node_config": {}, **kind} for name, kind in types.items()},
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            **{key: [] for key in ("cluster_synced_files", "initialization_commands", "setup_commands")},
            **{f"{kind}_{what}_commands": [] for kind in ("head", "worker") for what in ("setup", "start_ray")},
        }
        self._folder = folder
        (folder / "cluster.json").write_text(json.dumps(config), encoding="utf-8")
        self.env = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"  # for slow_nodes.py
        if is_v2:
            from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

            names = ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")
            self.env |= {"RAY_enable_autoscaler_v2": "1", **dict.fromkeys(names, FAKE_HEAD_NODE_ID)}
        self._home = tempfile.TemporaryDirectory(prefix="ramp-", ignore_cleanup_errors=True)
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0"]
        command += [f"--port={port}", "--include-dashboard=false"]
        command += [f"--autoscaling-config={folder / 'cluster.json'}", f"--temp-dir={self._home.name}"]
        command += [f"--ray-client-server-port={unused_port()}", f"--dashboard-agent-listen-port={unused_port()}"]
        self._process = subprocess.Popen(
            command,
            env=os.environ | self.env | {"PYTHONPATH": path},
            stdout=(folder / "ray.log").open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> None:
        """Until the head answers."""
        log = self._folder / "ray.log"
        while "Ray runtime started" not in log.read_text(encoding="utf-8"):
            if self._process.poll() is not None:
                raise RuntimeError(f"the head did not start: {log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.5)

    def lose(self, resource: str) -> None:
        """Kills a node that has this resource."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet" and f"{resource}," in " ".join(process.cmdline()):
                    process.kill()
                    print(f"lost a node with {resource}", flush=True)
                    return
        print(f"no node has {resource}: none is lost", flush=True)

    def stop(self) -> None:
        """Ends the head and what its autoscaler started."""
        if self._process.poll() is None:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.kill()
        self._process.wait(timeout=60)
        self._home.cleanup()


def seen_nodes(stop: threading.Event, log: list[tuple[float, str]]) -> None:
    """Notes when each node was first seen, until it is stopped."""
    import ray

    start, known = time.monotonic(), set[str]()
    while not stop.wait(0.2):
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] not in known and node["Resources"].get("CPU"):
                known.add(node["NodeID"])
                log.append((time.monotonic() - start, "gpu" if "GPU" in node["Resources"] else "cpu"))


def slow_engine(start_seconds: float, answer_seconds: float, model: ModelConfig) -> FakeEngine:
    """Writes as many words as its request's hash says."""
    time.sleep(start_seconds)

    def answer(request: Request) -> Completion:
        time.sleep(answer_seconds)
        words = hashlib.sha256(repr(request).encode()).digest()[0] + 1
        return Completion(text="word " * words, num_tokens=words)

    return FakeEngine(answer)


def write_run(folder: Path, prompts: int) -> Path:
    """A run file whose one rubric is measured, so that the writer alone is asked."""
    rows = [json.dumps({"prompt": f"Describe thing {at}."}) for at in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    levels = [
        {"name": name, "score": score, "directives": [f"Be {name} {kind}." for kind in ("now", "please", "today")]}
        for name, score in (("short", 10), ("long", 90))
    ]
    words = {"short": 20, "long": 240}
    described = {name: f"About {count} words." for name, count in words.items()}
    measure = {"name": "word_count", "values": words}
    criterion = {"name": "words", "weight": 100, "descriptors": described, "measure": measure}
    rubric = {"id": "length", "version": 1, "title": "Length", "objective": "Sets how long an answer is."}
    rubric |= {"principles": ["Count the words."], "levels": levels, "criteria": [criterion]}
    (folder / "length.yaml").write_text(json.dumps(rubric), encoding="utf-8")
    writer = {"model": "fake", "num_actors": [1, 4], "num_gpus": 1}
    run = {
        "name": "ramp",
        "run_dir": str(folder / "run"),
        "rubrics": [str(folder / "length.yaml")],
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "synthesis": {"shard_rows": 32, "samples": 1},
        **dict.fromkeys(("writer", "policy"), writer),
    }
    (folder / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
    return folder / "run.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-seconds", type=float, default=8.0, help="of an engine")
    parser.add_argument("--boot-seconds", type=float, default=20.0, help="of a node")
    parser.add_argument("--answer-seconds", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--lose-after", type=float, help="seconds from the start after which a node is lost")
    parser.add_argument("--autoscaler", choices=("v1", "v2"), default="v1")
    args = parser.parse_args(arguments)
    # Ray listens on every interface; it reads these when it is imported
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="ramp-") as name:
        folder = Path(name)
        cluster = FakeCluster(folder, NODE_TYPES, args.autoscaler == "v2", args.boot_seconds)
        os.environ.update(cluster.env, RAY_ADDRESS=cluster.address)
        stop, log = threading.Event(), list[tuple[float, str]]()
        loss = threading.Timer(args.lose_after or 0, cluster.lose, ["GPU"])
        try:
            cluster.wait()
            config = load_config(write_run(folder, args.prompts))
            engine = functools.partial(slow_engine, args.start_seconds, args.answer_seconds)

            def runner(run: RunDir, lines: Sequence[Line], open_engine: OpenEngine | None = None) -> None:
                run_lines(run, lines, open_engine or engine)

            watch = threading.Thread(target=seen_nodes, args=(stop, log))
            with connected():
                start = time.monotonic()
                watch.start()
                if args.lose_after is not None:
                    loss.start()
                run = RunDir(Path(config.run_dir))
                synthesize(make_plan(config), run, runner)
                stop.set()
                watch.join()
            answers = [row.unit_id for row in run.read("generations", sorted(run.names("generations")), Generation)]
            counts = f"{len(answers)} answers to {len({*answers})} units"
            print(f"done after {time.monotonic() - start:.0f} s, {counts}; nodes up:")
            for at, (seconds, kind) in enumerate(log, start=1):
                print(f"  {at}  {kind}  {seconds:.0f} s")
        finally:
            stop.set()
            loss.cancel()
            cluster.stop()


if __name__ == "__main__":
    main()
