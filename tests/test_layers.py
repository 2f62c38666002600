"""Imports run downwards from folder to folder; what needs no engine loads without ray, torch and vllm."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cpt_ray"
RANKS = [
    ("__main__",),
    ("cli",),
    ("pipeline",),
    ("estimate",),
    ("serving",),
    ("steering", "synthesis", "evaluation", "training"),
    ("judging",),
    ("plan",),
    ("units",),
    ("logprobs",),
    ("engines",),
    ("capacity",),
    ("cluster",),
    ("prompts",),
    ("config",),
    ("grids",),
    ("chat",),
    ("rubrics",),
    ("gguf_model",),
    ("tables",),
    ("yaml_file",),
    ("texts",),
    ("console",),
    ("errors",),
]
"""Folders and modules, the highest first; those of one rank know each other only through tables."""
LIGHT = [
    *("chat", "rubrics", "tables", "evaluation.report", "evaluation.terminal", "training.row_making"),
    *("training.metrics", "training.publishing", "serving.app", "serving.keys", "synthesis.pairing", "judging.spread"),
    *("engines.losses", "engines.roles", "capacity", "cluster", "prompts", "config", "grids", "gguf_model"),
    *("yaml_file", "texts", "console", "errors"),
]
HEAVY = ("ray", "torch", "vllm", "transformers", "matplotlib")
"""matplotlib is wanted only where a report is rendered."""


def name_of(path: Path) -> str:
    """Of a file's folder or, at the top, its module."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def imported(path: Path) -> set[str]:
    """Folders and modules of this package that a file imports, anywhere in it and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "cpt_ray":
            names |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cpt_ray."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cpt_ray.")}
    return names


def imported_modules(path: Path) -> set[str]:
    """The same by module; a name that is imported from a module may be a module itself."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def upward_imports() -> set[tuple[str, str]]:
    rank = {name: at for at, names in enumerate(RANKS) for name in names}
    pairs = {(name_of(path), name) for path in modules() for name in imported(path)}
    return {(own, name) for own, name in pairs if own != name and rank[name] <= rank[own]}


def test_every_folder_and_module_has_a_rank_and_exists() -> None:
    assert {name_of(path) for path in modules()} == {name for names in RANKS for name in names}


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in modules()}
    imports = {name: imported_modules(path) & names.keys() for name, path in names.items()}
    assert len(list(graphlib.TopologicalSorter(imports).static_order())) == len(names)


def test_no_file_but_the_run_files_keys_is_over_350_lines() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name for name, lines in lengths.items() if lines > 350} == {"config.py"}


def test_imports_run_down_the_list_and_none_between_folders_of_one_rank() -> None:
    assert upward_imports() == set()


@pytest.mark.parametrize("name", LIGHT)
def test_what_needs_no_engine_loads_without_what_is_heavy(name: str) -> None:
    folder = PACKAGE / name
    names = [f"{name}.{path.stem}" for path in folder.glob("*.py")] if folder.is_dir() else [name]
    imports = ", ".join(f"cpt_ray.{each}" for each in names).replace(".__init__", "")
    code = f"import sys, {imports}; print([x for x in {HEAVY} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
