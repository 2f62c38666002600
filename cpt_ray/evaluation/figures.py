"""The page's figures, drawn by matplotlib as SVG that takes colours and font from the page's style sheet."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpt_ray.evaluation.summary import shortened
from cpt_ray.rubrics.bins import bins
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.by_hash import fraction
from cpt_ray.tables.records import Trial, content_id

MAX_POINTS_PER_LEVEL = 60
"""Dots drawn per level and panel, first by hash; means are over all answers."""
MAX_NAME_CHARS = 13
"""Of a level's name below a panel."""
CHARACTER_WIDTH = 6.6
"""In points, of a level's name: where names need more than there is, they are turned."""
QUIET, RULE, CARD, BIN, BASE, TUNED = "#59636e", "#d5dae0", "#f5f7f9", "#dfe5ec", "#b34a00", "#005fa3"
VARIABLES = {QUIET: "quiet", RULE: "rule", CARD: "card", BIN: "bin", BASE: "base", TUNED: "tuned"}
"""What each colour is called in the style sheet, which has another one for dark pages."""
COLORS = ("#2f6db5", "#c2571a", "#3d8b4f", "#8b4fa0", "#a03c3c", "#6b7280", "#b08a1e", "#1b8a8f")
LINES: list[dict[str, Any]] = [{"color": color, "linestyle": style} for style in ("-", "--") for color in COLORS]
"""Of steering's methods, on light and dark pages."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # as text, in the reader's own font
    "svg.hashsalt": "cpt_ray",  # else ids differ from one rendering to the next
    "font.size": 12,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "text.color": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.bottom": False,
    "ytick.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    "legend.frameon": False,
}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many points, with one plot that fills it."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure to put into a page: without a prolog, metadata, its own font and its own colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<[^>]+>", _plainer, re.sub(r">\s+<", "><", svg))
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _plainer(match: re.Match[str]) -> str:
    """A tag with the page's font and colours, and lengths rounded to a tenth of a point."""
    tag = re.sub(r"font-family: [^;]*; ?", "", match[0])
    tag = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", tag)
    tag = re.sub(r' id="[\w.]+_\d+"', "", tag)  # matplotlib's own, the same in every figure of the page
    for color, variable in VARIABLES.items():
        tag = tag.replace(color, f"var(--{variable})")
    return tag


def score_panel(rubric: Rubric, trials: Sequence[Trial], model: str) -> str:
    """Requested level (x) against score (y, 0-100): every answer, the mean per level, and what is asked."""
    width, color, names = 270, {"base": BASE, "tuned": TUNED}[model], [level.name for level in rubric.levels]
    is_turned = max(map(len, names)) * CHARACTER_WIDTH > (width - 36) / len(names)
    with matplotlib.style.context(STYLE, after_reset=True):
        figure, axes = _figure(width, 270 if is_turned else 212)
        means = []
        for at, (name, (low, high)) in enumerate(zip(names, bins(rubric.levels), strict=True)):
            axes.bar(at, high - low, 0.88, low, color=BIN)
            scored = [(trial, trial.score) for trial in trials if trial.level == name and trial.score is not None]
            _draw_dots(axes, at, scored, color=color, gid=f"dots-{rubric.id}-{model}-{at}")
            means.append(statistics.fmean(score for _, score in scored) if scored else math.nan)
        axes.plot([level.score for level in rubric.levels], "--", color=QUIET, linewidth=1.2)
        axes.plot(np.clip(means, 0, 100), "o-", color=color, linewidth=2.2, markersize=8, mec=CARD, clip_on=False)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(0, 100), yticks=(0, 25, 50, 75, 100))
        axes.set_xticks(range(len(names)), [shortened(name, MAX_NAME_CHARS) for name in names])
        for label in axes.get_xticklabels() if is_turned else ():
            label.set(rotation=55, rotation_mode="anchor", ha="right", va="center")
        return _svg(figure, f"{rubric.title}, {model} model: score by requested level")


def _draw_dots(axes: Axes, at: int, scored: Sequence[tuple[Trial, float]], **style: Any) -> None:
    """The answers under one level, first by hash, spread out sideways."""
    shown = sorted(scored, key=lambda pair: pair[0].trial_id)[:MAX_POINTS_PER_LEVEL]
    # by hash, so that they are the same on every rendering
    places = [at + 0.66 * (fraction(content_id(trial.trial_id, trial.model)) - 0.5) for trial, _ in shown]
    heights = np.clip([score for _, score in shown], 0, 100)  # what lies beyond is drawn at the edge
    axes.plot(places, heights, "o", alpha=0.4, markersize=4.4, markeredgewidth=0, clip_on=False, **style)


def steering_figure(metric: str, results: Mapping[str, Any]) -> str:
    """Each method's means by number of choices, with their intervals, a little apart."""
    counts, entries = results["counts"], results[metric]
    with matplotlib.style.context(STYLE, after_reset=True):
        figure, axes = _figure(520, 260 + 10 * len(entries))
        for number, ((name, entry), styles) in enumerate(zip(entries.items(), itertools.cycle(LINES))):
            places = np.arange(len(counts)) + 0.02 * (number - len(entries) / 2)
            means = np.array(entry["mean"], dtype=float)
            ends = np.array([ends or (mean, mean) for ends, mean in zip(entry["ci"], means, strict=True)])
            axes.errorbar(places, means, np.abs(ends.T - means), label=name, lw=2, elinewidth=1, **styles)
        axes.set_xticks(range(len(counts)), list(map(str, counts)))
        axes.set_xlabel("choices")
        figure.legend(loc="outside lower left", ncols=2)
        return _svg(figure, f"{metric} against number of choices")
