"""A run that loses answers says how many, at which stage, and what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_ray.engines.engine import Completion, Request
from cpt_ray.errors import UserError
from cpt_ray.plan import Plan
from cpt_ray.synthesis.stage import synthesize
from cpt_ray.tables.records import Generation
from cpt_ray.tables.rundir import RunDir
from tests.fake_runs import GIVEN, answer, level_in, make_run, with_engine


def concluded(plan: Plan, run: RunDir, writes: Callable[[Request], Completion]) -> None:
    """A run to its end, with a writer that does this and a judge that finds the level in a text."""

    def does(request: Request) -> Completion:
        is_writer = not request.labels and "tell a writer" not in request.messages[-1]["content"]
        return writes(request) if is_writer else answer(request)

    synthesize(plan, run, with_engine(does))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Completion(error="refused", detail="no such field"), r"{n} of {n} answers were refused: no such field"),
        (
            Completion(error="cut off", detail="not finished after 20 tokens", text="half"),
            r"{n} of {n} answers were cut off at 20 tokens: raise writer\.sampling\.max_tokens; see",
        ),
        (
            Completion(error="cut off", detail="not finished after 20 tokens (all of the text is thoughts)"),
            r"{n} of {n} answers were cut off at 20 tokens: raise writer\.sampling\.max_tokens, or turn thinking off",
        ),
        (
            Completion(error="thoughts not ended", detail="all of the text is thoughts"),
            r"{n} of {n} answers were thoughts without an answer: raise writer\.sampling\.max_tokens",
        ),
        (Completion(error="ended by abort", detail="x"), r"{n} of {n} answers were lost: ended by abort \(x\)"),
        (
            Completion(text="low text. B."),
            r"\d+ of {n} answers have the text of another answer to their prompt: raise writer\.sampling\.temperature; "
            r"\d+ of {n} answers have no answer at another level to be compared with \(.* the same level \(ornament",
        ),
    ],
)
def test_no_pairs_end_the_run_with_what_was_lost_and_the_ledger_has_it(
    made: Completion, said: str, tmp_path: Path
) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    number = 3 * len(plan.prompts_of("train"))
    with pytest.raises(UserError, match="no pair was made: " + said.format(n=number)):
        concluded(plan, run, lambda request: made)
    ledger = run.read_json("ledger.json")
    assert ledger["write"]["rows_in"] == number
    assert sum(ledger["write"]["rejected"].values()) == (number if made.error else 0)
    assert ledger["pair"]["rows_out"] == 0


def test_what_is_lost_before_judging_is_said_before_the_writer_is_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    number = 3 * len(plan.prompts_of("train"))

    def writes(request: Request) -> Completion:
        asked = request.messages[-1]["content"]
        level = level_in(asked)
        if any(f"thing {at}." in asked for at in (1, 2, 3)):
            return answer(request)
        if level == "high":
            return Completion(error="cut off", text="half", detail="not finished after 20 tokens")
        return Completion(text="low text. B.") if level == "mid" else Completion(text="low text. B. C.")

    concluded(plan, run, writes)
    (note,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and "cannot be used" in line
    ]
    cut, other = (run.read_json("ledger.json")[stage]["rejected"] for stage in ("write", "pair"))
    assert note.split(": ", 2)[2].startswith(
        f"{cut['cut off']} of {number} answers were cut off at 20 tokens: raise writer.sampling.max_tokens; "
        f"{other['no partner']} of {number} answers have no answer at another level"
    )


def test_thoughts_are_counted_and_are_not_in_an_answers_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    number = 3 * len(plan.prompts_of("train"))
    thinks = {"num_tokens": 40, "had_thoughts": True, "thought_tokens": 30}
    concluded(plan, run, lambda request: Completion(text=answer(request).text.replace("half", "mid text!"), **thinks))
    written = run.read_json("ledger.json")["write"]
    assert (written["with_thoughts"], written["thought_tokens"]) == (number, 30 * number)
    assert f"{number} came with thoughts, which were cut (75% of the tokens)" in capsys.readouterr().out
    generations = [row for name in run.names("generations") for row in run.read("generations", [name], Generation)]
    assert {row.num_tokens for row in generations} == {10}
