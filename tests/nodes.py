"""A Ray cluster whose nodes are real to each other, on one machine: what kills, cuts and fills them, for tests.

Each node is a `ray start` in namespaces of its own (network, mounts, processes, host name): an address on a bridge, a
hostname, a /tmp, a /dev/shm. One folder is common to all, as shared storage is. The repository's code is hidden from
the nodes, so that it travels with a job or not at all, and token authentication is on.

The bridge is itself in a namespace, the *switch*, and every node's processes are below the switch's first one: nothing
outside is changed, no other cluster can clash, and the kernel removes all of it when that one process ends, which it
does when this program does, however it ends.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.machines import Node, only_child

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"
HIDDEN = ("cpt_ray", "jobs", "rubrics", "tests")
"""What a node does not see of the repository."""
NETWORK = "10.77.0"
SWITCH_ADDRESS = f"{NETWORK}.1"
MOST_NODES = 20
GCS_PORT, DASHBOARD_PORT = 6379, 8265
OBJECT_STORE_BYTES = 80_000_000
QUICK_DEATHS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""Environment with which a node that is gone is taken for dead within 20 seconds, and not in up to a minute."""
START_SECONDS = 180.0
"""Longest wait for a node to be part of the cluster, on a machine that is busy."""


@dataclass(eq=False)
class Job:
    """A submitted job. It is asked after rather than followed: `ray job submit` may wait for ever after a lost node."""

    name: str
    nodes: Nodes = field(repr=False)

    @property
    def status(self) -> str:
        """As the head has it: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; "" if it does not know the job."""
        return self.nodes.status(self)

    @property
    def is_running(self) -> bool:
        return self.status in ("PENDING", "RUNNING")

    @property
    def output(self) -> str:
        return self.nodes.output(self)

    def wait(self, timeout: float = 300) -> str:
        """Its last status. TimeoutError, with what it printed last, if it does not end in time."""
        deadline = time.monotonic() + timeout
        while (status := self.status) in ("", "PENDING", "RUNNING"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {self.name} is {status} after {timeout:.0f} s:\n{self.output[-3000:]}")
            time.sleep(0.3)
        return status


class Nodes:
    """A head without CPUs, and the workers that are added to it; a context manager that removes it all."""

    def __init__(self, shared_bytes: int | None = None, redis: str = "", env: Mapping[str, str] | None = None) -> None:
        """Starts the switch and the head.

        Args:
            env: of all nodes.
            shared_bytes: size of the shared folder; without one it is as large as the disk under /tmp.
            redis: path of a redis-server, which keeps the head's state on a node of its own.
        """
        self._base = Path(tempfile.mkdtemp(prefix="nodes-"))
        self.shared = self._base / "shared"
        """The common folder: the same path on each node and, unless it has a size, here."""
        self.shared.mkdir()
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
        self._env |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            **(env or {}),
        }
        self._count, self._gcs_port, self._dashboard_port = 1, GCS_PORT, DASHBOARD_PORT
        self.jobs: list[Job] = []
        self.nodes: list[Node] = []
        self._store: Node | None = None
        (self._base / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{at} node-{at}\n" for at in range(1, MOST_NODES + 2))
        )
        self._switch = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"),
                *("--mount-proc", "sleep", "infinity"),
            ]
        )
        try:
            self._switch_init = only_child(self._switch.pid)
            self._in_switch(
                "ip link set lo up; ip link add bridge0 type bridge; "
                f"ip addr add {SWITCH_ADDRESS}/24 dev bridge0; ip link set bridge0 up"
            )
            if shared_bytes is not None:
                self._in_switch(f"mount -t tmpfs -o size={shared_bytes} tmpfs {self.shared}")
            if redis:
                self._store = self._boot(f"exec {redis} --port {GCS_PORT} --protected-mode no --save '' --dir /tmp")
            self.head = self.start_head()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------ nodes

    @property
    def workers(self) -> list[Node]:
        """All nodes that are alive but the head."""
        return [node for node in self.nodes if node not in (self.head, self._store) and node.is_alive]

    def start_head(self, address: str = "") -> Node:
        """A head, at the address of an earlier one if that is given."""
        env = {"RAY_REDIS_ADDRESS": f"{self._store.address}:{GCS_PORT}"} if self._store else {}
        self.head = self._boot(
            "ray start --head --block --node-ip-address=$ADDRESS --num-cpus=0 --disable-usage-stats "
            f"--port={self._gcs_port} --dashboard-host=$ADDRESS --dashboard-port={self._dashboard_port} "
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            env=env,
            address=address,
        )
        # the dashboard answers some time before the agent that starts jobs does
        self._wait(self.head, lambda: self._api("/api/jobs/") is not None)
        return self.head

    def add(
        self, count: int = 1, resources: Mapping[str, float] | None = None, tmp_bytes: int | None = None
    ) -> list[Node]:
        """Workers of one CPU, started at once, that have joined. `tmp_bytes`: of their /tmp, where Ray's files are."""
        command = (
            f"ray start --address={self.head.address}:{self._gcs_port} --block --node-ip-address=$ADDRESS "
            f"--num-cpus=1 --resources={shlex.quote(json.dumps(dict(resources or {})))} --disable-usage-stats "
            f"--object-store-memory={OBJECT_STORE_BYTES}"
        )
        nodes = [self._boot(command, tmp_bytes=tmp_bytes) for _ in range(count)]
        for node in nodes:
            self._wait(node)
        return nodes

    def kill(self, node: Node) -> None:
        """Every process of the node at once, as when a machine loses power."""
        os.kill(node.init, signal.SIGKILL)
        assert node.started
        node.started.wait(timeout=60)

    def cut(self, node: Node) -> None:
        """Unplugs the node's cable."""
        self._in_switch(f"ip link set {node.name} down")

    def mend(self, node: Node) -> None:
        """Plugs it in again; nothing, if Ray has ended on the node meanwhile, since the node is gone then."""
        self._in_switch(f"ip link show {node.name} > /dev/null 2>&1 || exit 0; ip link set {node.name} up")

    def _boot(
        self, command: str, env: Mapping[str, str] | None = None, tmp_bytes: int | None = None, address: str = ""
    ) -> Node:
        """A machine that runs a command: its own /tmp, /dev/shm, name and address, and no code of the repository."""
        self._count += 1
        assert self._count <= MOST_NODES
        name = f"node-{self._count}"
        node = Node(name, address or f"{NETWORK}.{self._count}")
        root = self._base / name
        inner = root / "tmp" / self.shared.relative_to(tempfile.gettempdir())
        hides = [f"mount -t tmpfs -o ro,size=4k tmpfs {ROOT / folder}" for folder in HIDDEN]
        packages = Path(sysconfig.get_path("purelib"))
        hides += [f"mount --bind /dev/null {path}" for path in packages.glob("__editable__*cpt_ray*.pth")]
        script = "\n".join(
            [
                "set -e",
                f"hostname {name}",
                f"mkdir -p {root}/tmp",
                f"mount -t tmpfs -o size={tmp_bytes} tmpfs {root}/tmp" if tmp_bytes else "",
                f"mkdir -p {inner}",
                f"mount --bind {self.shared} {inner}",
                f"mount --bind {self._base}/hosts /etc/hosts",
                *hides,
                "mount -t tmpfs -o size=512m tmpfs /dev/shm",
                f"mount --rbind {root}/tmp {tempfile.gettempdir()}",
                "until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done",
                "ip link set lo up",
                f"ip addr add {node.address}/24 dev eth0",
                "ip link set eth0 up",
                f"export ADDRESS={node.address}",
                "cd /",
                f"{command} & wait $!",  # not exec: the first process buries orphans
            ]
        )
        self._in_switch(
            f"ip link add {name} type veth peer name {name}-end; ip link set {name} master bridge0; "
            f"ip link set {name} up"
        )
        log = (self._base / f"{name}.log").open("wb")
        node.started = subprocess.Popen(
            [
                *("nsenter", f"--target={self._switch_init}", "--net", "--mount", "--pid", "--"),
                *("unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", script),
            ],
            env=self._env | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        node.init = only_child(only_child(node.started.pid))
        # by its number on this machine: only the network namespace of the switch is entered for it
        self._run(["ip", "link", "set", f"{name}-end", "netns", str(node.init), "name", "eth0"], check=True)
        self.nodes.append(node)
        return node

    def log(self, node: Node) -> str:
        """What `ray start` printed there."""
        return (self._base / f"{node.name}.log").read_text(errors="replace")

    # ------------------------------------------------------------ jobs and requests

    def submit(self, script: str, *arguments: str, env: Mapping[str, str] | None = None, cpus: int = 0) -> Job:
        """A job from the top of the repository, which is the only code that it has; its output is followed.

        Its driver runs on the head, unless it needs CPUs.
        """
        name = f"{Path(script).stem}-{len(self.jobs)}"
        runtime = json.dumps({"env_vars": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}})
        options = ["--submission-id", name, "--working-dir", ".", "--runtime-env-json", runtime]
        options += ["--entrypoint-num-cpus", str(cpus)] if cpus else []
        options += ["--no-wait", "--", sys.executable, script, *arguments]
        self._run(self._job_command("submit", *options), check=True)
        self.jobs.append(Job(name, self))
        return self.jobs[-1]

    def stop_job(self, job: Job) -> None:
        """`ray job stop`, which ends the job's driver by SIGTERM."""
        self._run(self._job_command("stop", job.name), check=True)

    def status(self, job: Job) -> str:
        """See `Job`."""
        found = self._api(f"/api/jobs/{job.name}")
        return str(found["status"]) if found else ""

    def output(self, job: Job) -> str:
        """What the job's driver printed, wherever it ran; also after its node's end."""
        logs = self._base.glob(f"*/tmp/ray/session_2*/logs/job-driver-{job.name}.log")
        return "".join(path.read_text(errors="replace") for path in logs)

    def get(self, url: str, headers: Mapping[str, str] | None = None, body: object = None) -> tuple[int, str]:
        """Status and text of an HTTP request from the switch; status 0 if nobody answers in time."""
        command = ["curl", "--silent", "--max-time", "60", "--write-out", "\n%{http_code}", url]
        for name, value in (headers or {}).items():
            command += ["--header", f"{name}: {value}"]
        if body is not None:
            command += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
        text, _, status = self._run(command).stdout.rpartition("\n")
        return int(status or 0), text

    def run_beside(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A process of this machine that is in the cluster's network, for load."""
        return subprocess.Popen(self._entered(command), stdin=subprocess.DEVNULL)

    def files(self, folder: str = "") -> Path:
        """The shared folder as this program reads it."""
        return Path(f"/proc/{self._switch_init}/root{self.shared}") / folder

    def temporary(self, node: Node) -> Path:
        """A node's own /tmp as this program reads it, as long as the node is alive."""
        return Path(f"/proc/{node.init}/root{tempfile.gettempdir()}")

    # ------------------------------------------------------------ the end

    def stop(self) -> None:
        """Removes everything; the folder too."""
        if hasattr(self, "_switch_init") and self._switch.poll() is None:
            os.kill(self._switch_init, signal.SIGKILL)
        self._switch.kill()
        self._switch.wait(timeout=60)
        for node in self.nodes:
            assert node.started
            node.started.wait(timeout=60)
        shutil.rmtree(self._base, ignore_errors=True)

    # ------------------------------------------------------------ below

    def _entered(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self._switch_init}", "--net", "--", *command]

    def _run(self, command: Sequence[str], check: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._entered(command), env=self._env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=check
        )

    def _in_switch(self, script: str) -> None:
        """Shell commands in the network and the mounts of the switch."""
        target = ["nsenter", f"--target={self._switch_init}", "--net", "--mount", "--"]
        done = subprocess.run([*target, "bash", "-ec", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{script}: {done.stderr}"

    def _job_command(self, action: str, *arguments: str) -> list[str]:
        return [str(RAY), "job", action, "--address", f"http://{self.head.address}:{self._dashboard_port}", *arguments]

    def _api(self, path: str) -> Any:
        """What the head's dashboard answers; None if it does not."""
        url = f"http://{self.head.address}:{self._dashboard_port}{path}"
        status, text = self.get(url, {"Authorization": f"Bearer {self._env.get('RAY_AUTH_TOKEN', '')}"})
        return json.loads(text) if status == 200 else None

    def _wait(self, node: Node, is_ready: Callable[[], bool] = lambda: True) -> None:
        """Until the node is part of the cluster."""
        deadline = time.monotonic() + START_SECONDS
        while not (self._has_joined(node) and is_ready()):
            assert node.is_alive, f"{node.name} ended: {self.log(node)[-3000:]}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"{node.name} did not start: {self.log(node)[-3000:]}")
            time.sleep(0.5)

    def _has_joined(self, node: Node) -> bool:
        found = self._api("/nodes?view=summary")
        raylets = [each["raylet"] for each in found["data"]["summary"]] if found else []
        alive = [raylet.get("nodeManagerAddress") for raylet in raylets if raylet.get("state") == "ALIVE"]
        return node.address in alive
