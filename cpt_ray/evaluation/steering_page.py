"""Few-shot steering's results: a section of the report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from cpt_ray.evaluation.markup import html_table

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
COLORS = ("#2f6db5", "#c2571a", "#3d8b4f", "#8b4fa0", "#a03c3c", "#6b7280", "#b08a1e", "#1b8a8f")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 44, 34


def _cells(entry: Mapping[str, Any]) -> list[str]:
    """Per number of choices."""
    return [_cell(mean, ends) for mean, ends in zip(entry["mean"], entry["ci"], strict=True)]


def _cell(mean: float | None, ends: Sequence[float] | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else f"{mean:.2f}"


def _figure(metric: str, results: Mapping[str, Any]) -> str:
    counts, entries = results["counts"], results[metric]
    known = [one for entry in entries.values() for one in entry["mean"] if one is not None]
    known += [end for entry in entries.values() for ends in entry["ci"] for end in ends or ()]
    low, high = min(known) - 0.03, max(known) + 0.03

    def x(at: float) -> float:
        return LEFT + at / max(1, len(counts) - 1) * (WIDTH - LEFT - 190)

    def y(value: float) -> float:
        return 10 + float((high - value) / (high - low)) * (HEIGHT - 10 - BOTTOM)

    parts = [
        f'<text x="{x(at)}" y="{HEIGHT - 12}" text-anchor="middle">{count}</text>' for at, count in enumerate(counts)
    ]
    for value in (low + 0.03, (low + high) / 2, high - 0.03):
        parts.append(f'<text x="4" y="{y(value):.1f}">{value:.2f}</text>')
    for number, (name, entry) in enumerate(entries.items()):
        color = COLORS[number % len(COLORS)]
        shown = [(x(at), one, entry["ci"][at]) for at, one in enumerate(entry["mean"]) if one is not None]
        line = " ".join(f"{at:.1f},{y(one):.1f}" for at, one, _ in shown)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for at, _, ends in shown:
            if ends:
                parts.append(
                    f'<line x1="{at + number}" x2="{at + number}" y1="{y(ends[0]):.1f}" y2="{y(ends[1]):.1f}" '
                    f'stroke="{color}" stroke-opacity="0.5"/>'
                )
        top = 18 + 18 * number
        parts.append(f'<rect x="{WIDTH - 176}" y="{top - 9}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{WIDTH - 160}" y="{top}">{html.escape(name)}</text>')
    label = f"{metric} against number of choices"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def steering_section(results: Mapping[str, Any]) -> str:
    """Figures and tables of all methods."""
    said = f"{results['num_users']} held-out users, by number of their choices; 95% intervals over users and seeds."
    parts = [f"<p>{said} {METHODS}</p>"]
    for metric, text in METRICS.items():
        if results[metric]:
            rows = [[html.escape(name), *_cells(entry)] for name, entry in results[metric].items()]
            table = html_table([metric, *map(str, results["counts"])], rows)
            parts.append(f"<h3>{metric}</h3><p>{text}</p>{_figure(metric, results)}{table}")
    if results["costs"]:
        rows = [[html.escape(name), *(f"{one[part]:,}" for part in COSTS)] for name, one in results["costs"].items()]
        parts.append(f"<h3>per user</h3>{html_table(['method', *COSTS.values()], rows)}")
    return f'<h2>Few-shot steering</h2><div class="steering">{"".join(parts)}</div>'
