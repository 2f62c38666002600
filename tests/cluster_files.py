"""What the files for clusters and the locks say, for tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name

from tests.local_cluster import ROOT

CLUSTERS = ROOT / "jobs" / "clusters"
RAY = "2.60.0"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pins(lock: str) -> dict[str, str]:
    """Versions by canonical name."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}
