"""The page's tables as data; `templates/macros.html` has their HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cpt_ray.evaluation.dials import SCORE
from cpt_ray.evaluation.resampling import MODELS
from cpt_ray.evaluation.scoring import METRICS
from cpt_ray.evaluation.summary import (
    METRIC_TITLES,
    UNKNOWN,
    decimal,
    dial_rows,
    interval,
    measure_title,
    percent,
    result_groups,
)
from cpt_ray.rubrics.rubric import Rubric

Results = Mapping[str, Any]
STEERING_METRICS = ("accuracy", "satisfaction")
STEERING_COSTS = {"tokens_once": "tokens once", "tokens_per_answer": "more per answer", "bytes": "bytes kept"}


class Cell(NamedTuple):
    """A number, and in small print what belongs to it."""

    text: str
    small: str = ""
    is_main: bool = False


class Row(NamedTuple):
    """A row's name and its cells."""

    name: str
    cells: Sequence[Cell]


class Group(NamedTuple):
    """Rows, under a heading unless that is empty."""

    rows: Sequence[Row]
    title: str = ""
    small: str = ""


class Table(NamedTuple):
    """The titles of all columns, and the rows."""

    head: Sequence[str]
    groups: Sequence[Group]
    kind: str = ""
    """Its class in the style sheet."""


def _row(name: str, *texts: str) -> Row:
    return Row(name, [Cell(text) for text in texts])


def _with_interval(entry: Mapping[str, Any] | None, name: str = "slope") -> Cell:
    return Cell(decimal(entry[name]), interval(entry[f"{name}_ci"])) if entry else Cell("")


def result_table(results: Results) -> Table:
    """All results: estimates with 95% intervals."""
    groups = []
    for label, entries in result_groups(results):
        rows = []
        for name, entry in entries.items():
            sign, cells = "+" if name == "change" else "", []
            for metric in METRICS:
                number = (percent if metric == "accuracy" else decimal)(entry[metric], sign)
                cells.append(Cell(number, interval(entry[f"{metric}_ci"], metric)))
            rows.append(Row(name, [*cells, Cell(str(entry.get("n", "")))]))
        groups.append(Group(rows, label))
    return Table(["", *METRIC_TITLES.values(), "n"], groups, "results")


def dial_table(results: Results, rubrics: Sequence[Rubric]) -> Table:
    """Each dial under each model."""
    titles = {rubric.id: rubric.title for rubric in rubrics}
    rows: dict[str, list[Row]] = {rubric.id: [] for rubric in rubrics}
    for dial in dial_rows(results):
        crosstalk = Cell(decimal(dial.crosstalk[0]), titles[dial.crosstalk[1]]) if dial.crosstalk else Cell("")
        numbers = [Cell(decimal(value)) for value in (dial.accuracy, dial.tau, dial.rho)]
        cells = [*numbers, _with_interval(dial.slope), _with_interval(dial.check), crosstalk]
        rows[dial.name].append(Row(dial.model, cells))
    groups = []
    for rubric in rubrics:
        second = results["check"].get(rubric.id)
        measure = measure_title(results["levels"][rubric.id]["measure"])
        small = f"by {measure}, then {measure_title(second['measure'])}" if second else f"by {measure}"
        groups.append(Group(rows[rubric.id], rubric.title, small))
    head = ["", "Accuracy", "Tau", "Rho", "Slope", "Second measure", "Most crosstalk"]
    return Table(head, groups, "results overview")


def level_tables(results: Results, rubrics: Sequence[Rubric]) -> list[Table]:
    """Of each dial, what is requested at each level and the means of the answers."""
    return [_level_table(results, rubric) for rubric in rubrics]


def _level_table(results: Results, rubric: Rubric) -> Table:
    names = [level.name for level in rubric.levels]
    entry = results["levels"][rubric.id]
    rows = [_row("asked", *(f"{entry['anchors'][name]:.3g}" for name in names))]
    for kind, evaluation in {"": results, ", trained directives": results["trained_directives"]}.items():
        for model in MODELS if evaluation else ():
            means = [evaluation["levels"][rubric.id][model][name]["mean"] for name in names]
            rows.append(_row(f"{model}{kind}", *(UNKNOWN if mean is None else f"{mean:.3g}" for mean in means)))
    unit = "score" if entry["measure"] == SCORE else measure_title(entry["measure"])
    return Table([f"{rubric.title}, {unit}", *names], [Group(rows)])


def crosstalk_table(results: Results, rubrics: Sequence[Rubric]) -> Table:
    """Dial turned by dial moved, of the tuned model, the base in small."""

    def slope(model: str, turned: str, moved: str) -> str:
        if turned == moved:
            return decimal(results["slope"].get(moved, {}).get(model, {}).get("slope"))
        return decimal(results["crosstalk"][model][turned].get(moved, {}).get("slope"))

    names = [rubric.id for rubric in rubrics]
    rows = []
    for rubric in rubrics:
        slopes = [[slope(model, rubric.id, name) for model in MODELS] for name in names]
        cells = [Cell(tuned, base, name == rubric.id) for name, (base, tuned) in zip(names, slopes, strict=True)]
        rows.append(Row(f"{rubric.title} turned", cells))
    return Table(["", *(f"{rubric.title} moves" for rubric in rubrics)], [Group(rows)])


def gap_table(results: Results, rubrics: Sequence[Rubric]) -> Table | None:
    """Slopes under trained and under held-out directives; None if none were trained on."""
    trained = results["trained_directives"]
    if not trained:
        return None
    groups = []
    for rubric in rubrics:
        if gap := trained["gap"].get(rubric.id):
            slopes = [entry["slope"][rubric.id] for entry in (trained, results)]
            rows = [Row(model, [_with_interval(entry[model]) for entry in (*slopes, gap)]) for model in MODELS]
            groups.append(Group(rows, rubric.title))
    return Table(["", "Trained directives", "Held-out directives", "Gap"], groups, "results")


def perplexity_table(results: Results, rubrics: Sequence[Rubric]) -> Table | None:
    """Of all answers and by dial; None if it was not computed."""
    perplexity = results["perplexity"]
    if not perplexity:
        return None
    per_rubric = {rubric.title: perplexity["per_rubric"].get(rubric.id) for rubric in rubrics}
    rows = []
    for title, entry in {"all dials": perplexity, **per_rubric}.items():
        if entry:
            numbers = [decimal(entry[model]["perplexity"]) for model in MODELS]
            texts = [Cell(text) for text in (*numbers, f"{entry['tuned']['n']:,}")]
            rows.append(Row(title, [*texts, _with_interval(entry, "ratio")]))
    return Table(["", *MODELS, "answers", "ratio"], [Group(rows)])


def agreement_table(results: Results, rubrics: Sequence[Rubric]) -> Table:
    """Judge against measure, of each rubric that has answers with both."""

    def accuracies(entries: Mapping[str, Any], name: str) -> str:
        return " to ".join(percent(entries[model]["per_rubric"][name]["accuracy"]) for model in MODELS)

    measured = {model: results[model]["measured"] for model in MODELS}
    rows = []
    for rubric in rubrics:
        entry = results["judge_agreement"]["per_rubric"][rubric.id]
        if entry["n"]:
            numbers = [percent(entry["same_level"]), decimal(entry["weighted_kappa"]), decimal(entry["spearman_rho"])]
            only_measured = accuracies(measured, rubric.id) if rubric.measured else ""
            rows.append(_row(rubric.title, f"{entry['n']:,}", *numbers, accuracies(results, rubric.id), only_measured))
    head = ["", "answers", "same level", "kappa", "rho", "accuracy, base to tuned", "the same, measured only"]
    return Table(head, [Group(rows)])


def steering_table(results: Results, metric: str) -> Table:
    """Each method by number of choices."""
    rows = []
    for name, entry in results[metric].items():
        ends = [interval(pair) for pair in entry["ci"]]
        cells = [Cell(decimal(mean), end) for mean, end in zip(entry["mean"], ends, strict=True)]
        rows.append(Row(name, cells))
    return Table([metric, *map(str, results["counts"])], [Group(rows)])


def cost_table(results: Results) -> Table:
    """What each method costs for one user."""
    rows = [_row(name, *(f"{cost[part]:,}" for part in STEERING_COSTS)) for name, cost in results["costs"].items()]
    return Table(["method", *STEERING_COSTS.values()], [Group(rows)])
