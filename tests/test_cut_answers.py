"""What evaluation does with answers that are no whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_ray.engines.engine import Completion, Request
from cpt_ray.evaluation.stage import evaluate
from cpt_ray.plan import Plan
from cpt_ray.tables.records import Trial
from tests.fake_runs import GIVEN, answer, make_run, synthesized, with_engine
from tests.tiny_model import make_tiny_model

TEXTS = {
    "whole": (Completion(text="A mid text! Well.", num_tokens=7), "A mid text! Well.", False),
    "cut": (Completion(text="A mid text! We", num_tokens=20, error="cut off", detail="d"), "A mid text!", True),
    "first": (Completion(text="A mid text, we", num_tokens=20, error="cut off", detail="d"), "A mid text, we", True),
    "empty": (Completion(num_tokens=20, error="cut off", detail="d"), "", True),
}


def reply_of(plan: Plan, kind: str) -> Callable[[Request], Completion]:
    """Answers held-out prompts as `kind` says."""
    held_out = {one.text for one in plan.prompts_of("held_out")}

    def say(request: Request) -> Completion:
        is_asked = not request.labels and request.messages[-1]["content"] in held_out
        return TEXTS[kind][0] if is_asked else answer(request)

    return say


@pytest.mark.parametrize("kind", TEXTS)
def test_a_cut_answer_is_graded_by_its_whole_sentences_and_marked(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = make_run(tmp_path, f"policy.model={make_tiny_model(tmp_path / 'policy')}", levels=GIVEN)
    reply = reply_of(plan, kind)
    evaluate(plan, run, synthesized(plan, run, reply), with_engine(reply))
    completion, text, is_cut = TEXTS[kind]
    trials = run.read("evaluation", sorted(run.names("evaluation")), Trial)
    assert trials
    assert {(row.text, row.is_cut, row.num_tokens) for row in trials} == {(text, is_cut, completion.num_tokens)}
    assert {row.score is None for row in trials} == {kind == "empty"}
    note = "note: answer-tuned: 100% are cut at 20 tokens; more would be needed"
    assert (note in " ".join(capsys.readouterr().out.split())) == is_cut
