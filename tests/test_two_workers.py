"""Two workers at the same shard leave the first one's, whole, with its rejects."""

from __future__ import annotations

from pathlib import Path

from cpt_ray.engines.engine import Completion, FakeEngine, Request
from cpt_ray.plan import plan_units
from cpt_ray.synthesis.stage import Steps
from cpt_ray.tables.records import Generation, Reject, Unit
from tests.fake_runs import GIVEN, make_run, synthesized


def test_of_two_workers_on_one_shard_the_first_ones_answers_counts_and_rejects_stay(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    name, planned = next(iter(plan_units(plan).items()))
    units = list(planned)
    run.write("units", name, units)
    step = Steps.of(plan, plan_units(plan)).write

    def engine_without(lost: Unit, text: str) -> FakeEngine:
        def reply(request: Request) -> Completion:
            is_lost = request == step.request(lost)
            return Completion(error="filtered", detail=text) if is_lost else Completion(text=text, num_tokens=3)

        return FakeEngine(reply)

    class Overtaken:
        """An engine that answers only after another worker has made the whole shard."""

        def run(self, requests: list[Request]) -> list[Completion]:
            step(engine_without(units[0], "first"), run, name)
            return engine_without(units[1], "second").run(requests)

    step(Overtaken(), run, name)
    rejects = run.read("rejects", [f"write-{name}"], Reject)
    assert [(row.subject_id, row.detail) for row in rejects] == [(units[0].unit_id, "first")]
    answers = run.read("generations", [name], Generation)
    assert {row.unit_id for row in answers} == {unit.unit_id for unit in units[1:]}
    assert {row.text for row in answers} == {"first"}
    assert run.counts("generations", name)["generated_tokens"] == 3 * len(answers)


def test_rejects_that_a_killed_process_owed_are_there_after_the_next_run(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    synthesized(plan, run)
    before = {name: run.read("rejects", [name], Reject) for name in run.names("rejects")}
    assert any(rows for name, rows in before.items() if name.startswith("write-"))
    for name in before:
        if not name.startswith("pair-"):
            run.shard("rejects", name).unlink()
    synthesized(plan, run)
    assert {name: run.read("rejects", [name], Reject) for name in run.names("rejects")} == before
