"""A real Ray cluster of one node with token authentication, for jobs."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cpt_ray.cluster import unused_port

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"


class LocalCluster:
    """`ray start --head --block` as a child process, stopped by its own handle."""

    def __init__(self, folder: Path):
        self.env = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
        }
        self.dashboard = f"http://127.0.0.1:{unused_port()}"
        self.address = f"127.0.0.1:{unused_port()}"
        command = [str(RAY), "start", "--head", "--block", "--num-cpus=2", f"--port={self.address.rpartition(':')[2]}"]
        command += [f"--dashboard-port={self.dashboard.rpartition(':')[2]}", "--dashboard-host=127.0.0.1"]
        command += [f"--ray-client-server-port={unused_port()}", f"--dashboard-agent-listen-port={unused_port()}"]
        # jobs find their cluster by what is in its folder; a short path, since sockets are in there too
        self._home = tempfile.TemporaryDirectory(prefix="cpt-", ignore_cleanup_errors=True)
        command += [f"--temp-dir={self._home.name}"]
        self.home = Path(self._home.name)
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
            # the dashboard answers some time before the agent that starts jobs does
            if self.job("submit", "--no-wait", "--", "true", timeout=60).returncode == 0:
                return
            time.sleep(1)
        self.stop()
        pytest.fail(f"the cluster did not start: {self.log.read_text()[-2000:]}")

    def job(self, *arguments: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(RAY), "job", arguments[0], "--address", self.dashboard, *arguments[1:]]
        return subprocess.run(command, env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)

    def actors(self) -> set[str]:
        """Names of the living actors that this package named."""
        code = "import json, ray; ray.init(); print(json.dumps(ray.util.list_named_actors(all_namespaces=True)))"
        env = self.env | {"RAY_ADDRESS": self.address}
        listed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return {actor["name"] for actor in json.loads(listed.stdout) if actor["namespace"] == "cpt"}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self._home.cleanup()
