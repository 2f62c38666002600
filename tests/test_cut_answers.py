"""What evaluation does with answers that are no whole ones."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from cpt_ray.engine import Completion, FakeEngine, Request
from cpt_ray.evaluation import evaluate
from cpt_ray.planning import Plan
from cpt_ray.records import Trial
from tests.test_synthesis import GIVEN, answer, make_run, run_all, run_here

TEXTS = {
    "whole": (Completion(text="A mid text! Well.", num_tokens=7), "A mid text! Well.", False),
    "cut": (Completion(text="A mid text! We", num_tokens=20, error="cut off", detail="d"), "A mid text!", True),
    "first": (Completion(text="A mid text, we", num_tokens=20, error="cut off", detail="d"), "A mid text, we", True),
    "empty": (Completion(num_tokens=20, error="cut off", detail="d"), "", True),
}


def make_engine(plan: Plan, kind: str) -> FakeEngine:
    """Answers held-out prompts as `kind` says."""
    held_out = {one.text for one in plan.prompts_of("held_out")}

    def say(request: Request) -> Completion:
        is_asked = not request.labels and request.messages[-1]["content"] in held_out
        return TEXTS[kind][0] if is_asked else answer(request)

    return FakeEngine(say)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_cut_answer_is_graded_by_its_whole_sentences_and_marked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    engine = make_engine(plan, kind)
    monkeypatch.setattr("cpt_ray.evaluation.run_lines", functools.partial(run_here, engine))
    monkeypatch.setattr("cpt_ray.evaluation.base_log_probs", lambda *_: {})
    evaluate(plan, run, run_all(plan, run, engine))
    completion, text, is_cut = TEXTS[kind]
    trials = run.read("evaluation", sorted(run.names("evaluation")), Trial)
    assert trials
    assert {(row.text, row.is_cut, row.num_tokens) for row in trials} == {(text, is_cut, completion.num_tokens)}
    assert {row.score is None for row in trials} == {kind == "empty"}
    note = "note: answer-tuned: 100% are cut at 20 tokens; more would be needed"
    assert (note in " ".join(capsys.readouterr().out.split())) == is_cut
