"""One machine of a cluster on this machine: its processes in namespaces, and whether this machine can have such."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil


@cache
def missing() -> str:
    """Why this machine cannot have such nodes; "" if it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    absent = [name for name in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    tried = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--mount-proc"]
    done = subprocess.run([*tried, "ip", "link", "add", "bridge0", "type", "bridge"], capture_output=True, text=True)
    return f"no namespaces or bridges here: {done.stderr.strip()}" if done.returncode else ""


@dataclass(eq=False)
class Node:
    """One machine of the cluster, or what takes its place."""

    name: str
    address: str
    init: int = 0
    """The first process of its namespaces, as this machine numbers it. All others of the node end with it."""
    started: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def is_alive(self) -> bool:
        return self.started is not None and self.started.poll() is None

    def processes(self) -> list[psutil.Process]:
        """All of them but the first."""
        return list(psutil.Process(self.init).children(recursive=True)) if psutil.pid_exists(self.init) else []


def only_child(parent: int) -> int:
    """The child of a process that makes one, as soon as it has."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise TimeoutError(f"process {parent} made no other")
