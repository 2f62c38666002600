"""Several seeds as one table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.errors import UserError
from jobs.benchmarks.table import OverSeeds, markdown, over_seeds
from tests.local_cluster import ROOT


def results(tuned: float, ratio: float | None = 1.5, **crosstalk: float) -> dict[str, Any]:
    """A results.json with what the table reads; the base is at 0.25 everywhere."""
    numbers = {"base": 0.25, "tuned": tuned}
    metrics = ("accuracy", "kendall_tau", "spearman_rho")
    results: dict[str, Any] = {
        model: {"per_rubric": {"mood": dict.fromkeys(metrics, number)}} for model, number in numbers.items()
    }
    moved = {name: {"slope": number} for name, number in crosstalk.items()}
    return results | {
        "chance": {"mood": 0.2},
        "slope": {"mood": {model: {"slope": number} for model, number in numbers.items()}},
        "check": {},
        "crosstalk": {"base": {"mood": {}}, "tuned": {"mood": moved}},
        "perplexity": {"per_rubric": {"mood": {"ratio": ratio}}} if ratio else None,
    }


def test_a_table_has_mean_and_range_over_the_seeds() -> None:
    table = over_seeds([results(0.5, words=-0.5, form=0.25), results(0.75, words=0.25), results(1.0, None)])["mood"]
    for metric in ("accuracy", "tau", "rho", "slope"):
        assert table[metric] == {"base": OverSeeds(0.25, 0.25, 0.25), "tuned": OverSeeds(0.75, 0.5, 1.0)}
    assert table["slope, second measure"] == {"base": None, "tuned": None}
    assert table["most crosstalk"] == {"base": None, "tuned": OverSeeds(0.375, 0.25, 0.5)}
    assert table["perplexity ratio"] == {"tuned": OverSeeds(1.5, 1.5, 1.5)}


def test_results_of_different_rubrics_are_no_table() -> None:
    with pytest.raises(UserError, match=r"different rubrics cannot be one table \(found form; mood\)"):
        over_seeds([results(0.5), results(0.5) | {"chance": {"form": 0.5}}])
    with pytest.raises(UserError, match="found nothing"):
        over_seeds([])


def run_table(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/benchmarks/table.py", *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_script_prints_markdown_and_names_the_file_that_is_no_result(tmp_path: Path) -> None:
    paths = [tmp_path / f"{at}.json" for at in range(3)]
    for path, content in zip(paths, (results(0.5), results(0.75), {"base": {}}), strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    done = run_table(*paths[:2])
    expected = [
        "| dial | accuracy | tau | rho | slope | perplexity ratio |",
        "|---|---|---|---|---|---|",
        f"| mood | {' | '.join(['0.25 → **0.62** (0.50 to 0.75)'] * 4)} | **1.50** (1.50 to 1.50) |",
    ]
    assert done.stdout.splitlines() == expected == markdown(over_seeds([results(0.5), results(0.75)])).splitlines()
    refused = run_table(*paths)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"error: {paths[2]}: no results of an evaluation with slopes; run `cpt evaluate` again, then give its file\n"
    )
