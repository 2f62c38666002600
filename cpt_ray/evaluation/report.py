"""The result for people: one HTML page without scripts or outside files, from `templates/`.

The templates escape everything (Jinja2's autoescape), since text of models, rubrics and run files is on the page; only
the figures are put in as they are.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cpt_ray.console import flat, status_lines
from cpt_ray.evaluation.dials import Dial
from cpt_ray.evaluation.resampling import MODELS
from cpt_ray.evaluation.summary import (
    LOST,
    UNKNOWN,
    brief,
    chance_of_accuracy,
    decimal,
    dial_rows,
    interval,
    judge_check_line,
    levels_of_one_prompt,
    lost_counts,
    measure_title,
    opposites,
    percent,
    result_groups,
    shortened,
    undefined_values,
)
from cpt_ray.plan import Plan, run_info
from cpt_ray.rubrics.bins import confirms, nearest_level
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial
from cpt_ray.tables.rundir import LEDGER_FILE, REPORT_FILE, RESULTS_FILE, STEERING_RESULTS_FILE, RunDir
from cpt_ray.tables.store_path import AnyPath

Results = Mapping[str, Any]
MAX_ANSWER_CHARS = 900


def write_report(plan: Plan, run: RunDir, trials: Sequence[Trial]) -> AnyPath:
    """Renders report.html from results.json and steering.json, if that is of the same tuned model; returns its path.

    Args:
        trials: those that results.json is of.
    """
    tuned = plan.config.policy.model_copy(update={"model": str(run.model)})
    steering = run.read_json(STEERING_RESULTS_FILE)
    if steering and steering.get("policy") != tuned.identity:
        steering = None
    results, ledger = run.read_json(RESULTS_FILE), run.read_json(LEDGER_FILE) or {}
    return run.write_text(REPORT_FILE, render_report(results, trials, plan.rubrics, ledger, run_info(plan), steering))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"brief": brief, "decimal": decimal, "interval": interval, "percent": percent, "shortened": shortened}
    environment.filters |= filters | {"grouped": "{:,}".format}
    return environment


def render_report(
    results: Results,
    trials: Sequence[Trial],
    rubrics: Sequence[Rubric],
    ledger: Mapping[str, Mapping[str, Any]],
    run_info: Mapping[str, Any],
    steering: Mapping[str, Any] | None = None,
) -> str:
    """The page, complete in itself.

    Args:
        results: from `score_trials`.
        ledger: stage to its counts (rows, rejects by reason, tokens, seconds); keys may be missing.
        run_info: whatever is known about the run; nested mappings are flattened.
        steering: the content of report/steering.json.
    """
    from cpt_ray.evaluation import figures  # here, since nothing else needs matplotlib

    directed = defaultdict[tuple[str, str], list[Trial]](list)
    for trial in trials:
        if trial.directive is not None:
            directed[trial.rubric_id, trial.model].append(trial)
    page = _environment().get_template("report.html")
    return page.render(
        models=MODELS,
        rubrics=rubrics,
        results=results,
        steering=steering,
        name=run_info.get("name", "run"),
        headline=_headline(results),
        context=_context(results, trials, rubrics),
        opposites=opposites(trials, rubrics),
        examples={rubric.title: levels_of_one_prompt(trials, rubric) for rubric in rubrics},
        dial_value=_dial_value,
        score_and_level=_score_and_level,
        **_dials(results, rubrics),
        score_panel=lambda rubric, model: figures.score_panel(rubric, directed[rubric.id, model], model),
        steering_figure=figures.steering_figure,
        max_points=figures.MAX_POINTS_PER_LEVEL,
        result_groups=list(result_groups(results)),
        lost={text: lost_counts(results, kind) for kind, text in LOST.items()},
        judge_check=judge_check_line(results.get("judge_check")),
        max_answer_chars=MAX_ANSWER_CHARS,
        ledger=status_lines(ledger),
        facts=flat(run_info),
    )


# ---------------------------------------------------------------- the message


def _headline(results: Results) -> str:
    base, tuned = (percent(results[model]["accuracy"]) for model in MODELS)
    ends = results["difference"]["accuracy_ci"]
    if UNKNOWN in (base, tuned):
        return "Too little could be graded for a result."
    rho = results["difference"]["spearman_rho_ci"]
    if rho and rho[0] > 0 and ends and ends[0] <= 0 <= ends[1]:
        before, after = (decimal(results[model]["spearman_rho"]) for model in MODELS)
        return (
            f"The tuned model's answers follow what is asked: rank correlation {after}, base {before}; {tuned} are at "
            f"the requested level, base {base}."
        )
    if ends is None or ends[0] <= 0 <= ends[1]:
        return f"No measurable gain: {tuned} of the tuned model's answers are at the requested level, base {base}."
    if ends[1] < 0:
        return f"Tuning made it worse: {tuned} of answers are at the requested level; before tuning {base}."
    return f"The tuned model answers at the level asked for {tuned} of the time; the base model {base}."


def _context(results: Results, trials: Sequence[Trial], rubrics: Sequence[Rubric]) -> str:
    counts = sorted({len(rubric.levels) for rubric in rubrics})
    chance = " or ".join(f"{100 / count:.0f}%" for count in reversed(counts))
    prompts = len({trial.prompt_id for trial in trials})
    without, tuned = results["tuned"]["without_directive"], results["tuned"]
    control = ""
    if without["accuracy_ci"] and tuned["accuracy_ci"] and without["accuracy_ci"][1] < tuned["accuracy_ci"][0]:
        share = percent(without["accuracy"])
        control = (
            f" Without a directive, not knowing what is asked for, the tuned model hits the same requests {share} of "
            "the time."
        )
    return (
        f"Chance is {chance} ({' or '.join(map(str, counts))} levels). {tuned['n']:,} graded answers of the tuned and "
        f"{results['base']['n']:,} of the base model to {prompts:,} held-out prompts, {len(rubrics)} "
        f"rubric{'s' * (len(rubrics) != 1)}.{control} Ranges are 95% intervals from resampling prompts and directives."
    )


# ---------------------------------------------------------------- sections


def _dial_value(rubric: Rubric, trial: Trial) -> str:
    """The dial's value in an answer, or why there is none."""
    if not trial.text:
        return f"no answer: {trial.reason}"
    dial = Dial(rubric, {})
    value = dial.value(trial)
    return f"{measure_title(dial.measure)} {brief(value) if math.isfinite(value) else 'unknown'}"


def _dials(results: Results, rubrics: Sequence[Rubric]) -> dict[str, Any]:
    """What the section of the dials needs beside results.json."""
    titles = {rubric.id: rubric.title for rubric in rubrics}
    perplexity = results["perplexity"] or {"per_rubric": {}}
    per_rubric = {title: perplexity["per_rubric"].get(name) for name, title in titles.items()}
    return {
        "titles": titles,
        "moved_titles": [f"{title} moves" for title in titles.values()],
        "dial_rows": dial_rows(results),
        "measure": lambda entry: measure_title(entry["measure"]),
        "chance": chance_of_accuracy(results),
        "undefined_values": undefined_values(results),
        "moved": lambda turned, moved, model: _moved(results, turned, moved, model),
        "perplexities": {"all dials": perplexity, **per_rubric},
    }


def _moved(results: Results, turned: str, moved: str, model: str) -> float | None:
    """The slope of one dial when another, or the same, is turned; None if it is not known."""
    if turned == moved:
        entry = results["slope"].get(moved, {}).get(model)
    else:
        entry = results["crosstalk"][model][turned].get(moved)
    return entry["slope"] if entry else None


def _score_and_level(rubric: Rubric, trial: Trial) -> str:
    """The level that an answer is at, or why it has none."""
    if trial.score is None:
        return f"{'ungraded' if trial.text else 'no answer'}: {trial.reason}"
    is_hit = confirms(rubric, trial.level, trial.score)
    return f"{trial.score:.0f}, {nearest_level(rubric.levels, trial.score).name}{': as asked' * is_hit}"
