"""What the dials do, for people: one prompt under opposite directives and tables, on a page and in a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cpt_ray.evaluation.dials import SCORE, Dial
from cpt_ray.evaluation.markup import escaped, html_table, shortened
from cpt_ray.evaluation.resampling import MODELS
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial

COLUMNS = 80
"""Of a terminal."""
SHOWN_RUBRICS = 3
"""Rubrics whose answers a terminal shows."""
SHOWN_CHARS = 150
"""Of an answer in a terminal."""
PAGE_CHARS = 400
OPPOSITES_NOTE = (
    "The first held-out prompt by hash, under a held-out directive of each rubric's lowest and of its highest level. "
    "Nothing was picked by its looks."
)
MEANINGS = (
    "Tau, rho: rank correlation of what was asked and what came (Kendall's, Spearman's). Slope: how far the dial's own "
    "measure moves from the lowest to the highest level, as a share of what was asked (1: as asked; above 1: too far; "
    "0: the directive is ignored). Second measure: an independent check, which was not used to make the training data. "
    "Most crosstalk: the dial that moves most with it, as a share of that dial's own range (at best 0)."
)
PERPLEXITY_MEANING = (
    "Perplexity of the answers under a held-out directive, by the base model, which is not given the directive: all "
    "tokens together. A ratio far above 1 means that the dials were bought with nonsense."
)


class Opposite(NamedTuple):
    """A directive of one end of a dial, and what each model answers under it."""

    rubric: Rubric
    level: str
    directive: str
    answers: Mapping[str, Trial]


def opposites(trials: Sequence[Trial], rubrics: Sequence[Rubric]) -> tuple[str, list[Opposite]]:
    """One prompt's text, and its answers at each rubric's ends: the first prompt by hash that has (almost) all.

    Nothing in `trials` gives "" and no answers.
    """
    ends = {(rubric.id, rubric.levels[at].name): rubric for rubric in rubrics for at in (0, -1)}
    by_prompt: dict[str, dict[tuple[str, str, str], Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.trial_id):
        if trial.directive is not None and not trial.is_trained and (trial.rubric_id, trial.level) in ends:
            cells = by_prompt.setdefault(trial.prompt_id, {})
            cells.setdefault((trial.rubric_id, trial.level, trial.model), trial)
    if not by_prompt:
        return "", []
    cells = by_prompt[min(by_prompt, key=lambda name: (-len(by_prompt[name]), name))]
    shown = []
    for (rubric_id, level), rubric in ends.items():
        answers = {model: cells[rubric_id, level, model] for model in MODELS if (rubric_id, level, model) in cells}
        if answers:
            directive = str(next(iter(answers.values())).directive)
            shown.append(Opposite(rubric, level, directive, answers))
    return next(iter(cells.values())).prompt, shown


def _verdict(rubric: Rubric, trial: Trial) -> str:
    """The dial's value in an answer, or why there is none."""
    if not trial.text:
        return f"no answer: {trial.reason}"
    dial = Dial(rubric, {})
    value = dial.value(trial)
    return f"{_measure(dial.measure)} {value:.3g}" if math.isfinite(value) else f"{_measure(dial.measure)} unknown"


def _measure(name: str) -> str:
    return name.replace("_", " ")


# ---------------------------------------------------------------- numbers as text


def _number(value: float | None, sign: str = "") -> str:
    return "n/a" if value is None else f"{value:{sign}.2f}"


def _interval(entry: Mapping[str, Any], name: str) -> str:
    ends = entry[f"{name}_ci"]
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""


def worst_crosstalk(entries: Mapping[str, Mapping[str, Any]]) -> tuple[float, str] | None:
    """(slope, rubric id) of the dial that moves most when one is turned; None if nothing is known of any other."""
    known = [(float(entry["slope"]), name) for name, entry in entries.items()]
    return max(known, key=lambda pair: abs(pair[0])) if known else None


class DialRow(NamedTuple):
    """One dial under one model, as both tables show it."""

    name: str
    model: str
    accuracy: float | None
    tau: float | None
    rho: float | None
    slope: Mapping[str, Any] | None
    check: Mapping[str, Any] | None
    crosstalk: tuple[float, str] | None


def dial_rows(results: Mapping[str, Any]) -> list[DialRow]:
    """Base and tuned of each rubric."""
    rows = []
    for name in results["chance"]:
        for model in MODELS:
            entry = results[model]["per_rubric"][name]
            numbers = (entry["accuracy"], entry["kendall_tau"], entry["spearman_rho"])
            slope, check = (results[key].get(name, {}).get(model) for key in ("slope", "check"))
            rows.append(
                DialRow(name, model, *numbers, slope, check, worst_crosstalk(results["crosstalk"][model][name]))
            )
    return rows


def _chance(results: Mapping[str, Any]) -> str:
    """`0.33`, or `0.33 length, 0.20 ornament` where rubrics differ."""
    chances = {name: f"{chance:.2f}" for name, chance in results["chance"].items()}
    values = sorted(set(chances.values()))
    return values[0] if len(values) == 1 else ", ".join(f"{value} {name}" for name, value in chances.items())


def _undefined(results: Mapping[str, Any]) -> str:
    """A sentence if texts had no value."""
    counts = {
        name: sum(level["undefined"] for model in MODELS for level in entry[model].values())
        for name, entry in results["levels"].items()
    }
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"Answers without a value, left out of slopes: {said}." if said else ""


# ---------------------------------------------------------------- the terminal


def opposites_lines(trials: Sequence[Trial], rubrics: Sequence[Rubric]) -> list[str]:
    """The same prompt under opposite directives, at most 80 columns."""
    prompt, shown = opposites(trials, rubrics[:SHOWN_RUBRICS])
    if not shown:
        return []
    lines = _wrapped(f'"{_one_line(prompt)}"')
    for end in shown:
        lines += _wrapped(f'{end.rubric.id}, {end.level}: "{_one_line(end.directive)}"')
        for model, trial in end.answers.items():
            text = _one_line(trial.text) or f"({_one_line(trial.reason)})"
            lines += _wrapped(f"{model:<7}{text}", indent=2, hanging=9)
    left = len(rubrics) - SHOWN_RUBRICS
    return [*lines, *([f"({left} more rubrics in the report)"] if left > 0 else [])]


def _one_line(text: str) -> str:
    return shortened(" ".join(text.split()), SHOWN_CHARS)


def _wrapped(text: str, indent: int = 0, hanging: int = 2) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent=" " * indent, subsequent_indent=" " * hanging, break_on_hyphens=False
    )


def dial_lines(results: Mapping[str, Any]) -> list[str]:
    """The dials' table, the gap to trained directives and the perplexity, at most 80 columns."""
    lines = [f"{'dial':<13}{'':<7}{'acc.':<6}{'tau':<6}{'rho':<6}{'slope':<21}{'2nd':<6}most crosstalk"]
    for row in dial_rows(results):
        name = shortened(row.name, 12) if row.model == MODELS[0] else ""
        slope = f"{_number(row.slope['slope'])} {_interval(row.slope, 'slope')}" if row.slope else "n/a"
        check = _number(row.check["slope"]) if row.check else "-"
        crosstalk = f"{_number(row.crosstalk[0])} {shortened(row.crosstalk[1], 9)}" if row.crosstalk else "-"
        numbers = "".join(f"{_number(value):<6}" for value in (row.accuracy, row.tau, row.rho))
        lines.append(f"{name:<13}{row.model:<7}{numbers}{slope:<21}{check:<6}{crosstalk}".rstrip())
    lines += _wrapped(
        f"accuracy by chance: {_chance(results)}. slope: change measured over change asked (1: as asked).",
        hanging=0,
    )
    lines += _wrapped(_undefined(results), hanging=0)
    return [*lines, *_gap_lines(results), *_perplexity_lines(results)]


def _gap_lines(results: Mapping[str, Any]) -> list[str]:
    trained = results["trained_directives"]
    if not trained:
        return []
    lines = ["", f"{'slope under':<20}{'trained':<10}{'held-out':<10}gap"]
    for name, gap in trained["gap"].items():
        for model in MODELS:
            slopes = [entry["slope"][name][model]["slope"] for entry in (trained, results)]
            cells = "".join(f"{_number(slope):<10}" for slope in slopes)
            label = shortened(name, 12) if model == MODELS[0] else ""
            lines.append(
                f"{label:<13}{model:<7}{cells}{_number(gap[model]['slope'])} {_interval(gap[model], 'slope')}".rstrip()
            )
    return lines


def _perplexity_lines(results: Mapping[str, Any]) -> list[str]:
    found = results["perplexity"]
    if not found:
        return []
    values = ", ".join(f"{_number(found[model]['perplexity'])} {model}" for model in MODELS)
    ratio = f"{_number(found['ratio'])} {_interval(found, 'ratio')}"
    return _wrapped(f"perplexity under the base, without the directive: {values}; ratio {ratio}".rstrip(), hanging=0)


# ---------------------------------------------------------------- the page


def opposites_section(trials: Sequence[Trial], rubrics: Sequence[Rubric]) -> str:
    """Base and tuned side by side, a block per directive."""
    prompt, shown = opposites(trials, rubrics)
    if not shown:
        return "<p>There are no answers to show.</p>"
    blocks = [f'<p class="prompt">{escaped(shortened(prompt, PAGE_CHARS))}</p>']
    for end in shown:
        answers = "".join(_answer(end.rubric, trial) for trial in end.answers.values())
        title = f"{escaped(end.rubric.title)}: {escaped(end.level)}"
        blocks.append(
            f'<h4>{title}</h4><p class="quiet">Directive: {escaped(end.directive)}</p><div class="pair">{answers}</div>'
        )
    return "".join(blocks)


def _answer(rubric: Rubric, trial: Trial) -> str:
    model = escaped(trial.model)
    return (
        f'<div class="answer {model}"><p><b class="{model}">{model}</b> {escaped(_verdict(rubric, trial))}</p>'
        f'<div class="words">{escaped(shortened(trial.text, PAGE_CHARS))}</div></div>'
    )


def dial_section(results: Mapping[str, Any], rubrics: Sequence[Rubric]) -> str:
    """The dials' table, means per level, crosstalk, the gap to trained directives and the perplexity."""
    titles = {rubric.id: escaped(rubric.title) for rubric in rubrics}
    notes = f"Accuracy by chance: {_chance(results)}. {MEANINGS} {_undefined(results)}"
    return (
        f'<div class="dials">{_dial_table(results, titles)}<p class="quiet">{escaped(notes)}</p>'
        f"{_levels(results, rubrics)}{_crosstalk(results, titles)}{_gap(results, titles)}"
        f"{_perplexity(results, titles)}</div>"
    )


def _grouped_table(head: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]], kind: str = "") -> str:
    """A table with a heading over each group of rows; cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    bodies = []
    for title, rows in groups.items():
        lines = [f'<tr class="group"><th colspan="{len(head)}">{title}</th></tr>']
        for name, *cells in rows:
            lines.append(f'<tr><th class="{name}">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    table = f'<table class="results {kind}"><thead><tr>{top}</tr></thead>{"".join(bodies)}</table>'
    return f'<div class="scroll">{table}</div>'


def _with_interval(entry: Mapping[str, Any] | None, name: str) -> str:
    return f"{_number(entry[name])}<small>{_interval(entry, name)}</small>" if entry else ""


def _dial_table(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    head = ["", "Accuracy", "Tau", "Rho", "Slope", "Second measure", "Most crosstalk"]
    groups: dict[str, list[list[str]]] = {}
    for row in dial_rows(results):
        crosstalk = f"{_number(row.crosstalk[0])}<small>{titles[row.crosstalk[1]]}</small>" if row.crosstalk else ""
        numbers = [_number(value) for value in (row.accuracy, row.tau, row.rho)]
        cells = [*numbers, _with_interval(row.slope, "slope"), _with_interval(row.check, "slope"), crosstalk]
        groups.setdefault(_group_title(results, row.name, titles), []).append([row.model, *cells])
    return _grouped_table(head, groups, "overview")


def _group_title(results: Mapping[str, Any], name: str, titles: Mapping[str, str]) -> str:
    second = results["check"].get(name)
    by = f", then {escaped(_measure(second['measure']))}" if second else ""
    return f"{titles[name]} <small>by {escaped(_measure(results['levels'][name]['measure']))}{by}</small>"


def _levels(results: Mapping[str, Any], rubrics: Sequence[Rubric]) -> str:
    """Of each dial, what is asked at each level and the means that came."""
    tables = []
    for rubric in rubrics:
        entry = results["levels"][rubric.id]
        rows = [["asked", *(f"{entry['anchors'][level.name]:.3g}" for level in rubric.levels)]]
        kinds = {"": results, ", trained directives": results["trained_directives"]}
        for kind, found in kinds.items():
            for model in MODELS if found else ():
                means = found["levels"][rubric.id][model] if found else {}
                values = [means[level.name]["mean"] for level in rubric.levels]
                rows.append([f"{model}{kind}", *("n/a" if value is None else f"{value:.3g}" for value in values)])
        unit = "score" if entry["measure"] == SCORE else _measure(entry["measure"])
        head = [f"{escaped(rubric.title)}, {escaped(unit)}", *(escaped(level.name) for level in rubric.levels)]
        tables.append(html_table(head, rows))
    return f'<h3>Mean value by requested level</h3><div class="levels">{"".join(tables)}</div>'


def _crosstalk(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Dial turned by dial moved, of the tuned model, the base in small."""
    if len(titles) < 2:
        return ""
    rows = [[f"{title} turned", *(_moved(results, name, other) for other in titles)] for name, title in titles.items()]
    table = html_table(["", *(f"{title} moves" for title in titles.values())], rows)
    note = "Each dial's slope when the row's dial is turned, of the tuned model; in small print, of the base model."
    return f"<h3>What moves when a dial is turned</h3><p class='quiet'>{note}</p>{table}"


def _moved(results: Mapping[str, Any], turned: str, moved: str) -> str:
    slopes = []
    for model in MODELS:
        entry = results["slope"].get(moved, {}) if turned == moved else results["crosstalk"][model][turned]
        slope = entry.get(model if turned == moved else moved, {}).get("slope")
        slopes.append(_number(slope))
    number = f"<b>{slopes[1]}</b>" if turned == moved else slopes[1]
    return f"{number}<small>{slopes[0]}</small>"


def _gap(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    trained = results["trained_directives"]
    if not trained:
        return ""
    groups = {
        titles[name]: [
            [
                model,
                _with_interval(trained["slope"][name][model], "slope"),
                _with_interval(results["slope"][name][model], "slope"),
                _with_interval(gap[model], "slope"),
            ]
            for model in MODELS
        ]
        for name, gap in trained["gap"].items()
    }
    table = _grouped_table(["", "Trained directives", "Held-out directives", "Gap"], groups)
    return f"<h3>Slope under directives that were trained on, and under held-out ones</h3>{table}"


def _perplexity(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    found = results["perplexity"]
    if not found:
        return ""
    entries = {"all dials": found} | {titles[name]: entry for name, entry in found["per_rubric"].items() if entry}
    rows = [
        [
            name,
            *(_number(entry[model]["perplexity"]) for model in MODELS),
            f"{entry['tuned']['n']:,}",
            f"{_number(entry['ratio'])}<small>{_interval(entry, 'ratio')}</small>",
        ]
        for name, entry in entries.items()
    ]
    table = html_table(["", *MODELS, "answers", "ratio"], rows)
    return f"<h3>Is it still language?</h3><p class='quiet'>{PERPLEXITY_MEANING}</p>{table}"
