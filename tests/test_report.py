"""The page is complete, escaped and truthful in its headline; the terminal table fits."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from cpt_ray.evaluation.figures import MAX_POINTS_PER_LEVEL
from cpt_ray.evaluation.report import MAX_ANSWER_CHARS, render_report
from cpt_ray.evaluation.scoring import score_trials
from cpt_ray.evaluation.summary import opposites
from cpt_ray.evaluation.terminal import COLUMNS, SHOWN_CHARS, dial_lines, opposites_lines, table_lines
from cpt_ray.judging.spread import CHECK
from cpt_ray.tables.records import Trial
from tests.builders import make_rubric

HOSTILE = "<script>alert(1)</script><img src=x onerror=\"alert('2')\">&"
ANCHORS = {"low": 10.0, "mid": 50.0, "high": 90.0}
RUBRIC = make_rubric()
LEDGER: dict[str, dict[str, Any]] = {
    "write": {"rows_in": 1200, "rows_out": 1188, "rejected": {"cut off": 12}, "generated_tokens": 4321, "loss": 0.312},
    "pair": {},
}
INFO = {"name": "dials", "seed": 7, "models": {"writer": "tiny"}, "rubrics": {"ornament": 1}}


def make_trial(model: str, prompt: str, level: str, score: float | None, **changes: Any) -> Trial:
    trial = Trial(
        trial_id=f"{prompt}/{level}",
        model=model,
        prompt_id=prompt,
        prompt=f"Write {prompt}.",
        rubric_id="ornament",
        level=level,
        target=ANCHORS[level],
        directive=f"Be {level}.",
        text=f"{model} says {level} to {prompt}.",
        score=score,
        judged=score,
        measured=score,
        reason="" if score is not None else "no verdict",
    )
    return dataclasses.replace(trial, **changes)


def make_trials(tuned_gain: float = 1.0, base_gain: float = 0.0, num_prompts: int = 6) -> list[Trial]:
    """Scores that follow the request by a gain per model: 1 always hits, 0 always gives the middle level."""
    return [
        make_trial(model, f"p{number}", level, 50 + gain * (anchor - 50))
        for model, gain in (("base", base_gain), ("tuned", tuned_gain))
        for number in range(num_prompts)
        for level, anchor in ANCHORS.items()
    ]


def page_of(trials: list[Trial], **changes: Any) -> str:
    given: dict[str, Any] = {"ledger": LEDGER, "run_info": INFO} | changes
    return render_report(score_trials(trials, [RUBRIC], 50, 0), trials, [RUBRIC], **given)


def headline(page: str) -> str:
    match = re.search("<h1>(.*)</h1>", page)
    assert match is not None
    return match.group(1)


class Checker(HTMLParser):
    """Collects tags and attributes, and fails on a tag closed in the wrong place."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_stands_alone() -> None:
    checker = parsed(page_of(make_trials()))
    assert not checker.tags & {"script", "link", "img", "iframe"}
    assert not checker.attributes & {"src", "href", "onerror", "onclick", "onload"}


@pytest.mark.parametrize("field", ["text", "prompt", "directive"])
def test_a_hostile_answer_prompt_or_directive_is_only_text(field: str) -> None:
    hostile: dict[str, Any] = {field: HOSTILE}
    page = page_of([dataclasses.replace(trial, **hostile) for trial in make_trials()])
    checker = parsed(page)
    assert not checker.tags & {"script", "img"}
    assert "&lt;script&gt;alert(1)" in page


def test_hostile_reasons_stages_and_run_info_are_only_text() -> None:
    trials = [dataclasses.replace(trial, score=None, reason=HOSTILE) for trial in make_trials()]
    ledger = {HOSTILE: {"rejected": {HOSTILE: 1}, HOSTILE: HOSTILE}}
    page = page_of(trials, ledger=ledger, run_info={"name": HOSTILE, HOSTILE: [HOSTILE]})
    assert not parsed(page).tags & {"script", "img"}
    assert "ungraded: &lt;script&gt;" in page


def test_rubric_titles_and_level_directives_at_the_pages_beginning_are_only_text() -> None:
    rubric = make_rubric(title=HOSTILE, check={"name": "word_count"})
    trials = [dataclasses.replace(trial, directive=HOSTILE, text=HOSTILE, prompt=HOSTILE) for trial in make_trials()]
    trials += [dataclasses.replace(trial, is_trained=True, trial_id=f"{trial.trial_id}/t") for trial in trials]
    pool = {"ornament": {CHECK: {"quantiles": [float(at) for at in range(101)], "sd": 1.0}}}
    log_probs = {(trial.model, trial.trial_id): (-3.0, 2) for trial in trials}
    results = score_trials(trials, [rubric], 50, 0, pool, log_probs)
    checker = parsed(render_report(results, trials, [rubric], LEDGER, INFO))
    assert not checker.tags & {"script", "img"}


def test_one_prompt_is_shown_under_the_lowest_and_the_highest_directive_of_each_rubric_chosen_by_hash() -> None:
    mood = make_rubric(id="mood", title="Mood")
    trials = make_trials() + [
        dataclasses.replace(trial, rubric_id="mood", trial_id=f"{trial.trial_id}/m", text=f"{trial.text} Mood.")
        for trial in make_trials()
        if trial.prompt_id != "p0"  # so that not all of it is there for the first prompt
    ]
    trained = [dataclasses.replace(trial, is_trained=True, text="Trained.", trial_id="0") for trial in trials]
    prompt, shown = opposites(trained + trials[::-1], [RUBRIC, mood])
    assert prompt == "Write p1."
    assert [(end.rubric.id, end.level, end.directive) for end in shown] == [
        ("ornament", "low", "Be low."), ("ornament", "high", "Be high."),
        ("mood", "low", "Be low."), ("mood", "high", "Be high."),
    ]  # fmt: skip
    assert shown[3].answers["tuned"].text == "tuned says high to p1. Mood."
    assert opposites([], [RUBRIC]) == ("", [])
    assert opposites_lines([], [RUBRIC]) == []
    lines = opposites_lines([dataclasses.replace(trial, text="word " * 99) for trial in trials], [RUBRIC, mood])
    assert max(map(len, lines)) <= COLUMNS
    assert lines[0] == '"Write p1."'
    assert lines[1] == 'ornament, low: "Be low."'
    assert lines[2].startswith("  base   word word")
    assert len(" ".join(lines[2:4])) <= SHOWN_CHARS + 20


def test_an_empty_answer_says_why_it_is_empty_in_the_terminal_and_on_the_page() -> None:
    trials = [dataclasses.replace(trial, text="", score=None, reason="empty: no text") for trial in make_trials()]
    assert "  base   (empty: no text)" in opposites_lines(trials, [RUBRIC])
    assert "no answer: empty: no text" in page_of(trials)


def test_the_dials_table_fits_and_has_what_is_known() -> None:
    rubric = make_rubric(id="a-rubric-with-a-long-name", check={"name": "word_count"})
    other = make_rubric(id="another", title="Another")
    trials = [
        dataclasses.replace(trial, rubric_id=name) for name in (rubric.id, other.id) for trial in make_trials(1, -0.5)
    ]
    trained = [dataclasses.replace(trial, is_trained=True) for trial in trials]
    log_probs = {(trial.model, trial.trial_id): (-3.0 - (trial.model == "tuned"), 2) for trial in trials}
    pool = {rubric.id: {CHECK: {"quantiles": [float(at) for at in range(101)], "sd": 1.0}}}
    lines = dial_lines(score_trials(trials + trained, [rubric, other], 50, 0, pool, log_probs))
    assert max(map(len, lines)) <= COLUMNS
    assert lines[0].split() == ["dial", "acc.", "tau", "rho", "slope", "2nd", "most", "crosstalk"]
    assert lines[2].split()[:8] == ["tuned", "1.00", "1.00", "1.00", "1.00", "[1.00,", "1.00]", "0.00"]
    assert lines[3].split()[:5] == ["another", "base", "0.33", "-1.00", "-1.00"]
    assert "accuracy by chance: 0.33." in lines[5]
    assert lines[-1].endswith("ratio 1.65") or "ratio 1.65 [1.65, 1.65]" in " ".join(lines[-2:])
    gap = next(at for at, line in enumerate(lines) if line.startswith("slope under"))
    assert lines[gap + 2].split() == ["tuned", "1.00", "1.00", "0.00", "[0.00,", "0.00]"]
    assert dial_lines(score_trials([], [rubric], 50, 0))[1].split()[-5:] == ["n/a", "n/a", "n/a", "-", "-"]


def dot_heights(page: str) -> list[float]:
    """From the top, of all figures together."""
    groups = [part.split("</g>")[0] for part in page.split('id="dots-')[1:]]
    return [float(height) for group in groups for height in re.findall(r'<use [^>]*y="([-\d.]+)"', group)]


def test_scores_beyond_the_scale_are_drawn_at_its_edge() -> None:
    inside, beyond = (dot_heights(page_of(make_trials(tuned_gain=gain))) for gain in (1.25, 3))
    assert min(inside) == min(beyond) < max(inside) == max(beyond)


def test_the_headline_says_what_was_measured() -> None:
    assert headline(page_of(make_trials())) == (
        "The tuned model answers at the level asked for 100% of the time; the base model 33%."
    )
    assert headline(page_of(make_trials(tuned_gain=0))).startswith("No measurable gain: 33%")
    assert headline(page_of(make_trials(tuned_gain=0, base_gain=1))).startswith("Tuning made it worse: 33%")
    assert headline(page_of([])) == "Too little could be graded for a result."


def test_the_control_is_mentioned_only_where_it_shows_something() -> None:
    trials = make_trials()
    plain = [dataclasses.replace(trial, directive=None, score=50.0, trial_id=f"{trial.trial_id}/-") for trial in trials]
    hitting = [dataclasses.replace(trial, directive=None, trial_id=f"{trial.trial_id}/-") for trial in trials]
    sentence = "not knowing what is asked for, the tuned model hits the same requests"
    assert f"{sentence} 33% of the time" in page_of(trials + plain)
    assert sentence not in page_of(trials + hitting)
    assert sentence not in page_of(trials)


def test_every_graded_answer_is_a_dot_up_to_the_limit() -> None:
    assert len(dot_heights(page_of(make_trials(num_prompts=6)))) == 2 * 3 * 6
    many = page_of(make_trials(num_prompts=MAX_POINTS_PER_LEVEL + 5))
    assert len(dot_heights(many)) == 2 * 3 * MAX_POINTS_PER_LEVEL
    assert page_of(make_trials(num_prompts=6)) == page_of(make_trials(num_prompts=6))


def test_examples_show_the_first_prompt_by_hash_at_every_level_of_both_models() -> None:
    page = page_of(make_trials()[::-1])
    for model in ("base", "tuned"):
        for level in ANCHORS:
            assert f"{model} says {level} to p0." in page
    assert "to p1." not in page


def test_a_long_answer_is_cut_and_says_so() -> None:
    page = page_of([dataclasses.replace(trial, text="x" * (MAX_ANSWER_CHARS + 50)) for trial in make_trials()])
    assert "[50 more characters]" in page
    assert "x" * (MAX_ANSWER_CHARS + 1) not in page


def test_ledger_and_run_info_print_what_is_there() -> None:
    page = page_of(make_trials())
    for text in ("1,188", "12 cut off", "4,321", "loss: 0.312", "models / writer", "tiny"):
        assert text in page
    assert "No ledger." in page_of(make_trials(), ledger={}, run_info={})


def test_a_rubric_without_measures_leaves_the_judge_unchecked_and_says_so() -> None:
    plain = make_rubric(
        criteria=[{"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in ANCHORS}}]
    )
    trials = [dataclasses.replace(trial, measured=None) for trial in make_trials()]
    results = score_trials(trials, [plain], 50, 0)
    assert "nothing checks the judge" in render_report(results, trials, [plain], LEDGER, INFO)
    check = {"n": 9, "asked": 9, "judge": "j", "rubric": "Gauge", "same_level": 0.5, "weighted_kappa": 0.1}
    both = results | {"judge_check": check}
    assert "nothing checks the judge" not in render_report(both, trials, [plain], LEDGER, INFO)
    both = score_trials(make_trials(), [RUBRIC], 50, 0) | {"judge_check": check}
    page = render_report(both, make_trials(), [RUBRIC], LEDGER, INFO)
    assert "answers that were both judged and measured" in page
    assert "was tried on 9 written answers, by a rubric that nothing is trained on" in page
    assert not any("measured" in line for line in table_lines(results))


def test_the_terminal_table_fits_and_names_every_row() -> None:
    trials = make_trials(tuned_gain=-0.9, base_gain=-0.4)
    trials.append(make_trial("tuned", "p0", "low", None, trial_id="ungraded"))
    trials += [make_trial("base", "p0", "low", None, trial_id=f"none-{at}", text="") for at in range(2)]
    lines = table_lines(score_trials(trials, [RUBRIC], 50, 0))
    assert max(map(len, lines)) <= 80
    assert [line[:13].strip() for line in lines if line[:13].strip()] == [
        "all rubrics", "measured", "ornament", "ungraded answ", "requests with",
    ]  # fmt: skip
    assert lines[1].split()[:3] == ["all", "rubrics", "base"]
    assert lines[-2] == "ungraded answers, left out: 0 base, 1 tuned"
    assert lines[-1] == "requests without an answer, misses: 2 base, 0 tuned"


def test_nothing_to_report_is_still_a_page_and_a_table() -> None:
    parsed(page_of([]))
    assert "n/a" in table_lines(score_trials([], [RUBRIC], 50, 0))[1]


def test_steerings_results_have_a_place_in_the_report_once_they_are_there() -> None:
    entry = {"mean": [0.5, 0.75], "ci": [None, [0.7, 0.8]]}
    costs = {HOSTILE: {"tokens_once": 1234, "tokens_per_answer": 5, "bytes": 6}}
    steering = {
        "counts": [0, 3],
        "num_users": 8,
        "accuracy": {HOSTILE: entry, "NP-BTL": entry},
        "satisfaction": {},
        "costs": costs,
    }
    plain, page = page_of(make_trials()), page_of(make_trials(), steering=steering)
    assert "Few-shot steering" not in plain
    assert page.count("<svg") == plain.count("<svg") + 1
    assert not parsed(page).tags & {"script", "img"}
    for text in ("Few-shot steering", "predicted", "0.75<small>[0.70, 0.80]", "bytes kept", "1,234", "NP-BTL"):
        assert text in page
