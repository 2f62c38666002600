"""A table over the evaluations of several trainings that differ in their seed alone, as the README has it.

python jobs/benchmarks/table.py runs/*/report/results.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpt_ray.errors import UserError, first_line
from cpt_ray.evaluation.resampling import MODELS
from cpt_ray.evaluation.summary import DialRow, dial_rows


class OverSeeds(NamedTuple):
    """A number over the seeds in which it is defined."""

    mean: float
    low: float
    high: float


COLUMNS: dict[str, Callable[[DialRow], float | None]] = {
    "accuracy": lambda row: row.accuracy,
    "tau": lambda row: row.tau,
    "rho": lambda row: row.rho,
    "slope": lambda row: row.slope["slope"] if row.slope else None,
    "slope, second measure": lambda row: row.check["slope"] if row.check else None,
    "most crosstalk": lambda row: abs(row.crosstalk[0]) if row.crosstalk else None,
}
PERPLEXITY = "perplexity ratio"
"""Of tuned to base."""

Table = dict[str, dict[str, dict[str, OverSeeds | None]]]
"""Rubric id to metric to "base" and "tuned" ("tuned" alone for the perplexity ratio)."""


def over_seeds(results: Sequence[Mapping[str, Any]]) -> Table:
    """Mean and range over several results.json; UserError if they are not of the same rubrics.

    Crosstalk is the absolute value of the largest, whichever dial it is. Seeds in which a number is undefined are left
    out.
    """
    names = [list(evaluation["chance"]) for evaluation in results]
    if not names or any(other != names[0] for other in names):
        sets = "; ".join(sorted({", ".join(ids) for ids in names})) or "nothing"
        raise UserError(f"results of different rubrics cannot be one table (found {sets}); give those of one run file")
    rows = [row for evaluation in results for row in dial_rows(evaluation)]
    return {
        name: {
            metric: {
                model: _range([read(row) for row in rows if (row.name, row.model) == (name, model)]) for model in MODELS
            }
            for metric, read in COLUMNS.items()
        }
        | {PERPLEXITY: {"tuned": _range([_perplexity_ratio(evaluation, name) for evaluation in results])}}
        for name in names[0]
    }


def _perplexity_ratio(results: Mapping[str, Any], name: str) -> float | None:
    entry = (results["perplexity"] or {"per_rubric": {}})["per_rubric"].get(name)
    return entry["ratio"] if entry else None


def _range(values: Sequence[float | None]) -> OverSeeds | None:
    known = [value for value in values if value is not None]
    return OverSeeds(statistics.fmean(known), min(known), max(known)) if known else None


def markdown(table: Table) -> str:
    """A row per dial; a cell is the base's mean, then the tuned model's mean and range. Empty columns are left out."""
    metrics = [name for name in (*COLUMNS, PERPLEXITY) if any(entry[name]["tuned"] for entry in table.values())]
    lines = [f"| dial | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, entry in table.items():
        lines.append(f"| {name} | {' | '.join(_cell(entry[metric]) for metric in metrics)} |")
    return "\n".join(lines)


def _cell(ranges: Mapping[str, OverSeeds | None]) -> str:
    base, tuned = ranges.get("base"), ranges["tuned"]
    start = f"{base.mean:.2f} → " if base else ""
    return f"{start}**{tuned.mean:.2f}** ({tuned.low:.2f} to {tuned.high:.2f})" if tuned else "-"


def read_results(path: Path) -> dict[str, Any]:
    """One results.json; UserError if it is another file, or of a version that did not measure slopes."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); give results.json files of evaluations"
        ) from None
    if not isinstance(results, dict) or not {"chance", "slope", "crosstalk", "perplexity"} <= results.keys():
        raise UserError(
            f"{path}: no results of an evaluation with slopes; run `cpt evaluate` again, then give its file"
        )
    return results


if __name__ == "__main__":
    try:
        print(markdown(over_seeds([read_results(Path(name)) for name in sys.argv[1:]])))
    except UserError as error:
        sys.exit(f"error: {error}")
