"""Steering's results as lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# the same words are in evaluation/templates/steering.html
METRICS = {
    "accuracy": "Share of a held-out user's other choices that are predicted.",
    "satisfaction": "How much a held-out user likes the answers to other prompts, by what is measured: 0 to 1.",
}
METHODS = (
    "static: nothing is known of the user; oracle: the true preferences are known; another's choices should not help. "
    "nearest configuration: the one whose scores are nearest to those of the chosen answers."
)
COSTS = {"tokens_once": "tokens once", "tokens_per_answer": "more per answer", "bytes": "bytes kept"}
"""Of a method, for all choices of one user; tokens are the policy's."""


def _cell(mean: float | None, ends: Sequence[float] | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else f"{mean:.2f}"


def table_lines(results: Mapping[str, Any]) -> list[str]:
    """The means with their 95% intervals, one block per metric."""
    lines = ["", METHODS]
    wide = 2 + max(len(name) for metric in METRICS for name in [metric, *results[metric]])
    for metric, text in METRICS.items():
        if not results[metric]:
            continue
        lines += ["", text, f"{metric:<{wide}}" + "".join(f"{f'{count} choices':>20}" for count in results["counts"])]
        for name, entry in results[metric].items():
            cells = [_cell(mean, ends) for mean, ends in zip(entry["mean"], entry["ci"], strict=True)]
            lines.append(f"{name:<{wide}}" + "".join(f"{cell:>20}" for cell in cells))
    if results["costs"]:
        lines += ["", f"{'per user':<{wide}}" + "".join(f"{title:>20}" for title in COSTS.values())]
        lines += [
            f"{name:<{wide}}" + "".join(f"{cost[part]:>20,}" for part in COSTS)
            for name, cost in results["costs"].items()
        ]
    return lines
