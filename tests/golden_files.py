"""Golden files: what a text or plain data are compared with, under tests/golden/."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parent / "golden"


class Dumper(yaml.SafeDumper):
    """Texts of several lines as they read, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represented(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, _represented)


def check(contents: Mapping[str, Any], flow: bool | None = False) -> None:
    """Each content (lines, or plain data as YAML) is that of the file; with GOLDEN=write it becomes it."""
    differences = [line for name, content in contents.items() for line in _differences(name, content, flow)]
    if differences:
        pytest.fail("\n".join(differences), pytrace=False)


def _differences(name: str, content: Any, flow: bool | None) -> list[str]:
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 110, "default_flow_style": flow}
    text = "\n".join([*content, ""]) if name.endswith(".txt") else yaml.dump(content, Dumper=Dumper, **options)
    assert not re.search(r"/tmp|/home|/root|/var|pytest-", text), f"{name}: holds a path of this machine"
    path = FOLDER / name
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    now = text.splitlines()
    return list(difflib.unified_diff(expected.splitlines(), now, f"golden/{name}", "now", lineterm="", n=2))


def shape(value: Any) -> Any:
    """Nested names and types of plain data; a list's is that of all its items."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return {"list of": functools.reduce(either, map(shape, value))} if value else "empty list"
    return "null" if value is None else type(value).__name__


def shortened(shown: Any) -> Any:
    """A shape in which a field that looks like one before it, beside it, only says so."""
    if not isinstance(shown, dict):
        return shown
    first: dict[str, str] = {}
    for name, inner in shown.items():
        first.setdefault(repr(inner), name)
    return {
        name: shortened(inner)
        if first[repr(inner)] == name or not isinstance(inner, dict)
        else f"like {first[repr(inner)]}"
        for name, inner in shown.items()
    }


def either(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: either(one.get(name, "absent"), other.get(name, "absent")) for name in {**one, **other}}
    return one if one == other else " or ".join(sorted({*str(one).split(" or "), *str(other).split(" or ")}))
