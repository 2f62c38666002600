"""Whole stages by the runner of this process: what is done, what is done again, what is left of what failed."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.config import ModelConfig
from cpt_ray.engines.engine import Completion, Engine, EngineDiedError, FakeEngine, Request
from cpt_ray.engines.ledger import Tally
from cpt_ray.engines.pool import LocalRunner
from cpt_ray.engines.step import Line, Step
from cpt_ray.engines.worker import MAX_DEATHS
from cpt_ray.errors import UserError
from cpt_ray.evaluation.stage import evaluate
from cpt_ray.plan import plan_units
from cpt_ray.steering.answers import Answer, make_answer
from cpt_ray.steering.stage import Steering
from cpt_ray.synthesis.stage import name_shards, synthesize
from cpt_ray.tables.records import AnswerEmbedding, Unit
from cpt_ray.tables.rundir import RunDir
from tests.fake_runs import GIVEN, answer, make_run, synthesized, with_engine
from tests.tiny_model import make_tiny_model

TABLES = ("units", "directives", "generations", "grades", "pairs", "rejects")


def open_none(model: ModelConfig) -> Engine:
    """For what is complete, or brings its own."""
    raise AssertionError(f"no engine of {model.model} is needed")


def shards_of(run: RunDir) -> dict[str, int]:
    """When each shard was written."""
    return {
        f"{table}/{name}": run.shard(table, name).stat().st_mtime_ns for table in TABLES for name in run.names(table)
    }


def counts_of(run: RunDir) -> dict[str, dict[str, Any]]:
    """The ledger without what depends on the time."""
    return {
        stage: {key: value for key, value in entry.items() if "second" not in key}
        for stage, entry in run.read_json("ledger.json").items()
    }


def test_the_ledger_of_a_whole_synthesis_adds_up_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # so that every import of it fails
    overrides = ('judges=[{"model": "other"}]', "writer.price.generated=1000", "prompts.limit=10")
    plan, run = make_run(tmp_path, *overrides, levels=GIVEN)
    train = [prompt.text for prompt in plan.prompts_of("train")]
    assert len(train) == 8
    assert {"Write about thing 7.", "Write about thing 8."} < {*train}  # whose answers `answer` spoils
    synthesized(plan, run)
    written = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 4 * 22, "cut_answers": 0}
    graded = {"rows_in": 23, "rows_out": 23, "rejected": {}}
    graded |= {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
    assert counts_of(run) == {
        "plan": {"rows_in": 10, "rows_out": 24, "rejected": {}},
        "direct": {"rows_in": 0, "rows_out": 9, "rejected": {}, "cost": 0.0},
        "write": written | {"rows_in": 24, "rows_out": 23, "rejected": {"cut off": 1}, "cost": 0.088},
        "judge": graded | {"cost": 0.0},  # at the writer's price, since it is the writer unless given
        "judge-2": graded,
        # six of each whole prompt, two of each of those that have two levels
        "pair": {
            "rows_in": 23,
            "rows_out": 40,
            "kept_answers": 22,  # of all prompts, though many say the same
            "rejected": {"not needed": 1},
            "cost_per_pair": 0.0022,
        },
    }


def test_what_is_complete_is_not_done_again_and_needs_no_engine(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    synthesized(plan, run)
    shards, ledger = shards_of(run), run.read_json("ledger.json")

    synthesize(plan, run, LocalRunner(open_none))
    assert shards_of(run) == shards
    assert run.read_json("ledger.json") == ledger


def test_an_evaluation_that_is_complete_gives_the_same_results_without_an_engine(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, f"policy.model={make_tiny_model(tmp_path / 'policy')}", levels=GIVEN)
    shards = synthesized(plan, run)
    results = evaluate(plan, run, shards, with_engine(answer))
    ledger = counts_of(run)
    num_trials = 3 * 2 * len(plan.prompts_of("held_out"))  # levels, with a directive and without
    assert [ledger[stage]["rows_out"] for stage in ("answer-tuned", "answer-base", "grade")] == [
        num_trials,
        num_trials,
        2 * num_trials,
    ]
    assert ledger["perplexity"]["rows_out"] == len(plan.prompts_of("held_out"))  # distinct (prompt, answer)
    assert evaluate(plan, run, shards, LocalRunner(open_none)) == results
    assert counts_of(run) == ledger


@pytest.mark.parametrize("stop", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_a_run_that_was_stopped_goes_on_with_the_rest_alone(stop: BaseException, tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    asked: Counter[str] = Counter()

    def reply(request: Request) -> Completion:
        asked[repr(request)] += 1
        if len(asked) == 30 and not stopped:
            stopped.append(stop)
            raise stop
        return answer(request)

    stopped: list[BaseException] = []
    with pytest.raises(UserError if isinstance(stop, RuntimeError) else KeyboardInterrupt):
        synthesize(plan, run, with_engine(reply))
    shards = name_shards(plan, plan_units(plan))
    before = shards_of(run)
    in_flight = sorted({*shards.written} - run.names("generations"))[0]
    assert 0 < len(run.names("generations")) < len(shards.written)
    synthesize(plan, run, with_engine(reply))
    after = shards_of(run)
    assert before.items() <= after.items()
    assert 0 < sum(count - 1 for count in asked.values()) <= len(run.read("units", [in_flight], Unit))
    undisturbed = RunDir(tmp_path / "undisturbed")
    synthesize(plan, undisturbed, with_engine(answer))
    assert after.keys() == shards_of(undisturbed).keys()
    assert counts_of(run) == counts_of(undisturbed)


# ---------------------------------------------------------------- plain steps


@dataclass(frozen=True, kw_only=True)
class CopyStep(Step):
    """A shard under a longer name, by one request."""

    stage: str = "copy"
    table: str = "units"

    def output(self, shard: str) -> str:
        return f"{shard}+"

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        tally = Tally(1)
        tally.add(engine.run([Request(messages=[{"role": "user", "content": shard}], max_tokens=1)]))
        run.write(self.table, self.output(shard), [], tally.close(1))


class Engines:
    """Opens engines that die of a shard so many times; what was opened and asked, in order."""

    def __init__(self, dies_of: str = "", deaths: int = 0):
        self._dies_of, self._deaths = dies_of, deaths
        self.log: list[str] = []

    def open(self, model: ModelConfig) -> FakeEngine:
        self.log.append(f"open {model.model}")
        return FakeEngine(self._reply)

    def _reply(self, request: Request) -> Completion:
        shard = request.messages[0]["content"]
        self.log.append(shard)
        if shard == self._dies_of and self._deaths:
            self._deaths -= 1
            raise EngineDiedError("core dumped")
        return Completion(text="x", num_tokens=1)


def step(model: str) -> CopyStep:
    return CopyStep(model=ModelConfig(model=model))


def test_steps_that_share_an_engine_are_done_by_one_line_after_line(tmp_path: Path) -> None:
    engines, run = Engines(), RunDir(tmp_path)
    lines = [Line(["a", "b"], [step("m"), step("m"), step("n")]), Line(["c"], [step("n")]), Line(["d"], [step("m")])]
    LocalRunner(engines.open)(run, lines)
    assert engines.log == ["open m", "a", "a+", "b", "b+", "d", "open n", "a++", "b++", "c"]
    assert run.names("units") == {"a+", "a++", "a+++", "b+", "b++", "b+++", "c+", "d+"}


def test_a_step_that_failed_takes_no_time_from_later_ones(tmp_path: Path) -> None:
    def reply(request: Request) -> Completion:
        if request.messages[0]["content"] == "stopped":
            raise KeyboardInterrupt
        time.sleep(0.2)
        return Completion(text="x", num_tokens=1)

    run, runner = RunDir(tmp_path), with_engine(reply)
    with pytest.raises(KeyboardInterrupt) as held:  # and with it all that the step had in hand
        runner(run, [Line(["stopped"], [step("m")])])
    runner(run, [Line(["a"], [step("m")])])
    assert held.value.__traceback__
    assert run.counts("units", "a+")["engine_seconds"] >= 0.2


def test_an_engine_that_died_is_opened_anew_and_only_its_shard_is_tried_again(tmp_path: Path) -> None:
    engines, run = Engines("b", MAX_DEATHS - 1), RunDir(tmp_path)
    LocalRunner(engines.open)(run, [Line(["a", "b", "c"], [step("m")])])
    assert engines.log == ["open m", "a", *["b", "open m"] * (MAX_DEATHS - 1), "b", "c"]
    assert not run.attempts.exists()


def test_a_shard_that_every_engine_dies_of_ends_the_run_with_stage_shard_and_cause(tmp_path: Path) -> None:
    engines, run = Engines("b", MAX_DEATHS), RunDir(tmp_path)
    with pytest.raises(UserError) as caught:
        LocalRunner(engines.open)(run, [Line(["a", "b", "c"], [step("m")])])
    assert str(caught.value) == (
        f"m: the engine's process died {MAX_DEATHS} times on copy of shard b "
        "(the last time: EngineDiedError: core dumped); what is finished is kept"
    )
    assert engines.log.count("b") == MAX_DEATHS
    assert run.names("units") == {"a+"}


def test_tables_of_steering_are_made_once_by_the_runner_that_is_given(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "synthesis.shard_rows=2")
    asked: list[str] = []

    class Lengths:
        """Embeds a text as its length."""

        def __init__(self, model: ModelConfig):
            asked.append(f"open {model.model}")

        def __call__(self, rows: list[Answer]) -> list[AnswerEmbedding]:
            asked.extend(row.text for row in rows)
            return [AnswerEmbedding(answer_id=row.answer_id, vector=[float(len(row.text))]) for row in rows]

    answers = [make_answer("p", "Write.", text, {}) for text in ("one", "three", "eleven")]
    steering = Steering(plan, run, None, LocalRunner(open_none))
    for _ in range(2):
        rows = steering.table("steering_embeddings", answers, Lengths, ModelConfig(model="m"))
        assert [row.vector for row in rows] == [[3.0], [5.0], [6.0]]
    assert asked == ["open m", "one", "three", "eleven"]
