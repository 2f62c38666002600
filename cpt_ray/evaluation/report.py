"""The result for people: one HTML page without scripts or outside files, and a table for the terminal.

Everything that comes from a model, a rubric or a run file is escaped where it enters the page (`markup.escaped`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt_ray.console import flat, status_lines
from cpt_ray.evaluation.dial_page import OPPOSITES_NOTE, dial_section, opposites_section
from cpt_ray.evaluation.markup import escaped as _text
from cpt_ray.evaluation.markup import html_table
from cpt_ray.evaluation.markup import shortened as _short
from cpt_ray.evaluation.resampling import MODELS
from cpt_ray.evaluation.scoring import METRICS
from cpt_ray.evaluation.steering_page import steering_section
from cpt_ray.plan import Plan, run_info
from cpt_ray.rubrics.grading import confirms
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial, content_id
from cpt_ray.tables.rundir import LEDGER, REPORT, RESULTS, STEERING_RESULTS, RunDir

METRIC_TITLES = {"accuracy": "Accuracy", "kendall_tau": "Kendall's tau", "spearman_rho": "Spearman's rho"}
METRIC_MEANINGS = {
    "accuracy": "answers at the requested level",
    "kendall_tau": "order of requests and of scores, pair by pair (0 unrelated, 1 same level by level)",
    "spearman_rho": "rank of requests and of scores (0 unrelated, 1 same)",
}
LOST = {"ungraded": "ungraded answers, left out", "unanswered": "requests without an answer, misses"}
MAX_POINTS_PER_LEVEL = 60
"""Dots drawn per level and panel, first by hash; means are over all answers."""
MAX_ANSWER_CHARS = 900
_UNKNOWN = "n/a"
_SHORTER = {"measured, no judge": "measured", "without a directive": "undirected"}
"""Row labels of the page, as the terminal has room for them."""

# ---------------------------------------------------------------- numbers as text


def _number(metric: str, value: float | None, signed: bool = False) -> str:
    """`62%` (accuracy) or `0.76`; `+36 pts` or `+0.60` for differences."""
    if value is None:
        return _UNKNOWN
    sign = "+" if signed else ""
    if metric == "accuracy":
        return f"{100 * value:{sign}.0f}{' pts' if signed else '%'}"
    return f"{value:{sign}.2f}"


def _interval(metric: str, entry: Mapping[str, Any]) -> str:
    """`56 to 68` (percent or points) or `0.71 to 0.80`; "" where there is none."""
    ends = entry.get(f"{metric}_ci")
    return " to ".join(_number(metric, end).removesuffix("%") for end in ends) if ends else ""


def _plain(value: float | None, ends: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "undefined"
    return f"{value:{sign}.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")


def table_lines(results: Mapping[str, Any]) -> list[str]:
    """The result table as plain text, at most 80 columns: estimates with 95% intervals."""
    lines = [(" " * 20 + "".join(f"{name:<20}" for name in METRICS)).rstrip()]

    def add(label: str, row: str, entry: Mapping[str, Any]) -> None:
        sign = "+" if row == "change" else ""
        cells = "".join(f"{_plain(entry[name], entry[f'{name}_ci'], sign):<20}" for name in METRICS)
        lines.append(f"{_short(_SHORTER.get(label, label), 12):<13}{row:<7}{cells}".rstrip())

    for label, entries in _table_groups(results):
        for at, (row, entry) in enumerate(entries.items()):
            add(label if at == 0 else "", row, entry)
    for kind, said in LOST.items():
        if any(results[model][kind] for model in MODELS):
            lines.append(f"{said}: {_counts(results, kind)}")
    return lines


def _counts(results: Mapping[str, Any], kind: str) -> str:
    return ", ".join(f"{results[model][kind]} {model}" for model in MODELS)


def _table_groups(results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Mapping[str, Any]]]]:
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


# ---------------------------------------------------------------- the message


def _headline(results: Mapping[str, Any]) -> str:
    base, tuned = (_number("accuracy", results[model]["accuracy"]) for model in MODELS)
    ends = results["difference"]["accuracy_ci"]
    if _UNKNOWN in (base, tuned):
        return "Too little could be graded for a result."
    rho = results["difference"]["spearman_rho_ci"]
    if rho and rho[0] > 0 and ends and ends[0] <= 0 <= ends[1]:
        before, after = (_number("rho", results[model]["spearman_rho"]) for model in MODELS)
        return (
            f"The tuned model's answers follow what is asked: rank correlation {after}, base {before}; {tuned} are at "
            f"the requested level, base {base}."
        )
    if ends is None or ends[0] <= 0 <= ends[1]:
        return f"No measurable gain: {tuned} of the tuned model's answers are at the requested level, base {base}."
    if ends[1] < 0:
        return f"Tuning made it worse: {tuned} of answers are at the requested level; before tuning {base}."
    return f"The tuned model answers at the level asked for {tuned} of the time; the base model {base}."


def _context(results: Mapping[str, Any], trials: Sequence[Trial], rubrics: Sequence[Rubric]) -> str:
    counts = sorted({len(rubric.levels) for rubric in rubrics})
    chance = " or ".join(f"{100 / count:.0f}%" for count in reversed(counts))
    prompts = len({one.prompt_id for one in trials})
    without, tuned = results["tuned"]["without_directive"], results["tuned"]
    control = ""
    if without["accuracy_ci"] and tuned["accuracy_ci"] and without["accuracy_ci"][1] < tuned["accuracy_ci"][0]:
        share = _number("accuracy", without["accuracy"])
        control = (
            f" Without a directive, not knowing what is asked for, the tuned model hits the same requests {share} of "
            "the time."
        )
    return (
        f"Chance is {chance} ({' or '.join(map(str, counts))} levels). {tuned['n']:,} graded answers of the tuned and "
        f"{results['base']['n']:,} of the base model to {prompts:,} held-out prompts, {len(rubrics)} "
        f"rubric{'s' * (len(rubrics) != 1)}.{control} Ranges are 95% intervals from resampling prompts and directives."
    )


# ---------------------------------------------------------------- plots

_WIDTH, _LEFT, _TOP, _PLOT_HEIGHT = 270, 30, 8, 180


def _panel(rubric: Rubric, trials: Sequence[Trial], model: str) -> str:
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
        parts.append(f'<text x="{place}" y="{y(0) + 16:.1f}"{turn}>{_text(_short(level.name, 13))}</text>')
    parts.append(_line("ideal", [(x(at), y(level.score)) for at, level in enumerate(rubric.levels)]))
    parts.append(_line("mean", means))
    parts += [f'<circle class="mark" cx="{cx:.1f}" cy="{cy:.1f}" r="4"/>' for cx, cy in means]
    label = _text(f"{rubric.title}, {model} model: score by requested level")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" class="panel {_text(model)}" role="img" aria-label="{label}">'
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


def _directed(trials: Sequence[Trial], rubric: Rubric) -> list[Trial]:
    return [one for one in trials if one.rubric_id == rubric.id and one.directive is not None]


def _figure(rubric: Rubric, trials: Sequence[Trial], results: Mapping[str, Any]) -> str:
    panels = []
    for model in MODELS:
        rows = [one for one in _directed(trials, rubric) if one.model == model]
        accuracy = _number("accuracy", results[model]["per_rubric"][rubric.id]["accuracy"])
        title = f'<p><b class="{model}">{model}</b> {accuracy} as asked</p>'
        panels.append(f"<div>{title}{_panel(rubric, rows, model)}</div>")
    return f'<figure><h3>{_text(rubric.title)}</h3><div class="pair">{"".join(panels)}</div></figure>'


# ---------------------------------------------------------------- tables


def _result_table(results: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{METRIC_TITLES[metric]}</th>" for metric in METRICS)
    bodies = []
    for label, entries in _table_groups(results):
        rows = [f'<tr class="group"><th colspan="5">{_text(label)}</th></tr>']
        for row, entry in entries.items():
            signed = row == "change"
            cells = "".join(
                f"<td>{_number(metric, entry[metric], signed)}<small>{_interval(metric, entry)}</small></td>"
                for metric in METRICS
            )
            rows.append(f'<tr><th class="{row}">{row}</th>{cells}<td>{entry.get("n", "")}</td></tr>')
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    meanings = ". ".join(f"{METRIC_TITLES[metric]}: {METRIC_MEANINGS[metric]}" for metric in METRICS)
    lost = "".join(f" {said[0].upper()}{said[1:]}: {_counts(results, kind)}." for kind, said in LOST.items())
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th></th>{head}<th>n</th></tr></thead>'
        f'{"".join(bodies)}</table></div><p class="quiet">'
        f"{meanings}. n: graded answers.{lost} "
        "Change: tuned minus base on the same resampled prompts. Measured, no judge: the same answers by the measured "
        "criteria alone. Without a directive: the same requests, which the model is not told.</p>"
    )


def judge_check_line(found: Mapping[str, Any] | None) -> str:
    """What a judge that was held against a measure is worth, in a sentence; "" if none was."""
    if not found:
        return ""
    if not found["n"]:
        return f"the judge {found['judge']} gave no usable grade to any of {found['asked']} written answers"
    same, kappa = _number("accuracy", found["same_level"]), _number("kappa", found["weighted_kappa"])
    return (
        f"the judge {found['judge']} was tried on {found['n']} written answers, by a rubric that nothing is trained on "
        f'("{found["rubric"]}"): it gives {same} the level that is measured, kappa {kappa} (0 by chance, 1 always)'
    )


def _agreement(results: Mapping[str, Any], rubrics: Sequence[Rubric]) -> str:
    found = results["judge_agreement"]
    if not found["n"]:
        tried = judge_check_line(results.get("judge_check"))
        said = (
            f"{tried[0].upper()}{tried[1:]}."
            if tried
            else "No rubric of this run is both judged and measured, so nothing checks the judge from outside."
        )
        return f"<p>{_text(said)}</p>"
    sentence = (
        f"On {found['n']:,} answers that were both judged and measured, the judge's score and the measured one are "
        f"<b>{_number('accuracy', found['same_level'])}</b> of the time in the same level, and rank the answers alike "
        f"to a Spearman's rho of <b>{_number('rho', found['spearman_rho'])}</b>. Measures count words and sentences "
        "and share no weights with the judge. The two grade different criteria, so they need not agree fully. Kappa: "
        "Cohen's, of the levels, in quadratic weights (0 as by chance, 1 always the same)."
    )

    def accuracies(entries: Mapping[str, Any], name: str) -> str:
        return " to ".join(_number("accuracy", entries[model]["per_rubric"][name]["accuracy"]) for model in MODELS)

    measured = {model: results[model]["measured"] for model in MODELS}
    rows = [
        [
            _text(rubric.title),
            f"{entry['n']:,}",
            _number("accuracy", entry["same_level"]),
            _number("kappa", entry["weighted_kappa"]),
            _number("rho", entry["spearman_rho"]),
            accuracies(results, rubric.id),
            accuracies(measured, rubric.id) if rubric.measured else "",
        ]
        for rubric in rubrics
        if (entry := found["per_rubric"][rubric.id])["n"]
    ]
    head = ["", "answers", "same level", "kappa", "rho", "accuracy, base to tuned", "the same, measured only"]
    return f"<p>{sentence}</p>{html_table(head, rows)}"


def _ledger(ledger: Mapping[str, Mapping[str, Any]]) -> str:
    text = "\n".join(status_lines(ledger))
    return f'<div class="scroll"><pre>{_text(text)}</pre></div>' if text else "<p>No ledger.</p>"


# ---------------------------------------------------------------- examples


def _examples(rubric: Rubric, trials: Sequence[Trial], is_open: bool) -> str:
    """All levels of the rubric's first prompt by hash."""
    own = _directed(trials, rubric)
    if not own:
        return ""
    prompt_id = min(one.prompt_id for one in own)
    cells: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for one in sorted(own, key=lambda one: one.trial_id):
        if one.prompt_id == prompt_id:
            cells[one.level, one.model].append(one)
    prompt = next(one.prompt for group in cells.values() for one in group)
    blocks = []
    for level in rubric.levels:
        answers = [cells[level.name, model][0] for model in MODELS if cells[level.name, model]]
        if answers:
            blocks.append(
                f"<h4>Asked for: {_text(level.name)}</h4><p class='quiet'>Directive: {_text(answers[0].directive)}</p>"
                f'<div class="pair">{"".join(_answer(rubric, one) for one in answers)}</div>'
            )
    full = f"<p><b>Prompt:</b> {_text(_short(prompt, MAX_ANSWER_CHARS))}</p>" if len(prompt) > 100 else ""
    return (
        f"<details{' open' * is_open}><summary>{_text(rubric.title)}: {_text(_short(prompt, 100))}</summary>"
        f"{full}{''.join(blocks)}</details>"
    )


def _answer(rubric: Rubric, trial: Trial) -> str:
    if trial.score is None:
        verdict = f"{'ungraded' if trial.text else 'no answer'}: {_text(trial.reason)}"
    else:
        hit = confirms(rubric, trial.level, trial.score)
        verdict = f"{trial.score:.0f}, {_text(rubric.nearest_level(trial.score).name)}{': as asked' * hit}"
    left = len(trial.text) - MAX_ANSWER_CHARS
    more = f'<span class="quiet"> [{left:,} more characters]</span>' if left > 0 else ""
    return (
        f'<div class="answer {_text(trial.model)}">'
        f'<p><b class="{_text(trial.model)}">{_text(trial.model)}</b> {verdict}</p>'
        f'<div class="words">{_text(trial.text[:MAX_ANSWER_CHARS])}{more}</div></div>'
    )


# ---------------------------------------------------------------- the page

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --quiet: #59636e; --rule: #d5dae0; --card: #f5f7f9;
  --bin: #dfe5ec; --base: #b34a00; --tuned: #005fa3; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e8eaed; --quiet: #a0a8b2; --rule: #353b42;
  --card: #1d2126; --bin: #30373f; --base: #f0a030; --tuned: #5cb8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 16px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: clamp(24px, 4.2vw, 38px); line-height: 1.2; margin: 4px 0 12px; max-width: 26em; }
h2 { font-size: 21px; margin: 40px 0 8px; } h3 { font-size: 17px; margin: 0 0 4px; } h4 { margin: 18px 0 2px; }
p { margin: 4px 0 10px; max-width: 72em; }
.quiet { color: var(--quiet); font-size: 14px; }
.base { color: var(--base); } .tuned { color: var(--tuned); }
.plots, .pair { display: grid; gap: 14px; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); }
.pair p { margin: 0 0 4px; font-size: 14px; }
figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; margin: 0; }
svg { display: block; width: 100%; height: auto; max-width: 420px; overflow: visible; }
svg text { fill: var(--quiet); font-size: 12px; }
.tick, .turned { text-anchor: end; } .name { text-anchor: middle; }
.grid { stroke: var(--rule); } .bin { fill: var(--bin); }
.ideal { fill: none; stroke: var(--quiet); stroke-dasharray: 4 4; stroke-width: 1.2; }
.mean { fill: none; stroke: currentColor; stroke-width: 2.2; } .dot { fill: currentColor; opacity: .4; }
.mark { fill: currentColor; stroke: var(--card); stroke-width: 1.5; }
.scroll { overflow-x: auto; }
.steering h3 { margin-top: 20px; } .steering svg { max-width: 720px; } .steering td { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: normal; }
th { font-weight: 600; } th:first-child { text-align: left; }
small { color: var(--quiet); margin-left: 10px; white-space: nowrap; }
.results, .dials table { max-width: 860px; } .group th { padding-top: 16px; border: 0; }
tbody th.change { font-weight: 400; color: var(--quiet); }
.dials h3 { margin: 30px 0 4px; } .prompt { font-size: 18px; font-weight: 600; }
.levels table { table-layout: fixed; margin-bottom: 16px; } .levels th:first-child { width: 40%; }
.levels tbody th { font-weight: 400; }
pre { margin: 0; font-size: 13px; }
details { border-bottom: 1px solid var(--rule); padding: 8px 0; } summary { cursor: pointer; font-weight: 600; }
.answer { background: var(--card); border-left: 3px solid currentColor; padding: 8px 12px; border-radius: 4px; }
.answer p, .words { color: var(--ink); }
.words { white-space: pre-wrap; max-height: 15em; overflow-y: auto; font-size: 15px; }
dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 2px 16px; font-size: 14px; }
dt { color: var(--quiet); } dd { margin: 0; }
@media (max-width: 600px) { small { display: block; margin: 0; font-size: 11px; } th, td { padding: 5px 0 5px 8px; }
  th:first-child { padding-left: 0; }
  .overview :is(th, td):is(:nth-child(3), :nth-child(4)) { display: none; }
  table { font-size: 14px; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
"""
_LEGEND = (
    "One dot is one answer, placed over the level that was asked for. Inside the shaded box it counts as that level; "
    "the solid line is the mean, the dashed one the ideal. A model that follows the directive climbs along the boxes; "
    f"one that ignores it stays flat. At most {MAX_POINTS_PER_LEVEL} dots per level are drawn, first by hash."
)


def write_report(plan: Plan, run: RunDir, trials: Sequence[Trial]) -> Path:
    """Renders report.html from results.json and steering.json, if that is of the same tuned model; returns its path.

    Args:
        trials: those that results.json is of.
    """
    tuned = plan.config.policy.model_copy(update={"model": str(run.model)})
    steering = run.read_json(STEERING_RESULTS)
    if steering and steering.get("policy") != tuned.identity:
        steering = None
    results, ledger = run.read_json(RESULTS), run.read_json(LEDGER) or {}
    return run.write_text(REPORT, render_report(results, trials, plan.rubrics, ledger, run_info(plan), steering))


def render_report(
    results: Mapping[str, Any],
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
    name = _text(run_info.get("name", "run"))
    figures = "".join(_figure(rubric, trials, results) for rubric in rubrics)
    examples = "".join(_examples(rubric, trials, at == 0) for at, rubric in enumerate(rubrics))
    facts = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in flat(run_info))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: cpt_ray report</title><style>{_STYLE}</style></head><body>
<header><p class="quiet">cpt_ray report: {name}</p><h1>{_text(_headline(results))}</h1>
<p>{_text(_context(results, trials, rubrics))}</p></header>
<h2>One prompt under opposite directives</h2><p class="quiet">{OPPOSITES_NOTE}</p>
{opposites_section(trials, rubrics)}
<h2>The dials</h2>{dial_section(results, rubrics)}
<h2>Score by requested level</h2><p class="quiet">{_LEGEND}</p><div class="plots">{figures}</div>
<h2>All results</h2>{_result_table(results)}
<h2>Can the judge be trusted?</h2>{_agreement(results, rubrics)}
<h2>Example answers</h2><p class="quiet">Not picked by hand: for each rubric the first held-out prompt by hash, at every
level. The number is the score (0 and 100 are the ends of the scale; where the writer's own answers
set it, an answer can lie beyond), then the level it falls in.</p>{examples}
{steering_section(steering) if steering else ""}
<h2>What each stage did</h2>{_ledger(ledger)}
<h2>This run</h2><dl>{facts}</dl>
</body></html>
"""
