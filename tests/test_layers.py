"""The lowest layer stays light: nothing of ray, torch or vllm, and a quick import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cpt_ray"
LAYERS = [
    {"chat", "config", "console", "errors", "gguf_model", "grids", "prompts", "rubrics", "tables", "texts",
     "yaml_file"},
    {"cluster"},
    {"engines", "evaluation", "judging", "plan", "serving", "steering", "synthesis", "training"},
    {"__main__", "cli"},
]  # fmt: skip


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cpt_ray."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_has_a_layer_and_imports_only_downwards() -> None:
    rank = {name: at for at, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        if path.stem == "__init__":
            continue
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        assert own in rank, f"{own} is in no layer"
        for name in imported(path):
            assert rank[name] <= rank[own], f"{own} imports {name} from above"


@pytest.mark.parametrize("module", sorted(LAYERS[0]))
def test_the_lowest_layer_loads_without_ray_torch_or_vllm(module: str) -> None:
    code = (
        f"import sys, cpt_ray.{module}; "
        "print([one for one in ('ray', 'torch', 'vllm', 'transformers') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
