"""The page's figures as SVG."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cpt_ray.evaluation.summary import shortened
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial, content_id

MAX_POINTS_PER_LEVEL = 60
"""Dots drawn per level and panel, first by hash; means are over all answers."""
COLORS = ("#2f6db5", "#c2571a", "#3d8b4f", "#8b4fa0", "#a03c3c", "#6b7280", "#b08a1e", "#1b8a8f")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 44, 34
_WIDTH, _LEFT, _TOP, _PLOT_HEIGHT = 270, 30, 8, 180


def score_panel(rubric: Rubric, trials: Sequence[Trial], model: str) -> Markup:
    """Requested level (x) against score (y, 0-100): every answer, the mean per level, and what is asked."""
    names = [level.name for level in rubric.levels]
    slot = (_WIDTH - _LEFT - 6) / len(names)
    turned = max(map(len, names)) * 6.6 > slot
    height = _TOP + _PLOT_HEIGHT + (82 if turned else 24)

    def x(at: float) -> float:
        return _LEFT + (at + 0.5) * slot

    def y(score: float) -> float:
        return _TOP + _PLOT_HEIGHT * (1 - min(max(score, 0), 100) / 100)  # what lies beyond is drawn at the edge

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 6}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 5}" y="{y(at) + 4:.1f}">{at}</text>'
        for at in (0, 25, 50, 75, 100)
    ]
    means = []
    for at, (level, (low, high)) in enumerate(zip(rubric.levels, _bins(rubric), strict=True)):
        top, bottom = y(high), y(low)
        own = [(one, one.score) for one in trials if one.level == level.name and one.score is not None]
        parts.append(
            f'<rect class="bin" x="{x(at) - 0.44 * slot:.1f}" y="{top:.1f}" width="{0.88 * slot:.1f}"'
            f' height="{bottom - top:.1f}"/>'
        )
        parts += [
            f'<circle class="dot" cx="{x(at) + 0.66 * slot * (_jitter(one) - 0.5):.1f}" cy="{y(score):.1f}" r="2.2"/>'
            for one, score in sorted(own, key=lambda pair: pair[0].trial_id)[:MAX_POINTS_PER_LEVEL]
        ]
        if own:
            means.append((x(at), y(sum(score for _, score in own) / len(own))))
        place = f"{x(at):.1f}" if not turned else f"{x(at) + 4:.1f}"
        turn = f' transform="rotate(-55 {place} {y(0) + 14:.1f})" class="turned"' if turned else ' class="name"'
        parts.append(f'<text x="{place}" y="{y(0) + 16:.1f}"{turn}>{html.escape(shortened(level.name, 13))}</text>')
    parts.append(_line("ideal", [(x(at), y(level.score)) for at, level in enumerate(rubric.levels)]))
    parts.append(_line("mean", means))
    parts += [f'<circle class="mark" cx="{cx:.1f}" cy="{cy:.1f}" r="4"/>' for cx, cy in means]
    label = html.escape(f"{rubric.title}, {model} model: score by requested level")
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {height}" class="panel {model}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _line(name: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _bins(rubric: Rubric) -> list[tuple[float, float]]:
    """The scores that count as each level: from half-way to the anchor below to half-way to the one above."""
    anchors = [level.score for level in rubric.levels]
    cuts = [0.0, *((low + high) / 2 for low, high in itertools.pairwise(anchors)), 100.0]
    return list(itertools.pairwise(cuts))


def _jitter(trial: Trial) -> float:
    """0 to 1, the same on every rendering."""
    return int(content_id(trial.trial_id, trial.model)[:6], 16) / 0xFFFFFF


def steering_figure(metric: str, results: Mapping[str, Any]) -> Markup:
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
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')
