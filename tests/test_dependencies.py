"""What the package imports, pyproject.toml declares, in versions that the locks have."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OWN = {"cpt_ray", "jobs", "tests"}
OPTIONAL = {"wandb"}
"""Imported only where a run file asks for it."""


def imported(folder: str) -> set[str]:
    """Packages of others that the files in a folder import, anywhere in them."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - OWN - OPTIONAL


def declared() -> dict[str, list[Requirement]]:
    """The requirements of pyproject.toml: under "" those of every installation, then the extras'."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(text) for text in texts] for extra, texts in lists.items()}


def missing(folder: str, extras: tuple[str, ...]) -> set[str]:
    """Distributions that a folder's files need beyond what is declared."""
    names = {canonicalize_name(one.name) for extra in ("", *extras) for one in declared()[extra]}
    distributions = packages_distributions()
    needed = {name: {canonicalize_name(one) for one in distributions.get(name, [name])} for name in imported(folder)}
    return {name for name, any_of in needed.items() if not any_of & names}


def test_what_the_package_imports_is_declared() -> None:
    assert missing("cpt_ray", ("cpu", "cuda")) == set()


def test_what_benchmarks_and_tests_import_is_declared() -> None:
    assert missing("jobs", ("cpu", "cuda", "benchmarks")) == set()
    assert missing("tests", ("cpu", "cuda", "dev")) == set()


NOT_ON_NODES = {"cpu", "dev", "benchmarks", "smollm2"}


@pytest.mark.parametrize(("device", "left_out"), [("cpu", {"cuda"}), ("cuda", NOT_ON_NODES)])
def test_a_lock_has_what_is_declared_in_versions_that_fit(device: str, left_out: set[str]) -> None:
    lock = (ROOT / f"requirements-{device}.lock").read_text(encoding="utf-8")
    versions = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.M)}
    extras = declared()
    unfit = [
        str(one)
        for extra in sorted(extras.keys() - left_out)
        for one in extras[extra]
        if not one.specifier.contains(versions.get(canonicalize_name(one.name), "0"), prereleases=True)
    ]
    assert unfit == []
