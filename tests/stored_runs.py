"""The golden run with its run directory elsewhere, and processes that work on it, for tests of object stores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cpt_ray.cli import main
from cpt_ray.tables.rundir import RunDir
from tests.golden_run import RecordingEngine, places, write_run_file
from tests.local_cluster import ROOT
from tests.object_store import environment

TINY = ("ornament", "mood")


def run_file(folder: Path, run_dir: str) -> str:
    """The golden run, with its run directory elsewhere."""
    path = Path(write_run_file(folder, "levels", TINY, combine=[[*TINY]]))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_dir": run_dir}))
    return str(path)


def run_commands(folder: Path, run_dir: str, commands: Sequence[str]) -> RunDir:
    """Real stages in this process, with an engine that answers by a function."""
    folder.mkdir(exist_ok=True)
    path = run_file(folder, run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for place, value in places(RecordingEngine(), []).items():
            patch.setattr(f"cpt_ray.{place}", value)
        for command in commands:
            assert main([*command.split(), path]) == 0
    return RunDir.at(run_dir)


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
