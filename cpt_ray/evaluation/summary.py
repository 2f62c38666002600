"""What the page and the terminal both show: numbers as text, rows of the tables, and one prompt's answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cpt_ray.evaluation.resampling import MODELS
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial

UNKNOWN = "n/a"
LOST = {"ungraded": "ungraded answers, left out", "unanswered": "requests without an answer, misses"}

# ---------------------------------------------------------------- numbers as text


def decimal(value: float | None, sign: str = "") -> str:
    """`0.76`, or `+0.76` with the sign "+"."""
    return UNKNOWN if value is None else f"{value:{sign}.2f}"


def brief(value: float | None) -> str:
    """`13.7` or `0.729`: three digits."""
    return UNKNOWN if value is None else f"{value:.3g}"


def percent(value: float | None, sign: str = "") -> str:
    """`62%`, or as a difference, with the sign "+", `+36 pts`."""
    return UNKNOWN if value is None else f"{100 * value:{sign}.0f}{' pts' if sign else '%'}"


def interval(ends: Sequence[float] | None, metric: str = "") -> str:
    """`[0.71, 0.80]`, of the accuracy in percent or points; "" where there is none."""
    if not ends:
        return ""
    low, high = (f"{100 * end:.0f}" if metric == "accuracy" else f"{end:.2f}" for end in ends)
    return f"[{low}, {high}]"


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters, an ellipsis in the place of what is cut."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def measure_title(name: str) -> str:
    """A measure's name as words."""
    return name.replace("_", " ")


# ---------------------------------------------------------------- sentences


def lost_counts(results: Mapping[str, Any], kind: str) -> str:
    """`3 base, 0 tuned`: how many rows of a kind in LOST."""
    return ", ".join(f"{results[model][kind]} {model}" for model in MODELS)


def chance_of_accuracy(results: Mapping[str, Any]) -> str:
    """`0.33`, or `0.33 length, 0.20 ornament` where rubrics differ."""
    chances = {name: f"{chance:.2f}" for name, chance in results["chance"].items()}
    values = sorted(set(chances.values()))
    return values[0] if len(values) == 1 else ", ".join(f"{value} {name}" for name, value in chances.items())


def undefined_values(results: Mapping[str, Any]) -> str:
    """A sentence if texts had no value."""
    counts = {
        name: sum(level["undefined"] for model in MODELS for level in entry[model].values())
        for name, entry in results["levels"].items()
    }
    listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"Answers without a value, left out of slopes: {listed}." if listed else ""


def judge_check_line(check: Mapping[str, Any] | None) -> str:
    """How well a judge agrees with a measure, in a sentence; "" if that was not checked."""
    if not check:
        return ""
    if not check["n"]:
        return f"the judge {check['judge']} gave no usable grade to any of {check['asked']} written answers"
    return (
        f"the judge {check['judge']} was tried on {check['n']} written answers, by a rubric that nothing is trained on "
        f'("{check["rubric"]}"): it gives {percent(check["same_level"])} the level that is measured, kappa '
        f"{decimal(check['weighted_kappa'])} (0 by chance, 1 always)"
    )


# ---------------------------------------------------------------- rows of tables


def result_groups(results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Mapping[str, Any]]]]:
    """(label, {"base" | "tuned" | "change": entry}) in the order of both result tables."""
    change = results["difference"]
    yield "all rubrics", {**{model: results[model] for model in MODELS}, "change": change}
    if all(results[model]["measured"] for model in MODELS):
        yield "measured, no judge", {model: results[model]["measured"] for model in MODELS}
    if any(results[model]["without_directive"]["n"] for model in MODELS):
        yield "without a directive", {model: results[model]["without_directive"] for model in MODELS}
    for name in results["base"]["per_rubric"]:
        entries = {model: results[model]["per_rubric"][name] for model in MODELS}
        yield name, {**entries, "change": change["per_rubric"][name]}


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


# ---------------------------------------------------------------- one prompt under several directives


class DirectedAnswers(NamedTuple):
    """A directive of a rubric's level, and what each model answers under it."""

    rubric: Rubric
    level: str
    directive: str
    answers: Mapping[str, Trial]


def opposites(trials: Sequence[Trial], rubrics: Sequence[Rubric]) -> tuple[str, list[DirectedAnswers]]:
    """One prompt's text, and its answers at each rubric's lowest and highest level."""
    return _of_one_prompt(trials, {(rubric.id, rubric.levels[at].name): rubric for rubric in rubrics for at in (0, -1)})


def levels_of_one_prompt(trials: Sequence[Trial], rubric: Rubric) -> tuple[str, list[DirectedAnswers]]:
    """One prompt's text, and its answers at all levels of a rubric."""
    return _of_one_prompt(trials, {(rubric.id, level.name): rubric for level in rubric.levels})


def _of_one_prompt(
    trials: Sequence[Trial], levels: Mapping[tuple[str, str], Rubric]
) -> tuple[str, list[DirectedAnswers]]:
    """The first prompt by hash that has answers at (almost) all levels, each under a held-out directive.

    "" and no answers if there are none.

    Args:
        levels: (rubric id, level) to the rubric.
    """
    by_prompt: dict[str, dict[tuple[str, str, str], Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.trial_id):
        if trial.directive is not None and not trial.is_trained and (trial.rubric_id, trial.level) in levels:
            cells = by_prompt.setdefault(trial.prompt_id, {})
            cells.setdefault((trial.rubric_id, trial.level, trial.model), trial)
    if not by_prompt:
        return "", []
    cells = by_prompt[min(by_prompt, key=lambda name: (-len(by_prompt[name]), name))]
    shown = []
    for (rubric_id, level), rubric in levels.items():
        answers = {model: cells[rubric_id, level, model] for model in MODELS if (rubric_id, level, model) in cells}
        if answers:
            directive = str(next(iter(answers.values())).directive)
            shown.append(DirectedAnswers(rubric, level, directive, answers))
    return next(iter(cells.values())).prompt, shown
