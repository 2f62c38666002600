"""What `cpt evaluate` prints: opposite directives, the dials and all results, at most 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from cpt_ray.evaluation.resampling import MODELS
from cpt_ray.evaluation.scoring import STATISTICS
from cpt_ray.evaluation.summary import (
    LOST,
    chance_of_accuracy,
    decimal,
    dial_rows,
    interval,
    lost_counts,
    opposites,
    result_groups,
    shortened,
    undefined_values,
)
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial

COLUMNS = 80
SHOWN_RUBRICS = 3
"""Rubrics whose answers are shown."""
SHOWN_CHARS = 150
"""Of an answer."""
_SHORTER = {"measured, no judge": "measured", "without a directive": "undirected"}
"""Row labels of the page, in the room that a terminal has for them."""


def _with_interval(entry: Mapping[str, Any], name: str, sign: str = "") -> str:
    return f"{decimal(entry[name], sign)} {interval(entry[f'{name}_ci'])}".rstrip()


def _on_one_line(text: str) -> str:
    return shortened(" ".join(text.split()), SHOWN_CHARS)


def _wrapped(text: str, indent: int = 0, hanging: int = 0) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent=" " * indent, subsequent_indent=" " * hanging, break_on_hyphens=False
    )


def table_lines(results: Mapping[str, Any]) -> list[str]:
    """All results: estimates with 95% intervals."""
    lines = [(" " * 20 + "".join(f"{name:<20}" for name in STATISTICS)).rstrip()]
    for label, entries in result_groups(results):
        title = shortened(_SHORTER.get(label, label), 12)
        for row, entry in entries.items():
            sign = "+" if row == "change" else ""
            cells = "".join(f"{_with_interval(entry, name, sign):<20}" for name in STATISTICS)
            lines.append(f"{title:<13}{row:<7}{cells}".rstrip())
            title = ""  # on the first row of a group only
    for kind, text in LOST.items():
        if any(results[model][kind] for model in MODELS):
            lines.append(f"{text}: {lost_counts(results, kind)}")
    return lines


def opposites_lines(trials: Sequence[Trial], rubrics: Sequence[Rubric]) -> list[str]:
    """The same prompt under opposite directives."""
    prompt, shown = opposites(trials, rubrics[:SHOWN_RUBRICS])
    if not shown:
        return []
    lines = _wrapped(f'"{_on_one_line(prompt)}"', hanging=2)
    for end in shown:
        lines += _wrapped(f'{end.rubric.id}, {end.level}: "{_on_one_line(end.directive)}"', hanging=2)
        for model, trial in end.answers.items():
            text = _on_one_line(trial.text) or f"({_on_one_line(trial.reason)})"
            lines += _wrapped(f"{model:<7}{text}", indent=2, hanging=9)
    left = len(rubrics) - SHOWN_RUBRICS
    return [*lines, *([f"({left} more rubrics in the report)"] if left > 0 else [])]


def dial_lines(results: Mapping[str, Any]) -> list[str]:
    """The dials, the gap to trained directives and the perplexity."""
    lines = [f"{'dial':<13}{'':<7}{'acc.':<6}{'tau':<6}{'rho':<6}{'slope':<21}{'2nd':<6}most crosstalk"]
    for row in dial_rows(results):
        name = shortened(row.name, 12) if row.model == MODELS[0] else ""
        slope = _with_interval(row.slope, "slope") if row.slope else decimal(None)
        check = decimal(row.check["slope"]) if row.check else "-"
        crosstalk = f"{decimal(row.crosstalk[0])} {shortened(row.crosstalk[1], 9)}" if row.crosstalk else "-"
        numbers = "".join(f"{decimal(value):<6}" for value in (row.accuracy, row.tau, row.rho))
        lines.append(f"{name:<13}{row.model:<7}{numbers}{slope:<21}{check:<6}{crosstalk}".rstrip())
    lines += _wrapped(
        f"accuracy by chance: {chance_of_accuracy(results)}. slope: change measured over change asked (1: as asked)."
    )
    return [*lines, *_wrapped(undefined_values(results)), *_gap_lines(results), *_perplexity_lines(results)]


def _gap_lines(results: Mapping[str, Any]) -> list[str]:
    trained = results["trained_directives"]
    if not trained:
        return []
    lines = ["", f"{'slope under':<20}{'trained':<10}{'held-out':<10}gap"]
    for name, gap in trained["gap"].items():
        for model in MODELS:
            slopes = [entry["slope"][name][model]["slope"] for entry in (trained, results)]
            cells = "".join(f"{decimal(slope):<10}" for slope in slopes)
            label = shortened(name, 12) if model == MODELS[0] else ""
            lines.append(f"{label:<13}{model:<7}{cells}{_with_interval(gap[model], 'slope')}")
    return lines


def _perplexity_lines(results: Mapping[str, Any]) -> list[str]:
    perplexity = results["perplexity"]
    if not perplexity:
        return []
    values = ", ".join(f"{decimal(perplexity[model]['perplexity'])} {model}" for model in MODELS)
    ratio = _with_interval(perplexity, "ratio")
    return _wrapped(f"perplexity under the base, without the directive: {values}; ratio {ratio}")
