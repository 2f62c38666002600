"""Documents name what exists: files and headings that they link to, and files of the repository in code spans."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
PATH = re.compile(r"(?<![\w/.])(?:cpt_ray|jobs|rubrics|tests)/[\w/.-]*\w\.(?:py|yaml|md|html|json|jsonl|sh)\b")
"""A file of the repository, as a document names it from the top."""
BENCHMARK = re.compile(r"`(\w+\.py)[ `]")
"""How the page of the benchmarks names the scripts beside it."""
ABSENT = {"jobs/benchmark_routing.py", "rubrics/mine.yaml"}
"""A removed file, named with the commit that had it; and a user's own."""


def documents() -> list[Path]:
    """Markdown files that git knows, or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout", allow_module_level=True)
    return [ROOT / name for name in names if (ROOT / name).exists()]


def anchors(document: Path) -> Iterator[str]:
    """What GitHub makes of each heading: small letters, hyphens for spaces, no marks."""
    for heading in re.findall(r"^#+ (.*)", FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


DOCUMENTS = documents()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_its_heading(document: Path) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    names = set(PATH.findall(text)) - ABSENT
    assert [name for name in names if not (ROOT / name).exists()] == []
    if document.parent.name == "benchmarks":
        assert [name for name in BENCHMARK.findall(text) if not (document.parent / name).exists()] == []


def test_every_folder_of_the_map_exists_and_none_is_missing() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+/)`", row)}
    folders = {f"{path.name}/" for path in (ROOT / "cpt_ray").iterdir() if (path / "__init__.py").exists()}
    assert named == folders


def test_every_command_that_a_document_names_exists() -> None:
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    code = "\n".join([*FENCE.findall(text), *re.findall(r"`[^`\n]+`", FENCE.sub("", text))])
    done = subprocess.run([sys.executable, "-m", "cpt_ray", "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"\w+", done.stdout))
    assert set(re.findall(r"\bcpt ([a-z]+)", code)) - known == set()
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make (\w+)", code, re.MULTILINE)) - targets == set()
